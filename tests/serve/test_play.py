"""The page's routes, against the parts that stand behind them."""

import base64
import json
import re

import httpx
import numpy as np
import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row, Sampling
from interp_steer.prompts.prompt import chat
from interp_steer.serve.readings import shades
from interp_steer.serve.service import Service, Shelf
from interp_steer.steering.direction import Direction, load
from interp_steer.steering.grammar import parse
from tests.serve.conftest import listening

SAY = {"session": "one", "text": "Name three fruits.", "temperature": 0, "max_tokens": 8,
       "repetition_penalty": 1.0}  # fmt: skip


@pytest.fixture
def page(address):
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


def events(answer):
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_page_and_its_parts_come_from_here(page):
    found = page.get("/")
    assert (
        found.status_code == 200
        and "default-src 'none'" in found.headers["content-security-policy"]
    )
    for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css"),
                       ("icon.svg", "image/svg+xml")):  # fmt: skip
        part = page.get(f"/page/{name}")
        assert part.status_code == 200 and part.headers["content-type"].startswith(kind)
        text = part.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text
    assert "://" not in found.text
    for name in ("page.html", "../play.py", "..%2fplay.py", "x"):
        assert page.get(f"/page/{name}").status_code in (400, 404)


def test_what_the_page_knows_of_the_model(page, service):
    about = page.get("/api/about").json()
    assert (about["name"], about["layers"], about["width"]) == ("tiny", 6, 64)
    assert about["medians"] == list(service.scale.medians)
    shown = {one["name"]: one for one in about["directions"]}
    assert shown["joy"]["layer"] == 2 and shown["joy"]["component"] == "resid_post"
    assert about["settings"]["happy"] == "add(joy, 6.0) at 2"


def test_a_talk_is_that_of_the_terminal(page, service):
    line = "add(joy, 6) at 2"
    told = events(page.post("/api/talk", json={**SAY, "line": line, "shade": "joy"}))
    assert told[0]["titles"] == ["unsteered", "add(joy, 6.0) at 2"]
    texts = ["".join(e["text"] for e in told if e.get("column") == n) for n in range(2)]
    sampling = Sampling(max_new_tokens=8)
    prompt = chat("Name three fruits.")
    rows = [Row(prompt, steps, sampling) for steps in ((), parse(line, service.directions))]
    results = Engine(service.model).generate(rows, taps=[service.directions["joy"].site])
    assert texts == [result.text for result in results]
    # the colours: what the direction reads at every token of an answer, after the intervention
    for number, result in enumerate(results):
        (end,) = [e for e in told if e.get("column") == number and e.get("finish")]
        x = next(iter(result.taps.values()))[len(service.model.encode(prompt).ids) :]
        expected = (x @ service.directions["joy"].unit).tolist()
        assert all(any(v == pytest.approx(e, abs=1e-3) for e in expected) for _, v in end["shades"])
        colours = "".join(text for text, _ in end["shades"])
        assert result.text.startswith(colours) and len(colours) > len(result.text) / 2
    assert told[-1] == {"kept": True}
    again = events(page.post("/api/talk", json={**SAY, "text": "And now?", "line": ""}))
    assert again[0]["titles"] == ["unsteered"]
    record = page.get("/api/talk/one").json()
    assert [turn["user"] for turn in record["turns"]] == ["Name three fruits.", "And now?"]
    reset = page.post("/api/talk", json={**SAY, "text": "/reset"}).json()
    assert reset == {"told": "A new conversation.", "line": ""}
    assert page.get("/api/talk/one").json()["turns"] == []
    assert page.get("/api/talk/other").status_code == 400


def test_the_page_writes_no_file(page, tmp_path):
    answer = page.post("/api/talk", json={**SAY, "text": f"/save {tmp_path}/talk.json"})
    assert answer.status_code == 400 and not [*tmp_path.iterdir()]


