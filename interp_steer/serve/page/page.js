"use strict";
// The page of the server. It keeps what is chosen; the talk itself is kept by the server.

const $ = (id) => document.getElementById(id);
const OPERATORS = {
  add: "adds", add_norm_kept: "adds, length kept", clamp: "sets the projection", clamp_min: "at least",
  clamp_max: "at most", ablate: "takes away",
};
const SCOPES = { "": "all positions", prompt: "the prompt", generated: "the answer", last: "last of the prompt", "all+first": "all, first too" };
const COMPONENTS = ["resid_post", "resid_pre", "mlp_out", "attn_out"];
const session = crypto.randomUUID();
let about = null, steps = [], asking = null, last = null, typed = false, turns = 0, shown = null;

function make(kind, props = {}, ...inside) {
  const node = document.createElement(kind);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...inside);
  return node;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function token() { return sessionStorage.getItem("token") || ""; }

async function call(route, body, more = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  const answer = await fetch(route, {
    method: body === undefined ? "GET" : "POST", headers,
    body: body === undefined ? undefined : JSON.stringify(body), ...more,
  });
  if (answer.status === 401 && !more.again) {
    const given = prompt("This server asks for a token:");
    if (given) {
      sessionStorage.setItem("token", given);
      return call(route, body, { ...more, again: true });
    }
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said?.error?.message || `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

const json = async (route, body) => (await call(route, body)).json();

function trouble(error) {
  if (error.name !== "AbortError") say(error.message, true);
}

// --- finding ---------------------------------------------------------------------------------

let hits = [], marked = -1, timer = 0, asked = 0;

function search() {
  clearTimeout(timer);
  timer = setTimeout(async () => {
    const query = $("query").value.trim(), mine = ++asked;
    try {
      const found = query ? await json(`/api/labels?q=${encodeURIComponent(query)}`) : [];
      if (mine === asked) show(found);
    } catch (error) { if (mine === asked) { show([]); trouble(error); } }
  }, 150);
}

function show(found) {
  hits = found;
  marked = -1;
  $("hits").replaceChildren(...hits.map((hit, n) => make("li", {
    role: "option", id: `hit-${n}`, title: hit.context, onclick: () => take({ feature: hit.id }),
  }, make("b", {}, `${hit.layer} / ${hit.index} `), hit.label, ...where(hit))));
  mark(-1);
}

// a label that does not have the word was found by the text behind it
function where(hit) {
  const models = new Set(hits.map((one) => one.id.split("/")[0])), said = [];
  if (models.size > 1) said.push(hit.id.split("/")[0]);
  const words = $("query").value.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [];
  const at = Math.min(...words.map((word) => hit.context.toLowerCase().indexOf(word)).filter((n) => n >= 0));
  if (!words.some((word) => hit.label.toLowerCase().includes(word)) && Number.isFinite(at)) {
    const begin = Math.max(0, at - 30);
    said.push(`${begin ? "…" : ""}${hit.context.slice(begin, at + 40)}…`);
  }
  return said.map((text) => make("small", {}, text));
}

function mark(n) {
  marked = n;
  [...$("hits").children].forEach((one, k) => one.setAttribute("aria-selected", k === n));
  if (n >= 0) {
    $("query").setAttribute("aria-activedescendant", `hit-${n}`);
    $("hits").children[n].scrollIntoView({ block: "nearest" });
  } else $("query").removeAttribute("aria-activedescendant");
}

$("query").addEventListener("input", search);
$("query").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && hits.length) { mark(Math.min(marked + 1, hits.length - 1)); event.preventDefault(); }
  if (event.key === "ArrowUp" && hits.length) { mark(Math.max(marked - 1, 0)); event.preventDefault(); }
  if (event.key === "Escape" && hits.length) { show([]); event.preventDefault(); }
});
$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  if (marked >= 0) take({ feature: hits[marked].id });
  else useWord();
});

function useWord() {
  const word = $("query").value.trim();
  if (!word) { say("Type a word first.", true); return; }
  const layer = steps.length ? Number(steps[steps.length - 1].layer) : Math.floor(about.layers / 2);
  take({ word, layer });
}
$("word").addEventListener("click", useWord);

$("file").addEventListener("change", () => { if ($("file").files[0]) drop($("file").files[0]); $("file").value = ""; });
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  if (kind === "drop" && event.dataTransfer.files[0]) drop(event.dataTransfer.files[0]);
});

async function drop(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let n = 0; n < bytes.length; n += 32768) text += String.fromCharCode(...bytes.subarray(n, n + 32768));
  const wanted = { file: file.name, data: btoa(text), name: file.name.replace(/\.[^.]*$/, "").replace(/[^\w.+-]/g, "_") };
  if (!file.name.endsWith(".gguf")) {
    const at = prompt("Which block's output does it belong to, counted from 0? (0-31: a row a layer)", String(Math.floor(about.layers / 2)));
    if (at === null) return;
    wanted.at = at;
  }
  take(wanted);
}

async function take(wanted) {
  say("Making the direction …");
  try {
    const made = await json("/api/direction", wanted);
    add(made);
    say(`${made.name} is there.`);
    show([]);
  } catch (error) { trouble(error); }
}

$("stored").addEventListener("change", () => {
  const found = about.directions.find((one) => one.name === $("stored").value);
  $("stored").value = "";
  if (found?.error) say(found.error, true);
  else if (found) add(found);
});

// --- steering --------------------------------------------------------------------------------

function add(direction) {
  const step = {
    direction, operator: "add", dose: 0.35, layer: direction.layer, scope: "prompt",
    component: COMPONENTS.includes(direction.component) ? direction.component : "resid_post",
  };
  steps.push(step);
  typed = false;
  draw();
  $("steps").lastElementChild.querySelector("input[type=range]").focus();
}

function median(step) {
  const layer = Math.min(Math.max(0, Number(step.layer) || 0), about.layers - 1);
  return about.medians[layer + (step.component === "resid_pre" ? 0 : 1)];
}

function lineOf(step, dose = step.dose) {
  const number = step.operator === "ablate" ? "" : `, ${Number(dose.toFixed(3))} dose`;
  const place = step.component === "resid_post" ? step.layer : `${step.component} ${step.layer}`;
  return `${step.operator}(${step.direction.name}${number}) at ${place}${step.scope ? ` on ${step.scope}` : ""}`;
}

const line = () => $("line").value.trim();

function rewrite() {
  if (!typed) $("line").value = steps.map((step) => lineOf(step)).join("; ");
}

function choice(step, key, options, label) {
  const select = make("select", { onchange: () => { step[key] = select.value; typed = false; draw(); } },
    ...Object.entries(options).map(([value, said]) => make("option", { value, selected: step[key] === value }, said)));
  return make("label", {}, label, select);
}

async function fetched(name) {
  try {
    const file = await (await call(`/api/direction/${encodeURIComponent(name)}`)).blob();
    save(file, `${name}.safetensors`);
  } catch (error) { trouble(error); }
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function draw() {
  if (!steps.includes(shown)) shown = steps[0] || null;
  $("steps").replaceChildren(...steps.map((step, n) => {
    const dose = make("output", {}), slider = make("input", {
      type: "range", min: "-1.2", max: "1.2", step: "0.01", value: String(step.dose), "aria-label": `Dose of ${step.direction.name}`,
      disabled: step.operator === "ablate",
    });
    const coefficient = make("input", { type: "number", step: "any", disabled: step.operator === "ablate" });
    const told = (source) => {
      if (source !== slider) slider.value = String(step.dose);
      if (source !== coefficient) coefficient.value = (step.dose * median(step)).toFixed(2);
      dose.textContent = `${step.dose.toFixed(2)} dose`;
      rewrite();
    };
    slider.addEventListener("input", () => { step.dose = Number(slider.value); typed = false; told(slider); });
    coefficient.addEventListener("change", () => { step.dose = Number(coefficient.value) / median(step); typed = false; told(coefficient); });
    const place = make("output", {}, String(step.layer));
    const layer = make("input", { type: "range", min: "0", max: String(about.layers - 1), step: "1", value: String(step.layer) });
    layer.addEventListener("input", () => { step.layer = Number(layer.value); place.textContent = layer.value; typed = false; told(layer); });
    const buttons = [
      make("button", { type: "button", title: "Save the direction as a file", "aria-label": `Save ${step.direction.name} as a file`, onclick: () => fetched(step.direction.name) }, "↓"),
      make("button", { type: "button", title: "Remove", "aria-label": `Remove ${step.direction.name}`, onclick: () => { steps.splice(n, 1); typed = false; draw(); $("query").focus(); } }, "×"),
    ];
    if (steps.length > 1) {
      const colours = make("input", { type: "radio", name: "colours", checked: step === shown, onchange: () => { shown = step; } });
      buttons.unshift(make("label", { title: "Which direction colours the tokens of the next answer" }, colours, " colours"));
    }
    const node = make("div", { className: "step" },
      make("header", {}, make("strong", {}, step.direction.name), dose, make("span", {}, ...buttons)),
      ...(step.direction.label ? [make("p", { className: "said" }, step.direction.label)] : []),
      slider,
      make("div", { className: "fields" },
        choice(step, "operator", OPERATORS, "Operator"), choice(step, "scope", SCOPES, "Where"),
        make("label", {}, "Layer ", place, layer), make("label", {}, "Coefficient", coefficient)));
    told(null);
    return node;
  }));
  if (!steps.length) rewrite();
}

$("line").addEventListener("input", () => { typed = true; });

// --- talking ---------------------------------------------------------------------------------

function number(id) { return Number($(id).value); }

function body(text) {
  return {
    session, text, turns, line: line(), shade: shown?.direction.name ?? null,
    system: $("system").value.trim() || null, temperature: number("temperature"),
    repetition_penalty: number("repetition_penalty"), max_tokens: Math.round(number("max_tokens")), seed: Math.round(number("seed")),
  };
}

async function ask(text) {
  asking = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  say("…");
  const columns = [], began = performance.now(), asked = line(), coloured = shown;
  let count = 0;
  try {
    const answer = await call("/api/talk", body(text), { signal: asking.signal });
    if (answer.headers.get("content-type").startsWith("application/json")) { obeyed(text, await answer.json()); return; }
    const box = make("div", { className: "columns" }), turn = make("div", { className: "turn" }, make("h2", {}, text), box);
    $("turns").querySelector(".empty")?.remove();
    $("turns").append(turn);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.titles) for (const title of event.titles) {
        const p = make("p");
        columns.push(p);
        box.append(make("article", {}, make("h3", {}, title), p));
      }
      if (event.titles) turns = event.turns;
      if (event.titles && !text.startsWith("/")) last = { line: asked, steer: event.steer, asked: event.asked };
      if (event.notes?.length) turn.insertBefore(make("p", { className: "help" }, event.notes.join("; ")), box);
      if (event.column !== undefined) {
        columns[event.column].append(event.text);
        if (event.finish) {
          count += event.tokens;
          if (event.shades) shade(columns[event.column], event.shades, coloured);
          if (event.finish === "length") columns[event.column].append(" …");
        }
        $("turns").scrollTop = $("turns").scrollHeight;
        if (matchMedia("(max-width: 760px)").matches) columns[event.column].scrollIntoView({ block: "nearest" });
      }
      if (event.kept) turns += 1;
      else if (event.kept === false && !text.startsWith("/")) turn.append(make("p", { className: "help" }, "An answer is empty: this question is not part of the talk."));
    }
    const seconds = (performance.now() - began) / 1000;
    say(`${count} tokens, ${seconds.toFixed(1)} s`);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped: this question is not part of the talk.");
    else trouble(error);
  } finally {
    asking = null;
    $("send").disabled = false;
    $("stop").disabled = true;
  }
}

// what a line that begins with "/" has done
function obeyed(text, answer) {
  say(answer.told);
  if (text.startsWith("/reset")) { $("turns").replaceChildren(); turns = 0; last = null; }
  if (text.startsWith("/steer ")) { $("line").value = answer.line; typed = true; }
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const said = part.replace(/^data: /, "");
      if (said !== "[DONE]") yield JSON.parse(said);
    }
  }
}

function shade(place, shades, step) {
  const most = step?.direction.most || Math.max(1e-6, ...shades.map(([, value]) => Math.abs(value)));
  const text = place.textContent, nodes = [];
  let at = 0;
  for (const [token, value] of shades) {
    if (!text.startsWith(token, at)) {
      if (!at && text.startsWith(token.trimStart())) { nodes.push(piece(token.trimStart(), value)); at = token.trimStart().length; continue; }
      break;
    }
    nodes.push(piece(token, value));
    at += token.length;
  }
  place.replaceChildren(...nodes, text.slice(at));
  function piece(token, value) {
    const share = Math.min(1, Math.abs(value) / most), colour = value > 0 ? "var(--steered)" : "var(--accent)";
    const node = make("mark", { title: `${value.toFixed(2)}` }, token);
    if (share > 0.02) node.style.background = `color-mix(in srgb, ${colour} ${Math.round(share * 45)}%, transparent)`;
    return node;
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || asking) return;
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => asking?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape") asking?.abort(); });
$("reset").addEventListener("click", async () => {
  try { obeyed("/reset", await json("/api/talk", body("/reset"))); } catch (error) { trouble(error); }
  $("text").focus();
});
$("save").addEventListener("click", async () => {
  try {
    const talk = await json(`/api/talk/${session}`);
    save(new Blob([JSON.stringify(talk, null, 1)]), "talk.json");
  } catch (error) { trouble(error); }
});

// --- a curve ---------------------------------------------------------------------------------

const DOSES = [0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8];

$("draw").addEventListener("click", async () => {
  const step = steps[steps.length - 1];
  if (!step || step.operator === "ablate") { say("Choose a direction whose dose can vary.", true); return; }
  $("draw").disabled = true;
  try {
    const found = await json("/api/curve", { session, lines: DOSES.map((dose) => lineOf(step, dose * Math.sign(step.dose || 1))) });
    plot(found.map((one, n) => [DOSES[n], one.kl]));
  } catch (error) { trouble(error); }
  $("draw").disabled = false;
});

function plot(points) {
  const wide = 320, high = 150, left = 38, low = 118, most = Math.max(...points.map(([, y]) => y), 1e-3);
  const x = (dose) => left + (wide - left - 10) * dose / 0.8, y = (kl) => low - (low - 12) * kl / most;
  const node = (kind, props, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(props)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  };
  const svg = node("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": points.map(([d, k]) => `${d} dose: ${k.toFixed(2)} nats`).join(", ") });
  svg.append(
    node("line", { x1: left, y1: low, x2: wide - 10, y2: low }), node("line", { x1: left, y1: 12, x2: left, y2: low }),
    node("path", { d: points.map(([d, k], n) => `${n ? "L" : "M"}${x(d)} ${y(k)}`).join(" ") }),
    ...points.map(([d, k]) => node("circle", { cx: x(d), cy: y(k), r: 3 })),
    node("text", { x: 2, y: 16 }, most.toFixed(2)), node("text", { x: 22, y: low }, "0"),
    ...[0.2, 0.4, 0.6, 0.8].map((d) => node("text", { x: x(d) - 8, y: low + 15 }, String(d))),
    node("text", { x: left, y: high - 2 }, "dose; KL from unsteered, nats a token"));
  $("curve").replaceChildren(svg);
}

// --- copies ----------------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// commands that make the directions elsewhere, or say where their files come from
function made(steering) {
  const named = steps.map((step) => step.direction).filter(({ name }) => steering.includes(`(${name},`) || steering.includes(`(${name})`));
  return named.map(({ name, made_by }) => made_by ? `${made_by}\n`
    : about.directions.some((one) => one.name === name) ? "" : `# ${name}: save it by its button "↓", then\ninterp-steer direction import ${name}.safetensors --name ${name}\n`).join("");
}

function copies(kind) {
  const system = $("system").value.trim(), first = "Describe a walk.";
  const asked = last?.asked ?? (about.chat ? [...(system ? [["system", system]] : []), ["user", first]] : first);
  const steering = last?.line ?? line(), tokens = Math.round(number("max_tokens"));
  const temperature = number("temperature"), penalty = number("repetition_penalty"), seed = Math.round(number("seed"));
  const messages = about.chat ? asked.map(([role, content]) => ({ role, content })) : null;
  const route = about.chat ? "chat/completions" : "completions";
  const given = about.chat ? { messages } : { prompt: asked };
  if (kind === "curl") {
    const key = token() ? ` -H "Authorization: Bearer $INTERP_STEER_TOKEN"` : "";
    const all = { model: about.name, ...given, max_tokens: tokens, temperature, repetition_penalty: penalty, seed, ...(steering ? { steering } : {}) };
    return `curl ${location.origin}/v1/${route} -H "Content-Type: application/json"${key} -d ${quoted(JSON.stringify(all))}`;
  }
  if (kind === "command") { // lengths, because a dose is in the unit of this server's prompts
    const text = about.chat ? messages[messages.length - 1].content : asked, steer = last?.steer ?? steering;
    const told = about.chat && messages[0].role === "system" ? ` --system ${quoted(messages[0].content)}` : "";
    const alone = about.chat && messages.some((one) => one.role === "assistant") ? "# the last question, without the talk before it\n" : "";
    return `${made(steer)}${alone}interp-steer generate ${quoted(text)} --model ${quoted(about.model)}${told}${steer ? ` --steer ${quoted(steer)}` : ""} --max-new-tokens ${tokens} --temperature ${temperature} --repetition-penalty ${penalty} --seed ${seed}`;
  }
  if (kind === "name") {
    const said = last?.steer ?? steering, has = Object.entries(about.settings).find(([, one]) => one === said);
    if (has || !steering) return about.name + (has ? `+${has[0]}` : "");
    return `${made(said)}interp-steer serve --model ${quoted(about.model)} --as ${quoted(`setting=${said}`)}    # then the model is ${about.name}+setting`;
  }
  const create = about.chat ? "chat.completions" : "completions", imports = token() ? "import os\n\n" : "";
  return `${imports}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${token() ? 'os.environ["INTERP_STEER_TOKEN"]' : '"none"'})
answer = client.${create}.create(
    model=${JSON.stringify(about.name)},
    ${about.chat ? "messages" : "prompt"}=${JSON.stringify(about.chat ? messages : asked)},
    max_tokens=${tokens}, temperature=${temperature}, seed=${seed},
    extra_body=${JSON.stringify({ repetition_penalty: penalty, ...(steering ? { steering } : {}) })},
)
print(answer.choices[0].${about.chat ? "message.content" : "text"})`;
}

$("copies").addEventListener("click", async (event) => {
  const kind = event.target.dataset.copy;
  if (!kind) return;
  const text = copies(kind);
  try { await navigator.clipboard.writeText(text); say(`Copied: ${text.split("\n")[0].slice(0, 80)} …`); }
  catch { // a page without a safe address has no clipboard
    const area = make("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    say("Copied.");
  }
});

// --- beginning -------------------------------------------------------------------------------

async function begin() {
  try {
    about = await json("/api/about");
  } catch (error) { trouble(error); return; }
  $("model").textContent = `${about.name}: ${about.layers} layers, width ${about.width}`;
  $("max_tokens").max = String(about.most_tokens);
  $("stored").append(...about.directions.map((one) => make("option", { value: one.name }, one.name)));
  $("stored").disabled = !about.directions.length;
  if (!about.chat) {
    say("No chat template: the model continues what you write, every text by itself.");
    $("text").placeholder = "Begin a text. Enter sends, Shift+Enter breaks the line.";
    $("system").disabled = true;
  }
  draw();
  $("query").focus();
}
begin();
