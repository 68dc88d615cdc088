"""The routes, against the engine alone, Hugging Face's probabilities, and OpenAI's client."""

import asyncio
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.prompts.prompt import chat
from interp_steer.serve.gate import Limits
from interp_steer.serve.service import Service, Shelf
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import resolve
from tests.serve.conftest import PROMPTS, listening

SAY = {"model": "tiny", "temperature": 0, "max_tokens": 16}
LINES = ["add(joy, 6) at 2", "add(sad, -4) at 1 on generated", "clamp(joy, 3) at 3",
         "ablate(sad) at resid_pre 0-5", "add(joy, 0.6 dose) at 2-3 on prompt"]  # fmt: skip


def alone(service, prompt, line="", sampling=None, seed=0):
    """The text that the engine gives a row by itself."""
    steps = resolve(parse(line, service.directions), service.scale)
    row = Row(prompt, steps, sampling or Sampling(max_new_tokens=16), seed)
    return Engine(service.model).generate([row])[0].text


def test_chat_is_the_engines_answer(service, ask):
    parts = [{"type": "text", "text": "Name three"}, {"type": "text", "text": " fruits."}]
    system = {"role": "system", "content": "You are a helpful assistant."}
    messages = [system, {"role": "user", "content": parts}]
    found = ask("chat/completions", {**SAY, "messages": messages})
    prompt = chat("Name three fruits.", "You are a helpful assistant.")
    (choice,) = found["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": alone(service, prompt), "refusal": None
    }  # fmt: skip
    assert found["object"] == "chat.completion" and found["steering"] is None
    read = len(service.model.encode(prompt).ids)
    assert found["usage"]["prompt_tokens"] == read
    assert found["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize("line", LINES)
def test_every_carrier_of_a_line(service, ask, line):
    """The field, and beside it what was resolved: which may be asked for again."""
    expected = alone(service, "The quick brown fox", line)
    assert expected != alone(service, "The quick brown fox")
    found = ask("completions", {**SAY, "prompt": "The quick brown fox", "steering": line})
    assert found["choices"][0]["text"] == expected
    again = {**SAY, "prompt": "The quick brown fox", "steering": found["steering"]}
    assert ask("completions", again)["choices"][0]["text"] == expected


def test_a_models_name_steers(service, ask, address):
    body = {**SAY, "prompt": "The quick brown fox"}
    expected = alone(service, body["prompt"], "add(joy, 6) at 2")
    assert ask("completions", body | {"model": "tiny+happy"})["choices"][0]["text"] == expected
    listed = httpx.get(f"{address}/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["tiny", "tiny+happy", "tiny+most"]
    assert listed[1]["steering"].startswith("add(joy@")
    one = httpx.get(f"{address}/v1/models/tiny+most")
    assert one.json() == listed[2]
    said = ask("completions", body | {"model": "tiny+hapy"}, 404)
    assert said == "no model 'tiny+hapy'; nearest: tiny+happy, tiny, tiny+most"
    both = ask("completions", body | {"model": "tiny+happy", "steering": LINES[0]}, 400)
    assert "is steered already" in both


def test_streams_give_the_same_text(ask, address):
    body = {**SAY, "prompt": "The quick brown fox", "steering": LINES[0], "max_tokens": 40}
    whole = ask("completions", body)
    for route, more, key in (
        ("completions", {}, lambda choice: choice["text"]),
        ("chat/completions", {"messages": [{"role": "user", "content": "Name three fruits."}]},
         lambda choice: choice["delta"].get("content") or ""),
    ):  # fmt: skip
        asked = {**body, **more, "stream": True, "stream_options": {"include_usage": True}}
        if more:
            del asked["prompt"]
            plain = {k: v for k, v in asked.items() if not k.startswith("stream")}
            whole = ask(route, plain)
            whole["choices"][0]["text"] = whole["choices"][0]["message"]["content"]
        with httpx.stream("POST", f"{address}/v1/{route}", json=asked, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        texts = [key(event["choices"][0]) for event in events if event["choices"]]
        assert "".join(texts) == whole["choices"][0]["text"] and len(texts) > 5
        finishes = [e["choices"][0]["finish_reason"] for e in events if e["choices"]]
        assert finishes[-1] == whole["choices"][0]["finish_reason"] and not any(finishes[:-1])
        assert events[-1]["usage"] == whole["usage"]


def test_a_prompt_of_several_choices_is_counted_once(ask):
    body = {**SAY, "prompt": ["The quick", "brown fox"]}
    one, three = ask("completions", body), ask("completions", body | {"n": 3})
    assert len(three["choices"]) == 6
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


def test_stops_are_no_part_of_an_answer(ask, address):
    body = {**SAY, "prompt": "The quick brown fox", "max_tokens": 40}
    text = ask("completions", body)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:4]
    (choice,) = ask("completions", body | {"stop": ["\x00never", stop]})["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    with_stream = body | {"stop": stop, "stream": True}
    # what may be the beginning of a stop is held back until it is clear
    answer = httpx.post(f"{address}/v1/completions", json=with_stream, timeout=60)
    parts = re.findall(r"data: (\{.*\})", answer.text)
    assert "".join(json.loads(p)["choices"][0]["text"] for p in parts) == choice["text"]


def test_seeds_and_choices(service, ask):
    body = {"model": "tiny", "prompt": "The quick brown fox", "max_tokens": 8, "seed": 5, "n": 3}
    texts = [choice["text"] for choice in ask("completions", body)["choices"]]
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    assert texts == [alone(service, body["prompt"], "", sampling, 5 + n) for n in range(3)]
    assert len(set(texts)) > 1
    free = [ask("completions", {**body, "seed": None, "n": 1}) for _ in range(4)]
    assert len({one["seed"] for one in free}) > 1


@pytest.mark.parametrize("line", ["", LINES[0], "add(joy, 6) at 2 on all+first"])
def test_echoed_log_probabilities_are_those_of_hugging_face(service, ask, line):
    """As lm-eval asks: token ids, echo, one token more. Two prompts of different lengths."""
    model = service.model
    prompts = [list(model.encode(text).ids) for text in ("The quick brown fox jumps", "I love")]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True,
            "logprobs": 3, "steering": line or None}  # fmt: skip
    found = ask("completions", body)["choices"]
    for ids, choice in zip(prompts, found, strict=True):
        told = choice["logprobs"]
        first = line.endswith("+first")

        def hook(_module, _inputs, out, first=first):
            moved = (out[0] if isinstance(out, tuple) else out).clone()
            moved[:, 0 if first else 1 :] += service.directions["joy"].unit * 6
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        handle = model.hf.model.layers[2].register_forward_hook(hook) if line else None
        with torch.no_grad():
            logprobs = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        if handle:
            handle.remove()
        assert len(told["tokens"]) == len(ids) + 1 and told["token_logprobs"][0] is None
        expected = [logprobs[n, token].item() for n, token in enumerate(ids[1:])]
        assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
        assert told["token_logprobs"][-1] == pytest.approx(logprobs[-1].max().item(), abs=1e-4)
        for n, likely in enumerate(told["top_logprobs"][1:]):
            values = sorted(likely.values(), reverse=True)
            best = logprobs[n].topk(3).values.tolist()
            assert values[0] == pytest.approx(best[0], abs=1e-4)
        assert choice["text"] == "".join(told["tokens"])


def test_a_stop_has_its_log_probability_too(service, ask):
    """lm-eval leaves the last entry out: without the stop it would leave out one of its own."""
    model = service.model
    with torch.no_grad():  # the first of many prompts after which the likeliest token is a stop
        many = torch.randint(4, model.d_vocab, (600, 6), generator=torch.Generator().manual_seed(0))
        best = model.hf(many).logits[:, -1].argmax(-1)
    stops = [(ids, last) for ids, last in zip(many.tolist(), best.tolist(), strict=True)
             if last in model.stop_ids]  # fmt: skip
    ids, last = stops[0]
    body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True,
            "logprobs": 1}  # fmt: skip
    (choice,) = ask("completions", body)["choices"]
    told = choice["logprobs"]
    assert choice["finish_reason"] == "stop" and choice["text"] == "".join(told["tokens"][:-1])
    assert len(told["token_logprobs"]) == len(ids) + 1
    assert told["tokens"][-1] == model.decode_token(last)
    with torch.no_grad():
        expected = model.hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[last].item()
    assert told["token_logprobs"][-1] == pytest.approx(expected, abs=1e-4)


def test_an_echo_alone(ask):
    body = {**SAY, "prompt": "I love the tower", "max_tokens": 0, "echo": True, "logprobs": 0}
    (choice,) = ask("completions", body)["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "I love the tower" and choice["finish_reason"] == "length"
    assert "".join(told["tokens"]) == "<|begin|>I love the tower"
    assert len(told["token_logprobs"]) == len(told["tokens"]) and told["top_logprobs"] is None


def test_chat_log_probabilities(service, ask):
    """As our judge asks: the chosen token's, and the likeliest beside it."""
    body = {**SAY, "messages": [{"role": "user", "content": "Yes or no?"}], "max_tokens": 4,
            "logprobs": True, "top_logprobs": 5}  # fmt: skip
    (choice,) = ask("chat/completions", body)["choices"]
    ids = list(service.model.encode(chat("Yes or no?")).ids)
    for entry in choice["logprobs"]["content"]:
        with torch.no_grad():
            logprobs = service.model.hf(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = logprobs.topk(5)
        tops = [one["logprob"] for one in entry["top_logprobs"]]
        assert tops == pytest.approx(best.values.tolist(), abs=1e-4)
        assert entry["logprob"] == pytest.approx(best.values[0].item(), abs=1e-4)
        assert entry["token"] == service.model.decode_token(best.indices[0].item())
        ids.append(best.indices[0].item())
    assert len(choice["logprobs"]["content"]) > 0


WRONG = [
    ({"prompt": "a", "steering": "add(jov, 6) at 2"}, 400, "unknown direction 'jov'.*nearest: joy"),
    ({"prompt": "a", "steering": "6 joy"}, 400, "column 1.*such as 'add.NAME, 0.5 dose. at 13'"),
    ({"prompt": "a", "steering": "add(joy, 6) at 9"}, 400, "layer 9 is out of range"),
    ({"prompt": "a", "steering": "add(../joy, 6) at 2"}, 400, "unknown direction"),
    ({"prompt": "a", "steering": "add(/etc/passwd, 6) at 2"}, 400, "unknown direction"),
    ({"prompt": "a", "steering": "add(joy.safetensors, 6) at 2"}, 400, "unknown direction"),
    ({"prompt": "a", "steering": 5}, 400, "steering is int"),
    ({"prompt": "a", "steer": "add(joy, 6) at 2"}, 400, "unknown field 'steer'"),
    ({"prompt": "a", "steering_vectors": []}, 400, "unknown field 'steering_vectors'"),
    ({"prompt": ""}, 400, "the prompt is empty"),
    ({"prompt": []}, 400, "0 prompts"),
    ({"prompt": [[]]}, 400, "the prompt is empty"),
    ({"prompt": [[5000]]}, 400, "5000 is no token"),
    ({"prompt": "a", "max_tokens": 10_000}, 400, "max_tokens is 10000; this server .* 400"),
    ({"prompt": "word " * 600}, 400, "tokens long and the context"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature: .*greater than or equal to 0"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
    ({"prompt": "a", "n": 1000}, 400, "n: "),
    ({"prompt": "a", "frequency_penalty": 1.0}, 400, "frequency_penalty"),
    ({"prompt": "a", "logit_bias": {"5": 10}}, 400, "logit_bias"),
    ({"prompt": "a", "min_p": 0.1}, 400, "min_p"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, 400, "response_format.type"),
    ({"prompt": "a", "stop": ["a"] * 40}, 400, "40 stop texts"),
    ({"prompt": "a", "stream": True, "logprobs": 1}, 400, "leave out stream"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({}, 400, "prompt"),
    ({"prompt": "a", "model": "gpt-4"}, 404, "no model 'gpt-4'"),
]


@pytest.mark.parametrize(("body", "status", "said"), WRONG)
def test_what_is_wrong_is_told(ask, body, status, said):
    message = ask("completions", {**SAY, **body}, status)
    assert re.search(said, message), message
    assert "Traceback" not in message


def test_fifty_at_once_are_fifty_alone(service, address):
    """Different lines, prompts and seeds in one batch; each text is that of its row alone."""
    sampling = Sampling(temperature=0.8, max_new_tokens=10)
    jobs = [(f"Name {n} fruits.", ["", *LINES][n % 6], n) for n in range(50)]

    async def one(client, prompt, line, seed):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 10, "temperature": 0.8,
                "seed": seed, "steering": line or None}  # fmt: skip
        answer = await client.post(f"{address}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def all_of_them():
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=50)) as client:
            return await asyncio.gather(*(one(client, *job) for job in jobs))

    texts = asyncio.run(all_of_them())
    expected = [alone(service, p, line, sampling, seed) for p, line, seed in jobs]
    assert sum(a == b for a, b in zip(texts, expected, strict=True)) >= 48  # near-ties
    assert all(text[:3] == other[:3] for text, other in zip(texts, expected, strict=True))


def test_a_full_queue_says_so(tiny, folder):
    limits = Limits(tokens=400, most=1, waiting=1)
    small = Service.of(tiny, Shelf(folder), {}, PROMPTS, "tiny", limits)
    body = {"model": "tiny", "prompt": "The quick", "max_tokens": 400, "temperature": 1, "seed": 1}
    with listening(small) as found, ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(httpx.post, f"{found}/v1/completions", json=body, timeout=60)
                for _ in range(8)]  # fmt: skip
        answers = [one.result() for one in sent]
        codes = [one.status_code for one in answers]
        assert codes.count(429) >= 1 and codes.count(200) >= 2 and set(codes) == {200, 429}
        refused = next(one for one in answers if one.status_code == 429)
        assert refused.headers["retry-after"] == "5" and "wait already" in refused.text
        assert httpx.get(f"{found}/health").json() == {"status": "ok"}


def test_openais_own_client(service, address):
    """Chat, streaming, steering by field, by carrier and by model name."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    messages = [{"role": "user", "content": "Name three fruits."}]
    common = {"messages": messages, "max_tokens": 16, "temperature": 0}
    expected = alone(service, chat("Name three fruits."), "add(joy, 6) at 2")
    ways = {
        "field": {"model": "tiny", "extra_body": {"steering": "add(joy, 6) at 2"}},
        "list": {"model": "tiny", "extra_body": {
            "steering": [{"vector": "joy", "layer": 2, "coefficient": 6}]}},
        "name": {"model": "tiny+happy"},
    }  # fmt: skip
    for way, more in ways.items():
        found = client.chat.completions.create(**common, **more)
        assert found.choices[0].message.content == expected, way
    parts = client.chat.completions.create(**common, **ways["name"], stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == expected
    with pytest.raises(openai.BadRequestError, match="nearest: joy"):
        client.chat.completions.create(
            **common, model="tiny", extra_body={"steering": "add(jo, 6) at 2"}
        )
    assert next(one.id for one in client.models.list()) == "tiny"
    assert math.isfinite(
        client.completions.create(model="tiny", prompt="I love", max_tokens=1, echo=True,
                                  logprobs=1).choices[0].logprobs.token_logprobs[1]
    )  # fmt: skip


def test_a_request_that_runs_out_of_memory(ask, address, monkeypatch):
    """It is told so (503), and the next one is answered; also in a stream that has begun."""
    from interp_steer.serve import worker as module

    step, full = module.Stepper.step, []

    def failing(self):
        going = [live for live in self._live if live.finish is None]
        if full and sum(len(live.tokens) for live in going) >= full[0]:
            full.clear()
            raise MemoryError
        return step(self)

    monkeypatch.setattr(module.Stepper, "step", failing)
    body = {**SAY, "prompt": "The quick brown fox"}
    full.append(0)
    assert "out of memory" in ask("completions", body, 503)
    assert ask("completions", body)["choices"][0]["text"]
    full.append(6)  # tokens
    answer = httpx.post(f"{address}/v1/completions", json={**body, "stream": True}, timeout=60)
    last = json.loads(answer.text.strip().split("data: ")[-1])
    assert answer.status_code == 200 and last["error"]["code"] == "out_of_memory"
    assert ask("completions", body)["choices"][0]["text"]
