"""A judge on loopback that is slow, busy, strict, silent or gone: nothing is 0 for a failure."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from interp_steer.errors import RequestError, RunError
from interp_steer.prompts.prompt import chat
from interp_steer.tune import endpoint as judging
from interp_steer.tune.endpoint import EXTRAS, Endpoint, WeightedEndpoint
from interp_steer.tune.judge import ANCHORS, LocalJudge, Said, expected, judge
from interp_steer.tune.ratings import KINDS, Asked, Rubrics, harmonic

ASKED = [Asked(f"Question {n}?", f"Answer {n} about rain.", "rain") for n in range(12)]


class Loopback:
    """Answers `Rating: [[2]]`; `replies` decides otherwise, given the prompt and the body."""

    def __init__(self):
        self.bodies, self.headers, self.lock = [], [], threading.Lock()
        self.busy = self.most = 0
        self.reply = lambda prompt, body, number: {}
        world = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): ...

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with world.lock:
                    world.bodies.append(body)
                    world.headers.append(dict(self.headers))
                    number = len(world.bodies)
                    world.busy += 1
                    world.most = max(world.most, world.busy)
                told = world.reply(body["messages"][0]["content"], body, number)
                time.sleep(told.get("pause", 0))
                with world.lock:
                    world.busy -= 1
                if told.get("drop"):
                    self.close_connection = True
                    return
                message = {"content": told.get("text", "Rating: [[2]]")} | told.get("message", {})
                choice = {"message": message, "finish_reason": told.get("end", "stop")}
                data = told.get("body", {"model": "judge-1", "choices": [choice]})
                raw = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(told.get("status", 200))
                for name, value in told.get("headers", {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server():
    world = Loopback()
    yield world
    world.http.shutdown()
    world.http.server_close()


def endpoint(server, **more):
    return Endpoint(server.url, "judge", "secret", **{"sleep": lambda _: None, **more})


def test_every_answer_is_rated_three_times_and_asked_once(server, tmp_path):
    def reply(prompt, body, number):
        if "Question 3?" in prompt:
            return {"text": "Rating: [[1]]"}
        return {"text": '{"rating": 0}' if "how well it reads" in prompt else "Rating: [[2]]"}

    server.reply = reply
    found = judge(endpoint(server), ASKED, tmp_path)
    table = found.table
    assert len(table) == 12 and (table["why"] == "").all()
    assert table["instruction"].tolist() == [2, 2, 2, 1, *[2] * 8] and (table["fluency"] == 0).all()
    assert (table["score"] == 0).all()
    assert found.noise[0] == 0 and found.noise[1] == 3  # one of twelve, twice
    asked = len(server.bodies)
    assert asked == 3 * (12 + len(ANCHORS) + 1)
    body = server.bodies[0]
    assert body["temperature"] == 0 and body["model"] == "judge" and len(body["messages"]) == 1
    assert {h["Authorization"] for h in server.headers} == {"Bearer secret"}
    again = judge(endpoint(server), ASKED, tmp_path)
    assert len(server.bodies) == asked and again.table.equals(table)
    more = [*ASKED, Asked("New?", "New.", "rain")]
    judge(endpoint(server), more, tmp_path)
    assert len(server.bodies) == asked + 3


def test_anchors_say_whether_the_judge_can_judge(server, tmp_path):
    known = {(one.answer, kind): k for one, ratings in ANCHORS for kind, k in ratings.items()}

    def right(prompt, body, number):
        kind = next(
            k
            for k, w in zip(
                KINDS,
                ("a concept is part", "about what was asked", "how well it reads"),
                strict=True,
            )
            if w in prompt
        )
        hits = [v for (answer, k), v in known.items() if answer in prompt and k == kind]
        return {"text": f"Rating: [[{hits[0] if hits else 1}]]"}

    server.reply = right
    assert judge(endpoint(server), ASKED, tmp_path / "a").right == (1.0, len(known))
    server.reply = lambda *_: {}
    share, count = judge(endpoint(server), ASKED, tmp_path / "b").right
    assert count == len(known) and share == sum(v == 2 for v in known.values()) / len(known)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"text": "I would say so."}, "unreadable"),
        ({"text": "Rating: [[1]] Rating: [[2]]"}, "unreadable"),
        ({"text": "Rating: [[7]]"}, "unreadable"),
        ({"text": ""}, "an empty answer"),
        ({"text": "", "message": {"reasoning": "hm"}}, "its tokens ran out"),
        ({"text": "Rating", "end": "length"}, "its tokens ran out"),
        ({"text": "", "end": "content_filter"}, "content filter"),
        ({"body": b"<html>"}, "no chat completion"),
        ({"body": {"choices": []}}, "no chat completion"),
        ({"status": 422, "body": {"error": "too long"}}, "status 422"),
    ],
)
def test_a_failure_is_missing_and_asked_again_the_next_time(server, tmp_path, bad, why):
    server.reply = lambda prompt, *_: bad if "Answer 5" in prompt else {}
    found = judge(endpoint(server), ASKED, tmp_path, again=0).table
    assert found["score"].isna().tolist() == [n == 5 for n in range(12)]
    assert found["concept"].isna().tolist() == [n == 5 for n in range(12)]
    assert why in found["why"][5] and (found["score"].drop(5) == 2).all()
    before = len(server.bodies)
    server.reply = lambda *_: {}
    assert judge(endpoint(server), ASKED, tmp_path, again=0).table["score"].tolist() == [2] * 12
    assert len(server.bodies) == before + 3


def test_tokens_that_run_out_are_given_once_more(server, tmp_path):
    def reply(prompt, body, number):
        return {} if body["max_tokens"] > 100 else {"text": "", "message": {"reasoning": "hm"}}

    server.reply = reply
    assert (judge(endpoint(server), ASKED[:2], tmp_path, again=0).table["score"] == 2).all()


def test_what_a_server_does_not_know_is_left_out(server, tmp_path):
    def strict(prompt, body, number):
        for name in EXTRAS:
            if name in body:
                return {"status": 400, "body": {"error": {"message": f"unknown field {name}"}}}
        return {}

    server.reply = strict
    by = endpoint(server)
    assert (judge(by, ASKED, tmp_path, again=0).table["score"] == 2).all()
    refused = [body for body in server.bodies if set(body) & set(EXTRAS)]
    assert len(refused) == 3 and by.extras == ()


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_a_busy_server_is_asked_again(server, tmp_path, status):
    seen = set()

    def reply(prompt, body, number):
        if prompt in seen:
            return {}
        seen.add(prompt)
        after = {"Retry-After": "0"} if status == 429 and number % 2 else {}
        return {"status": status, "headers": after, "body": {"error": "busy"}}

    server.reply = reply
    assert (judge(endpoint(server), ASKED, tmp_path, again=0).table["score"] == 2).all()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_wrong_key_model_or_address_ends_before_the_run(server, tmp_path, status):
    server.reply = lambda *_: {"status": status, "body": {"error": {"message": "no secret here"}}}
    with pytest.raises(RequestError, match=f"says {status}") as told:
        judge(endpoint(server), ASKED, tmp_path)
    assert "secret" not in str(told.value) and len(server.bodies) <= 1 + len(EXTRAS)


def test_a_server_that_dies_leaves_what_it_said(server, tmp_path):
    server.reply = lambda prompt, body, number: {"drop": True} if number > 20 else {}
    by = endpoint(server, workers=2, patience=1.0)
    with pytest.raises(RunError, match="ratings are not there, what was said is kept"):
        judge(by, ASKED, tmp_path, again=0)
    before = len(server.bodies)
    server.reply = lambda *_: {}
    assert (judge(endpoint(server), ASKED, tmp_path, again=0).table["score"] == 2).all()
    assert len(server.bodies) - before <= 3 * (12 + len(ANCHORS)) - 15


def test_so_many_requests_at_a_time_and_no_more(server, tmp_path):
    server.reply = lambda *_: {"pause": 0.02}
    judge(endpoint(server, workers=4), ASKED, tmp_path, again=0)
    assert 2 <= server.most <= 4


def test_another_judge_or_rubric_asks_anew(server, tmp_path):
    judge(endpoint(server), ASKED[:1], tmp_path / "a", again=0)
    with pytest.raises(RequestError, match="another model"):
        judge(Endpoint(server.url, "other"), ASKED[:1], tmp_path / "a", again=0)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", ""])
def test_an_address_that_is_none(url):
    with pytest.raises(RequestError, match="no address of a judge"):
        Endpoint(url, "m")


def test_probabilities_of_ratings():
    assert expected({0: 0.1, 1: 0.2, 2: 0.3}) == pytest.approx(0.8 / 0.6)
    assert expected({0: 0.0, 1: 0.0, 2: 1.0}) == 2
    few = expected({0: 0.04, 1: 0.1, 2: 0.1})
    assert isinstance(few, Said) and few.text is None and "0.24" in few.why


def test_a_local_model_rates_by_its_probabilities(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "LEAST", 0.0)  # a random model believes in no rating
    short = Rubrics({kind: f"{kind}? {{concept}} {{question}} {{answer}}" for kind in KINDS})
    found = judge(LocalJudge(tiny), ASKED[:2], tmp_path, rubrics=short, again=0).table
    for n, one in enumerate(ASKED[:2]):
        for kind in KINDS:
            ids = tiny.encode(chat(short.put(kind, one), answer="Rating: [[")).ids
            with torch.no_grad():
                p = tiny.hf(torch.tensor([ids])).logits[0, -1].softmax(-1)
            some = [p[tiny.tokenizer.encode(str(k), add_special_tokens=False)[0]] for k in range(3)]
            mean = (some[1] + 2 * some[2]) / sum(some)
            assert found[kind][n] == pytest.approx(mean.item(), abs=1e-3)
        ratings = tuple(found[kind][n] for kind in KINDS)
        assert found["score"][n] == pytest.approx(harmonic(ratings))
    assert np.isfinite(found["score"]).all()


def probabilities(**chances):
    """An answer with the likeliest tokens of its first place."""
    likely = [{"token": token, "logprob": math.log(p)} for token, p in chances.items()]
    place = {"token": likely[0]["token"], "logprob": likely[0]["logprob"], "top_logprobs": likely}
    choice = {"message": {"content": "7"}, "finish_reason": "length",
              "logprobs": {"content": [place]}}  # fmt: skip
    return {"body": {"model": "judge-1", "choices": [choice]}}


def test_a_server_is_read_by_its_probabilities(server, tmp_path):
    """By hand: (6 x 0.3 + 9 x 0.3) / 0.6 of 9, on the scale to 2; what is no number is left out."""
    server.reply = lambda *_: probabilities(**{"6": 0.3, " 9": 0.3, "The": 0.2, "12": 0.1})
    by = WeightedEndpoint(server.url, "m", top=9)
    found = judge(by, ASKED[:3], tmp_path, again=0)
    assert list(found.table["concept"]) == pytest.approx([2 * 7.5 / 9] * 3)
    assert list(found.table["score"]) == pytest.approx([2 * 7.5 / 9] * 3)
    body = server.bodies[-1]
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert "from 0 to 9" in body["messages"][0]["content"] and "response_format" not in body
    count = len(server.bodies)
    judge(by, ASKED[:3], tmp_path, again=0)
    assert len(server.bodies) == count, "asked once"


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (probabilities(**{"Sorry": 0.9, "3": 0.05}), "probability of 0.05"),
        ({"text": "7"}, "no probabilities"),
        ({"body": b"nonsense"}, "no probabilities"),
    ],
)
def test_a_server_without_probabilities_has_rated_nothing(server, tmp_path, reply, why):
    server.reply = lambda *_: reply
    found = judge(WeightedEndpoint(server.url, "m", top=100), ASKED[:2], tmp_path, again=0)
    assert found.table["score"].isna().all() and why in found.table["why"].iloc[0]
    with pytest.raises(RequestError, match="expected up to 9"):
        WeightedEndpoint(server.url, "m", top=0)
