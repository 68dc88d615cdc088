"""The client against the contract; the numbers are the contract's acceptance points."""

import json
import logging
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from interp_steer.errors import RequestError, SteerError
from interp_steer.labels import Client
from interp_steer.labels.http import BadAnswer, NotFound, RateLimited, Unreachable
from interp_steer.labels.label import Source, State

from .server import HTML, Neuronpedia, Reply, explanation, limited, neuron

SOURCE = Source("llama3.1-8b", "15-llamascope-res-32k")
NAMES = (SOURCE.model, SOURCE.name)
KEY = "sk-np-secret"


def put(server: Neuronpedia, index: int, *said: dict) -> None:
    server.neurons[(*NAMES, str(index))] = neuron(*NAMES, index, *said)


def test_01_a_feature_with_a_label_without_one_and_in_any_script(server, client):
    put(server, 10, explanation("a", ' "jardinería 園芸 🌱"\n'))
    put(server, 11)
    found = client.feature(SOURCE, 10)
    assert [label.label for label in found.labels] == ["jardinería 園芸 🌱"]
    assert (found.density, found.max_activation) == (0.0073, 6.5)
    assert found.labels[0].density == 0.0073
    assert client.feature(f"{SOURCE}/11").state is State.UNLABELLED


def test_01_a_missing_feature_and_a_missing_source_are_told_apart(server, client):
    put(server, 10)
    with pytest.raises(NotFound, match="has no feature 12"):
        client.feature(SOURCE, 12)
    with pytest.raises(NotFound, match=r"no source llama3.1-8b/15-llamascope-res-32\b.*nearest"):
        client.feature("llama3.1-8b/15-llamascope-res-32", 12)
    assert len(server.log) == 2  # neither is worth another try


def test_02_the_best_label_is_not_the_first(server, client):
    put(
        server,
        10,
        explanation("a", "unscored"),  # the server sorts missing scores to the top
        explanation("c", "good", scores=[{"value": 0.3}, {"value": 0.8}]),
        explanation("b", "worse", scores=[{"value": 0.4}]),
        explanation("d", "other method", typeName="oai_token-act-pair", scores=[{"value": 1.0}]),
    )
    said = [label.label for label in client.feature(SOURCE, 10).labels]
    assert said == ["good", "worse", "unscored", "other method"]


def result(index: int, text: str = "dogs", cosine: float = 0.5) -> dict:
    said = explanation("x", text)
    return {"modelId": NAMES[0], "layer": NAMES[1], "index": str(index),
            "cosine_similarity": cosine, "neuron": neuron(*NAMES, index), **said}  # fmt: skip


def test_03_search_goes_on_after_a_short_page(server, client):
    first = [result(i) for i in range(18)] + [None, None]  # 18 rows and hasMore: false
    server.results["search-all"] = first + [result(i) for i in range(20, 40)]
    found = client.search("dogs", limit=50)
    assert [label.index for label in found] == [*range(18), *range(20, 40)]
    offsets = [body["offset"] for *_, body in server.log]
    assert offsets == [0, 20, 40]  # in steps of the page, and the empty page is the end


def test_03_a_full_last_page_and_a_limit(server, client):
    server.results["search-all"] = [result(i) for i in range(20)]
    assert len(client.search("dogs", limit=100)) == 20
    server.log.clear()
    assert len(client.search("dogs", limit=7)) == 7
    assert len(server.log) == 1


def test_03_the_search_ends_on_a_server_that_ignores_the_offset(server, client):
    class Same(list):
        def __getitem__(self, _):
            return [result(1)] * 20

    server.results["search-all"] = Same()
    assert len(client.search("dogs", limit=50)) == 1
    assert len(server.log) < 20


def test_04_a_feature_with_two_matching_explanations_comes_once(server, client):
    server.results["search-model"] = [result(1, "dogs"), result(1, "puppies"), result(2, "hounds")]
    found = client.search("dogs", model=NAMES[0])
    assert [(label.index, label.label) for label in found] == [(1, "dogs"), (2, "hounds")]
    assert found[0].score == 0.5 and found[0].density == 0.0073


@pytest.mark.parametrize("query", ["", "ab", "犬", "犬猫"])
def test_05_a_short_query_is_not_sent(server, client, query):
    with pytest.raises(RequestError, match="at least 3 characters"):
        client.search(query)
    assert not server.log