def test_a_dropped_file_becomes_a_direction(page, service):
    vector = np.arange(1.0, 65)
    import io

    held = io.BytesIO()
    np.save(held, vector)
    data = base64.b64encode(held.getvalue()).decode()
    made = page.post(
        "/api/direction", json={"file": "warm.npy", "data": data, "at": "3", "name": "warm"}
    )
    assert made.json()["name"] == "warm" and made.json()["layer"] == 3
    assert service.directions["warm"] == Direction.of(vector, "blocks.3.hook_resid_post")
    # a stored one of the same name stays, and the new one gets a number
    other = page.post(
        "/api/direction", json={"file": "a.npy", "data": data, "at": "3", "name": "joy"}
    )
    assert other.json()["name"] == "joy-2"
    # the same again is the one that is there, stored or made; at another layer it is another
    stored = base64.b64encode(page.get("/api/direction/joy").content).decode()
    same = {"file": "joy.safetensors", "data": stored, "name": "joy"}
    assert page.post("/api/direction", json=same).json()["name"] == "joy"
    again = {"file": "warm.npy", "data": data, "name": "warm"}
    assert page.post("/api/direction", json={**again, "at": "3"}).json()["name"] == "warm"
    moved = page.post("/api/direction", json={**again, "at": "4"}).json()
    assert moved["name"] == "warm-2" and service.directions["warm"].site.layer == 3
    body = {"model": "tiny", "prompt": "I love", "max_tokens": 2, "steering": "add(warm, 2) at 3"}
    assert page.post("/v1/completions", json=body).status_code == 200
    for wrong, said in (
        ({"file": "a.npy", "data": data}, "give --at"),
        ({"file": "a.exe", "data": data}, "expected a"),
        ({"file": "a.npy", "data": "!"}, "came damaged"), ({"file": "a.npy"}, "expected a"),
        ({"file": "a.npy", "data": data, "at": "9"}, "out of range"), ({}, "expected one of"),
        ({"feature": "/etc/passwd"}, "is no feature"), ({"feature": "../a/b"}, "is no feature"),
        ({"feature": "no/such/1"}, ""), ({"word": "tower tower"}, ""), ({"path": "x"}, "path"),
    ):  # fmt: skip
        answer = page.post("/api/direction", json=wrong)
        message = answer.json()["error"]["message"]
        assert answer.status_code in (400, 500) and said in message, message
        assert "/tmp" not in message


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_curve_is_the_engines_kl(page, service, system):
    """On the unsteered side of the talk: its system prompt and what was said before."""
    name = f"curve {system}"
    say = {**SAY, "session": name, "system": system}
    events(page.post("/api/talk", json=say))
    events(page.post("/api/talk", json={**say, "text": "And now?", "turns": 1}))
    lines = ["add(joy, 2) at 2", "add(joy, 8) at 2"]
    found = page.post("/api/curve", json={"session": name, "lines": lines}).json()
    first, last = page.get(f"/api/talk/{name}").json()["turns"]
    begin = () if system is None else (("system", system),)
    prompt = (
        *begin,
        ("user", first["user"]),
        ("assistant", first["unsteered"]),
        ("user", "And now?"),
    )
    model, said = service.model, last["unsteered"]
    ids = [*model.encode(prompt).ids, *model.encode_after(prompt, said)]
    first = len(model.encode(prompt).ids) - 1
    for line, told in zip(lines, found, strict=True):
        length = float(line.split(", ")[1].split(")")[0])

        def hook(_module, _inputs, out, length=length):
            moved = (out[0] if isinstance(out, tuple) else out).clone()
            moved[:, 1:] += service.directions["joy"].unit * length
            return (moved, *out[1:]) if isinstance(out, tuple) else moved

        with torch.no_grad():
            plain = model.hf(torch.tensor([ids])).logits[0, first:].log_softmax(-1)
            handle = model.hf.model.layers[2].register_forward_hook(hook)
            moved = model.hf(torch.tensor([ids])).logits[0, first:].log_softmax(-1)
            handle.remove()
        expected = (plain.exp() * (plain - moved)).sum(-1).mean().item()
        assert told["kl"] == pytest.approx(expected, rel=1e-3)
    wrong = page.post("/api/curve", json={"session": "none", "lines": lines})
    assert wrong.status_code == 400 and "ask something first" in wrong.text


