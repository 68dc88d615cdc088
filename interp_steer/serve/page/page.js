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
let about = null, steps = [], asking = null, last = null, typed = false;

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
  }, make("b", {}, `${hit.layer} / ${hit.index} `), hit.label)));
  mark(-1);
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
  if (event.key === "Escape") show([]);
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

function draw() {
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
    const layer = make("input", { type: "number", min: "0", max: String(about.layers - 1), step: "1", value: String(step.layer) });
    layer.addEventListener("change", () => { step.layer = Number(layer.value); typed = false; told(layer); });
    const node = make("div", { className: "step" },
      make("header", {}, make("strong", {}, step.direction.name), dose,
        make("button", { type: "button", "aria-label": `Remove ${step.direction.name}`, onclick: () => { steps.splice(n, 1); typed = false; draw(); $("query").focus(); } }, "×")),
      ...(step.direction.label ? [make("p", { className: "said" }, step.direction.label)] : []),
      slider,
      make("div", { className: "fields" },
        choice(step, "operator", OPERATORS, "Operator"), choice(step, "scope", SCOPES, "Where"),
        make("label", {}, "Layer", layer), make("label", {}, "Coefficient", coefficient)));
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
    session, text, line: line(), shade: steps.length ? steps[0].direction.name : null,
    system: $("system").value.trim() || null, temperature: number("temperature"),
    repetition_penalty: number("repetition_penalty"), max_tokens: Math.round(number("max_tokens")), seed: Math.round(number("seed")),
  };
}

async function ask(text) {
  asking = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  say("…");
  const columns = [], began = performance.now();
  let count = 0;
  try {
    const answer = await call("/api/talk", body(text), { signal: asking.signal });
    if (answer.headers.get("content-type").startsWith("application/json")) { say((await answer.json()).told); return; }
    last = { text, line: line() };
    const box = make("div", { className: "columns" });
    $("turns").querySelector(".empty")?.remove();
    $("turns").append(make("div", { className: "turn" }, make("h2", {}, text), box));
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.titles) for (const title of event.titles) {
        const p = make("p");
        columns.push(p);
        box.append(make("article", {}, make("h3", {}, title), p));
      }
      if (event.notes?.length) say(event.notes.join(" "));
      if (event.column !== undefined) {
        columns[event.column].append(event.text);
        if (event.finish) {
          count += event.tokens;
          if (event.shades) shade(columns[event.column], event.shades);
          if (event.finish === "length") columns[event.column].append(" …");
        }
        $("turns").scrollTop = $("turns").scrollHeight;
        if (matchMedia("(max-width: 760px)").matches) columns[event.column].scrollIntoView({ block: "nearest" });
      }
      if (event.kept === false) say("An answer is empty, so the question is taken back.");
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

function shade(place, shades) {
  const most = steps[0]?.direction.most || Math.max(1e-6, ...shades.map(([, value]) => Math.abs(value)));
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
  try { await json("/api/talk", body("/reset")); $("turns").replaceChildren(); say("A new talk."); } catch (error) { trouble(error); }
  $("text").focus();
});
$("save").addEventListener("click", async () => {
  try {
    const talk = await json(`/api/talk/${session}`);
    const link = make("a", { href: URL.createObjectURL(new Blob([JSON.stringify(talk, null, 1)])), download: "talk.json" });
    link.click();
    URL.revokeObjectURL(link.href);
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

function copies(kind) {
  const text = last?.text || "Describe a walk.", steering = last?.line ?? line();
  const tokens = Math.round(number("max_tokens")), temperature = number("temperature"), penalty = number("repetition_penalty");
  const common = { model: about.name, messages: [{ role: "user", content: text }], max_tokens: tokens, temperature, repetition_penalty: penalty, seed: Math.round(number("seed")) };
  if (steering) common.steering = steering;
  if (kind === "curl") {
    const key = token() ? ` -H "Authorization: Bearer $INTERP_STEER_TOKEN"` : "";
    return `curl ${location.origin}/v1/chat/completions -H "Content-Type: application/json"${key} -d ${quoted(JSON.stringify(common))}`;
  }
  if (kind === "command") {
    const made = steps.filter((step) => step.direction.feature).map((step) => `# ${step.direction.name}: interp-steer features get MODEL/SOURCE/INDEX --name ${step.direction.name}\n`).join("");
    const steer = steering ? ` --steer ${quoted(steering)}` : "";
    return `${made}interp-steer generate ${quoted(text)} --model ${quoted(about.model)}${steer} --max-new-tokens ${tokens} --temperature ${temperature} --repetition-penalty ${penalty}`;
  }
  if (kind === "name") return steering ? `--as ${quoted(`setting=${steering}`)}    # then the model is ${about.name}+setting` : about.name;
  return `from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key="none")
answer = client.chat.completions.create(
    model=${JSON.stringify(about.name)},
    messages=[{"role": "user", "content": ${JSON.stringify(text)}}],
    max_tokens=${tokens}, temperature=${temperature}, seed=${common.seed},
    extra_body=${JSON.stringify({ repetition_penalty: penalty, ...(steering ? { steering } : {}) })},
)
print(answer.choices[0].message.content)`;
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
  if (!about.chat) say("This model has no chat template: it cannot talk.", true);
  draw();
  $("query").focus();
}
begin();