def test_06_a_rate_limit_fails_at_once_with_its_reset(server, client):
    server.always["/api/explanation"] = limited()
    before = datetime.now(UTC)
    with pytest.raises(RateLimited) as caught:
        client.search("dogs")
    assert len(server.log) == 1
    assert caught.value.limit == 200 and caught.value.window == 3600
    hour = (before + timedelta(hours=1)).replace(minute=0, second=0, microsecond=0)
    # the full hour, and two of the eighteen seconds in which one request comes back
    assert timedelta(0) <= caught.value.reset - hour < timedelta(seconds=40)
    assert f"{caught.value.reset:%H:%M:%S} UTC" in str(caught.value)
    with pytest.raises(RateLimited):
        client.search("cats")
    assert len(server.log) == 1  # it would be refused, so it is not sent
    put(server, 1)
    assert client.feature(SOURCE, 1)  # the other limits are other limits


def test_06_wait_sleeps_until_the_reset_and_slows_down_before_the_wall(server):
    slept: list[float] = []
    patient = Client(wait=True, sleep=slept.append)
    server.fault("/api/explanation", limited())
    server.results["search-all"] = [result(1)]
    assert patient.search("dogs", limit=1)
    assert len(slept) == 1 and 0 < slept[0] <= 3640
    server.remaining = 5
    patient.search("dogs", limit=1)
    assert len(slept) == 1
    patient.search("dogs", limit=1)
    assert 17 < slept[1] <= 18  # 200 an hour is one in 18 s


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_06_retry_after_is_kept(server, form):
    client = Client()
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    server.fault("/api/features", limited(**{"Retry-After": "1" if form == "seconds" else when}))
    put(server, 1)
    start = time.monotonic()
    assert client.features([(SOURCE, 1)])
    assert 0.9 < time.monotonic() - start < 5
    assert len(server.log) == 2


def test_07_unknown_error_on_a_bad_source_is_explained_after_few_tries(server, client):
    put(server, 1)
    with pytest.raises(NotFound, match=r"no source \S+/15-llamascope-res-33k; nearest"):
        client.search("dogs", sources=[Source(NAMES[0], "15-llamascope-res-33k")])
    assert len(server.asked("/api/explanation")) == 2
    server.always["/api/explanation"] = Reply(500, b'{"message": "Unknown Error"}')
    with pytest.raises(Unreachable, match="Unknown Error"):
        client.search("dogs", sources=[SOURCE])  # this one exists: the server is in trouble
    with pytest.raises(Unreachable, match="no release 'nope'"):
        client.search("dogs", release="nope")
    with pytest.raises(NotFound, match="no model 'nope'"):
        server.always.clear()
        client.search("dogs", model="nope")


@pytest.mark.parametrize(
    ("status", "body", "tries"),
    [(200, HTML, 1), (404, HTML, 1), (503, HTML, 4), (200, b'{"a": [', 1), (200, b"", 1),
     (200, b"[" * 100_000, 1), (200, b"[]", 1), (200, b"null", 1), (403, b"no", 1),
     (405, b"", 1)],
)  # fmt: skip
def test_08_an_answer_that_is_not_one_is_a_typed_error(server, status, body, tries):
    server.always["/api/feature/"] = Reply(status, body)
    if not body and status == 200:
        server.always["/api/feature/"] = Reply(200, b" ")
    client = Client(sleep=lambda _: None)
    with pytest.raises((BadAnswer, Unreachable)) as caught:
        client.feature(SOURCE, 1)
    assert server.url in str(caught.value) and "<" not in str(caught.value)
    assert len(server.log) == tries


@pytest.mark.parametrize(
    "fault", [Reply(drop=True), Reply(cut=100), Reply(pause=1.5), Reply(drip=0.4), Reply(502)],
    ids=["drop", "short", "slow", "drip", "502"],
)  # fmt: skip
def test_09_a_connection_that_fails_is_tried_again_in_time(server, client, fault):
    put(server, 1, explanation("a", "dogs"))
    server.fault("/api/feature/", fault)
    assert client.feature(SOURCE, 1).labels
    assert len(server.log) == 2


def test_09_a_connection_that_keeps_failing_is_given_up(server):
    server.always["/api/feature/"] = Reply(drop=True)
    start = time.monotonic()
    with pytest.raises(Unreachable, match="4 tries"):
        Client(sleep=lambda _: None).feature(SOURCE, 1)
    server.always["/api/feature/"] = Reply(pause=9)
    with pytest.raises(Unreachable, match="does not answer"):
        Client(patience=1.0).feature(SOURCE, 1)
    assert time.monotonic() - start < 3
    with pytest.raises(Unreachable, match="refused"):
        Client("http://127.0.0.1:9", sleep=lambda _: None).feature(SOURCE, 1)