def test_a_talk_that_is_gone_is_told(page):
    """After a restart or under another system prompt the page still shows what was said."""
    say = {**SAY, "session": "gone"}
    told = events(page.post("/api/talk", json={**say, "line": "add(joy, 0.2 dose) at 2"}))
    assert told[0]["asked"] == [["user", "Name three fruits."]] and not told[0]["notes"]
    assert re.fullmatch(r"add\(joy, [\d.]+\) at 2", told[0]["steer"])
    again = {**say, "text": "And now?", "turns": 1}
    assert not events(page.post("/api/talk", json=again))[0]["notes"]
    other = events(page.post("/api/talk", json={**again, "turns": 2, "system": "Be brief."}))
    assert "does not read what stands above" in other[0]["notes"][0]
    assert other[0]["asked"] == [["system", "Be brief."], ["user", "And now?"]]
    # the page counts on from what the server has, so that the next question is no new talk again
    assert other[0]["turns"] == 0 and other[-1] == {"kept": True}
    third = {**again, "turns": other[0]["turns"] + 1, "system": "Be brief."}
    assert not events(page.post("/api/talk", json=third))[0]["notes"]


def test_steer_changes_the_line_of_the_page(page):
    answer = page.post("/api/talk", json={**SAY, "text": "/steer add(joy, 0.3 dose) at 3"}).json()
    assert answer["line"] == "add(joy, 0.3 dose) at 3" and answer["told"].startswith("Steered by")
    assert page.post("/api/talk", json={**SAY, "text": "/steer off"}).json()["line"] == ""


def test_a_direction_is_saved_from_the_page(page, service, tmp_path):
    file = tmp_path / "joy.safetensors"
    answer = page.get("/api/direction/joy")
    assert 'filename="joy.safetensors"' in answer.headers["content-disposition"]
    file.write_bytes(answer.content)
    assert load(file) == service.directions["joy"]
    for wrong in ("nobody", "..%2fjoy", "%2e%2e", "joy.safetensors"):
        assert page.get(f"/api/direction/{wrong}").status_code in (400, 404, 405)


def test_no_folder_is_told(tiny, tmp_path):
    made = Service.of(tiny, Shelf(tmp_path), {}, ["The quick"], "tiny")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with listening(made) as address, httpx.Client(base_url=address) as client:
        (shown,) = client.get("/api/about").json()["directions"]
        said = client.get("/api/direction/broken").text
    for text in (shown["error"], said):
        assert "broken.safetensors" in text and str(tmp_path) not in text


def test_a_base_model_continues_texts_on_the_page(without_template, folder):
    made = Service.of(without_template, Shelf(folder), {}, ["The quick"], "base")
    with listening(made) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/api/about").json()["chat"] is False
        say = {**SAY, "text": "The quick brown", "line": "add(joy, 6) at 2", "shade": "joy"}
        told = events(client.post("/api/talk", json=say))
        lines = {"session": "one", "lines": ["add(joy, 2) at 2"]}
        assert client.post("/api/curve", json=lines).json()[0]["kl"] > 0
    assert told[0]["asked"] == "The quick brown"
    text = "".join(event["text"] for event in told if event.get("column") == 0)
    (expected,) = Engine(without_template).generate(
        [Row("The quick brown", (), Sampling(max_new_tokens=8))]
    )
    assert text == expected.text


def test_colours_keep_characters_whole(tiny):
    """A character of several tokens is one piece, so that the pieces are the text."""
    ids = tuple(tiny.token_ids("a \N{FOX FACE} na\u00efve \u6771\u4eac fox"))
    direction = Direction.of(np.ones(64), "blocks.2.hook_resid_post")
    prompt = "The quick"
    first = len(tiny.encode(prompt).ids)
    x = torch.randn(first + len(ids), 64)
    result = Result(Row(prompt), ids, "", "length", taps={direction.site: x})
    pieces = shades(tiny, result, direction)
    assert "".join(text for text, _ in pieces) == tiny.decode(ids, prompt)
    assert "\N{FOX FACE}" in "".join(text for text, _ in pieces) and len(pieces) < len(ids)
    values = (x @ direction.unit)[first:].tolist()
    assert all(any(value == pytest.approx(v, abs=1e-4) for v in values) for _, value in pieces)


@pytest.mark.parametrize("body", [
    {}, {"session": "a"}, {**SAY, "text": ""}, {**SAY, "extra": 1}, {**SAY, "max_tokens": 0},
    {**SAY, "line": "add(joy, 3) at 9"}, {**SAY, "shade": "nobody"}, {**SAY, "temperature": -1},
])  # fmt: skip
def test_what_is_wrong_is_told(page, body):
    answer = page.post("/api/talk", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