def test_11_offline_opens_no_socket(server, monkeypatch):
    def no(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no)
    monkeypatch.setattr(socket, "create_connection", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    client = Client(offline=True)
    for ask in (
        lambda: client.feature(SOURCE, 1),
        lambda: client.features([(SOURCE, 1)]),
        lambda: client.search("dogs"),
        lambda: client.exports(SOURCE),
    ):
        with pytest.raises(RequestError, match="offline"):
            ask()


def keys(server: Neuronpedia) -> list[str | None]:
    sent = [{k.lower(): v for k, v in headers.items()} for _, _, headers, _ in server.log]
    return [headers.get("x-api-key") for headers in sent]


def test_12_the_key_goes_to_the_configured_host_alone(server, monkeypatch, caplog, capfd):
    other = Neuronpedia()
    try:
        monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
        monkeypatch.setenv("NEURONPEDIA_EXPORTS_URL", other.url)
        caplog.set_level(logging.DEBUG)
        client = Client()
        put(server, 1)
        client.feature(SOURCE, 1)
        assert keys(server) == [KEY]
        client.exports(SOURCE)
        other.put(f"v1/{SOURCE}/explanations/batch-0.jsonl.gz", [])
        client.download(client.exports(SOURCE)[0])
        assert keys(other) == [None] * 3
        # a redirect within the host keeps it (and the method and body); one to another loses it
        path = f"/api/feature/{SOURCE}/1"
        server.fault(path, Reply(308, headers={"Location": path + "?again"}))
        client.feature(SOURCE, 1)
        assert keys(server) == [KEY] * 3
        other.neurons = server.neurons
        server.fault("/api/features", Reply(308, headers={"Location": other.url + "/api/features"}))
        assert client.features([(SOURCE, 1)])
        assert keys(other) == [None] * 4 and other.log[-1][0] == "POST"
        server.always["/"] = Reply(400, json.dumps({"message": f"bad key {KEY}"}).encode())
        with pytest.raises(SteerError) as caught:
            client.feature(SOURCE, 1)
        assert KEY not in str(caught.value) and KEY not in repr(vars(client))
        assert KEY not in caplog.text + "".join(capfd.readouterr())
    finally:
        other.close()


def test_12_a_key_that_cannot_be_one_is_not_repeated():
    with pytest.raises(RequestError) as caught:
        Client(key=KEY + "\nx: y")
    assert KEY not in str(caught.value)


def test_14_an_index_is_text_there_and_a_number_here(server, client):
    put(server, 10, explanation("a", "dogs"))
    server.results["search"] = [result(10)]
    found = client.search("dogs", sources=[SOURCE])[0]
    assert found.index == 10 and found.id == f"{SOURCE}/10"
    assert client.feature(found.id).index == 10
    assert client.features([(SOURCE, 10)])[SOURCE, 10].index == 10
    for wrong in ("010", "1.0", "-1", "abc", "²"):
        with pytest.raises(RequestError, match="is not a feature"):
            client.feature(f"{SOURCE}/{wrong}")


def test_15_many_features_are_matched_by_name(server, client):
    other = Source(NAMES[0], "16-llamascope-res-32k")
    hidden = neuron(NAMES[0], "15-private", 3, explanation("p", "secret"))
    put(server, 5, explanation("a", "five"))
    put(server, 3)
    server.neurons[other.model, other.name, "4"] = neuron(other.model, other.name, 4)
    server.neurons["m", "hidden", "3"] = hidden
    real = server.api

    def leaky(method: str, path: str, body: object) -> tuple[int, object]:
        status, data = real(method, path, body)
        return status, [*data, hidden] if path == "/api/features" else data  # type: ignore[misc]

    server.api = leaky  # rows of private sources come along
    asked = [(SOURCE, 5), (other, 4), (SOURCE, 5), (SOURCE, 99), (SOURCE, 3)]
    found = client.features(asked)
    assert set(found) == {(SOURCE, 5), (other, 4), (SOURCE, 3)}
    assert found[SOURCE, 5].labels[0].label == "five"
    assert found[SOURCE, 3].state is State.UNLABELLED
    body = server.log[0][3]
    assert isinstance(body, list) and body[0]["maxActsToReturn"] == 1 and len(body) == 4
    assert client.features([]) == {} and len(server.log) == 1  # an empty list would be a 500
    client.features([(SOURCE, i) for i in range(1200)])
    assert len(server.log) == 4  # 500 at a time


def test_an_address_that_is_none_is_the_users_mistake(monkeypatch):
    with pytest.raises(RequestError, match="not an address"):
        Client("neuronpedia.org")
    with pytest.raises(RequestError, match="not an address"):
        Client("https://host:port")
    with pytest.raises(RequestError, match="is not a source"):
        Client().feature("../../etc/passwd", 1)
