"""Sync and import: acceptance points 10 and 13, and what a killed or failing sync leaves."""

import gzip
import json
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
import zlib

import pytest

from interp_steer.errors import RequestError, RunError
from interp_steer.labels import Client, coverage, fetch, import_files, registry, show, sync
from interp_steer.labels.label import Source, State
from interp_steer.labels.store import Store, default_path

from .server import HTML, Neuronpedia, Reply, explanation, exported, neuron

NAME = "llama3.1-8b/15-llamascope-res-32k"
SOURCE = Source.parse(NAME)
FOLDER = f"v1/{NAME}/explanations/"


def rows() -> list[tuple]:
    """Everything in the store that does not depend on when and in what order it came."""
    db = sqlite3.connect(default_path(), isolation_level=None)
    db.execute("INSERT INTO fts (fts, rank) VALUES ('integrity-check', 1)")
    found = db.execute(
        "SELECT s.model, s.name, s.release, s.sae_id, e.feature, e.best, o.key, o.etag, x.name, "
        "x.type, e.score, e.uid, e.text FROM explanation e JOIN source s ON s.id = e.source_id "
        "JOIN object o ON o.id = e.object_id JOIN explainer x ON x.id = e.explainer_id "
        "ORDER BY s.model, s.name, e.feature, e.uid, o.key"
    ).fetchall()
    db.close()
    return found


@pytest.fixture
def filled(server: Neuronpedia) -> Neuronpedia:
    """Twelve files in three dialects, rows in the order of their index as text."""
    order = sorted(range(120), key=str)
    for batch in range(12):
        part = order[batch * 10 : batch * 10 + 10]
        made = [exported(NAME, i, f'  "label {i}"\n', batch % 3 + 1) for i in part]
        server.put(f"{FOLDER}batch-{batch}.jsonl.gz", made)
    return server


def test_10_a_list_in_pages_and_three_dialects(filled):
    filled.max_keys = 3
    found = sync(NAME)[0]
    assert (found.labels, found.labelled, found.unlabelled, found.batches) == (120, 120, 0, 12)
    assert found.complete_at and not found.missing
    assert found.source.release == "llama_scope_lxr_8x" and found.source.sae_id == "l15r_8x"
    assert found.explainers == ("unknown", "gemini-2.0-flash np_max-act-logits")
    assert len(filled.asked("/?")) == 4
    keys = [file.key for file in Client().exports(SOURCE)]
    assert keys[:3] == [f"explanations/batch-{i}.jsonl.gz" for i in range(3)]  # 2 before 10
    label = show(f"{NAME}/1").labels[0]
    assert (label.label, label.explainer, label.uid) == ("label 1", "gemini-2.0-flash", "e15x1")
    assert b"0.2]" not in default_path().read_bytes()  # embeddings are dropped


def test_10_a_second_sync_fetches_no_body(filled):
    sync(NAME)
    before, sent = rows(), filled.sent
    filled.log.clear()
    sync(NAME)
    assert filled.asked("/v1/") == []  # the list's ETags are enough
    filled.count_keys = filled.list_sizes = False  # which are not needed
    filled.list_etags = False  # and where there are none, each file answers 304
    assert not sync(NAME)[0].missing
    assert len(filled.asked("/v1/")) == 12
    assert filled.sent - sent < 12_000 and rows() == before


def test_10_a_changed_file_replaces_its_rows_and_a_withdrawn_one_goes(filled):
    sync(NAME)
    filled.put(f"{FOLDER}batch-0.jsonl.gz", [exported(NAME, 0, "new"), exported(NAME, 500, "far")])
    del filled.files[f"{FOLDER}batch-11.jsonl.gz"]
    filled.log.clear()
    found = sync(NAME)[0]
    assert len(filled.asked("/v1/")) == 1
    assert (found.labels, found.batches) == (120 - 10 - 10 + 2, 11)
    assert show(f"{NAME}/0").labels[0].label == "new"
    rows()  # the full-text index still agrees with the rows


def ended(lines: bytes) -> bytes:
    """A gzip file that stops after its third line, with every byte until there in it."""
    packer = zlib.compressobj(wbits=31)
    first = b"".join(lines.splitlines(keepends=True)[:3])
    return packer.compress(first) + packer.flush(zlib.Z_SYNC_FLUSH)


@pytest.mark.parametrize(
    "damage", ["truncated", "ended", "checksum", "line", "number", "stranger", "html"]
)
def test_10_a_damaged_file_is_tried_again_then_reported_and_never_half_stored(filled, damage):
    key = f"{FOLDER}batch-4.jsonl.gz"
    good = filled.files[key]
    lines = gzip.decompress(good)
    filled.files[key] = {
        "truncated": good[:-40],
        "ended": ended(lines),  # after a whole line: only the missing checksum tells
        "checksum": good[:-8] + b"\0" * 8,
        "line": gzip.compress(lines[:-9]),
        "number": gzip.compress(lines + b'{"modelId": "m", "layer": "1-x", "index": "01"}\n'),
        "stranger": gzip.compress(lines.replace(b"15-llama", b"16-llama")),
        "html": HTML,
    }[damage]
    found = sync(NAME)[0]
    assert found.batches == 11 and found.labels == 110 and not found.complete_at
    assert len(found.missing) == 1 and found.missing[0].startswith("explanations/batch-4.jsonl.gz")
    assert len(filled.asked(f"/{key}")) == 2
    filled.files[key] = good
    assert sync(NAME)[0].labels == 120
    rows()


def plain(count: int = 5) -> bytes:
    rows = (json.dumps(exported(NAME, i, f"label {i}")) for i in range(count))
    return "".join(f"{row}\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("body", "packed", "sizes"),
    [
        (body, packed, sizes)
        for body in ("empty", "short", "a blank line", "a list of nothing", "html")
        for packed in (True, False)
        for sizes in (True, False)
        # whole lines of a plain file of unknown size are a file
        if body != "short" or packed or sizes
    ],
)
def test_a_short_body_with_status_200_is_no_file(server, body, packed, sizes):
    """Each has the length that its own header announces."""
    key = f"{FOLDER}batch-0.jsonl" + (".gz" if packed else "")
    server.put(key, plain(), pack=False)
    if packed:
        server.files[key] = gzip.compress(server.files[key])
    server.list_sizes = sizes
    sent = {
        "empty": b"",
        "short": server.files[key][:-30] if packed else plain(3),
        "a blank line": b"\n",
        "a list of nothing": b"[]",
        "html": HTML,
    }[body]
    server.always[f"/{FOLDER}"] = Reply(200, sent, empty=True)
    found = sync(NAME)[0]
    assert len(server.asked(f"/{FOLDER}")) == 2
    assert (found.batches, found.labels, found.complete_at) == (0, 0, None)
    assert len(found.missing) == 1 and found.missing[0].startswith("explanations/batch-0.jsonl")
    del server.always[f"/{FOLDER}"]
    assert sync(NAME)[0].labels == 5


def test_a_file_of_several_gzip_members_is_whole_only_with_all_of_them(server):
    key = f"{FOLDER}batch-0.jsonl.gz"
    first, second = gzip.compress(plain(3)), gzip.compress(plain(5)[len(plain(3)) :])
    server.put(key, first + second)
    server.fault(f"/{FOLDER}", Reply(200, first), Reply(200, first))
    assert (
        sync(NAME)[0]
        .missing[0]
        .endswith(f"{len(first)} bytes came, and the list says {len(first + second)}")
    )
    assert sync(NAME)[0].labels == 5


def test_an_empty_answer_with_an_etag_of_its_own_is_still_empty(server):
    server.put(f"{FOLDER}batch-0.jsonl.gz", plain())
    server.always[f"/{FOLDER}"] = Reply(200, b"", {"ETag": '"other"'}, empty=True)
    assert sync(NAME)[0].missing == ("explanations/batch-0.jsonl.gz: the answer is empty",)


def test_a_file_that_is_replaced_after_it_was_listed_is_taken(server, client):
    server.put(f"{FOLDER}batch-0.jsonl", plain(5), pack=False)
    (old,) = client.exports(SOURCE)
    server.put(f"{FOLDER}batch-0.jsonl", plain(7), pack=False)
    assert len(client.download(old).rows) == 7


def test_a_shard_that_repeats_is_not_the_one_that_was_asked_for(filled):
    first = filled.files[f"{FOLDER}batch-0.jsonl.gz"]
    filled.list_sizes = False  # else the size may tell
    filled.always[f"/{FOLDER}batch-1.jsonl.gz"] = Reply(200, first)
    filled.always[f"/{FOLDER}batch-2.jsonl.gz"] = Reply(200, first)
    found = sync(NAME)[0]
    assert (found.labels, found.batches, found.complete_at) == (100, 10, None)
    assert len(found.missing) == 2
    assert all("the server sends the bytes of explanations/batch-" in why for why in found.missing)
    filled.always.clear()
    assert sync(NAME)[0].labels == 120


def test_one_file_under_two_names_is_counted_once(filled):
    filled.files[f"{FOLDER}batch-50.jsonl.gz"] = filled.files[f"{FOLDER}batch-1.jsonl.gz"]
    found = sync(NAME)[0]
    assert (found.labels, found.batches) == (120, 12) and found.complete_at
    filled.log.clear()
    sync(NAME)
    assert filled.asked("/v1/") == []


@pytest.mark.parametrize("fault", ["no token", "the same token", "a key lost", "two of one name"])
def test_a_list_that_ends_early_is_no_list(filled, monkeypatch, fault):
    filled.max_keys = 5
    whole = Neuronpedia.listing

    def listing(self, query):
        said = whole(self, query).decode()
        if fault == "no token":
            said = re.sub("<NextContinuationToken>.*</NextContinuationToken>", "", said)
        elif fault == "the same token":
            said = re.sub(r"(Token>)\d+", r"\g<1>5", said)
        elif fault == "a key lost":
            said = re.sub("<Contents>.*?</Contents>", "", said, count=1)
        else:
            said = re.sub(r"batch-\d+\.", "batch-1.", said)
        return said.encode()

    monkeypatch.setattr(Neuronpedia, "listing", listing)
    start = time.monotonic()
    found = sync(NAME)[0]
    assert time.monotonic() - start < 2
    assert len(found.missing) == 1 and not found.complete_at and found.batches == 0
    assert {
        "no token": "the list breaks off",
        "the same token": "does not end",
        "a key lost": "the list has 4 files and speaks of 5",
        "two of one name": "two files of name explanations/batch-1.jsonl.gz",
    }[fault] in found.missing[0]


def test_an_answer_without_end_is_not_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr("interp_steer.labels.client.LARGEST", 1000)
    server.put(f"{FOLDER}batch-0.jsonl", plain(1), pack=False)
    server.always[f"/{FOLDER}"] = Reply(200, plain(500))
    (why,) = sync(NAME)[0].missing
    assert why.endswith("the answer is longer than 1,000 bytes")


def test_a_file_that_an_earlier_sync_took_empty_is_fetched_again(filled):
    sync(NAME)
    before, key = rows(), f"{FOLDER}batch-3.jsonl.gz"
    with Store(write=True) as store:  # as it stored an empty answer
        store.commit(SOURCE, "explanations/batch-3.jsonl.gz", '"x"', [])
        store._db.execute("DELETE FROM feature WHERE object_id NOT IN (SELECT id FROM object)")
        store._db.execute("UPDATE object SET etag = ? WHERE etag = '\"x\"'", (filled.etag(key),))
    assert coverage()[0].labels == 110
    filled.log.clear()
    assert sync(NAME)[0].labels == 120 and rows() == before
    assert filled.asked("/v1/") == [f"/{key}"]


def test_a_list_of_nothing_where_there_was_something_is_told(filled):
    sync(NAME)
    filled.files.clear()
    found = sync(NAME)[0]
    assert found.labels == 120 and not found.complete_at
    assert found.missing == ("the bucket lists no files, and 12 are here",)


def test_10_a_file_damaged_on_the_way_is_fetched_again(filled):
    path = f"/{FOLDER}batch-4.jsonl.gz"
    filled.fault(path, Reply(200, filled.files[path[1:]][:-40]))
    assert sync(NAME)[0].labels == 120


def test_10_a_broken_download_goes_on_where_it_stopped(server):
    made = [exported(NAME, i, f"label {i} {i * 7919 % 1000}") for i in range(3000)]
    server.put(f"{FOLDER}batch-0.jsonl", made, pack=False)
    server.fault(f"/{FOLDER}", Reply(cut=200_000))
    assert sync(NAME)[0].labels == 3000
    spans = [headers.get("Range") for _, path, headers, _ in server.log if "batch" in path]
    assert spans == [None, "bytes=200000-"]
    # and from the start if the file has changed meanwhile
    server.put(f"{FOLDER}batch-0.jsonl", made[:2900], pack=False)
    server.fault(f"/{FOLDER}", Reply(cut=200_000), Reply(416))
    assert sync(NAME)[0].labels == 2900


def test_10_gzip_is_known_by_its_bytes(server):
    server.put(f"{FOLDER}batch-0.jsonl", [exported(NAME, 1, "one")])  # packed, though not named so
    server.put(f"{FOLDER}batch-1.jsonl.gz", [exported(NAME, 2, "two")], pack=False)
    assert sync(NAME)[0].labels == 2


def test_13_syncs_of_one_source_at_once(filled):
    filled.delay = 0.02
    problems: list[BaseException] = []

    def run() -> None:
        try:
            assert sync(NAME)[0].labels <= 120
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    crowd = rows()
    assert len(crowd) == 120
    default_path().unlink()
    sync(NAME)
    assert rows() == crowd


def test_readers_read_during_a_sync(filled):
    with Store(write=True) as writer:
        writer.commit(SOURCE, "explanations/a", "1", [])
        with writer._transaction(), Store() as reader:
            assert reader.coverage(SOURCE).batches == 1


@pytest.mark.parametrize("status", [500, 503, 404, "drop", "silent"])
def test_a_server_that_keeps_failing_is_given_up(filled, status):
    sync(NAME)
    filled.put(f"{FOLDER}batch-3.jsonl.gz", [exported(NAME, 1, "changed")])
    filled.put(f"{FOLDER}batch-77.jsonl.gz", [exported(NAME, 777, "new")])
    failing = {"drop": Reply(drop=True), "silent": Reply(pause=30)}
    filled.always["/v1/"] = failing.get(status) or Reply(int(status), b"<Error/>")
    start = time.monotonic()
    found = sync(NAME, client=Client(patience=1.0))[0]
    assert time.monotonic() - start < 2.5
    assert [why.partition(":")[0] for why in found.missing] == [
        "explanations/batch-3.jsonl.gz", "explanations/batch-77.jsonl.gz"
    ]  # fmt: skip
    assert found.labels == 120 and not found.complete_at  # what was here is kept


def test_a_bucket_that_fails_to_list_is_missing_and_not_unknown(server):
    server.always["/?"] = Reply(503, b"<Error/>")
    found = sync(NAME, client=Client(patience=0.5))[0]
    assert "status 503" in found.missing[0] or "tries" in found.missing[0]
    server.always["/?"] = Reply(200, HTML)
    assert "not a list of files" in sync(NAME)[0].missing[0]


def test_unknown_names_are_the_users_mistake(server):
    for name, told in (
        ("llama_scope_lxr_9x", "nearest: .*llama_scope_lxr_8x"),
        ("llama_scope_lxr_8x/l15r", "nearest: .*l15r_8x"),
        ("llama3.1-8b/15-llamascope-res-31k", "no labels of .*nearest: llama3.1-8b/15-llama"),
        ("../../etc/passwd", "is not a source"),
        ("a/../b", "is not a source"),
        ("/etc", "is not a source"),
    ):
        with pytest.raises(RequestError, match=told):
            sync(name)
    assert not default_path().exists()  # and leaves nothing behind
    with pytest.raises(RequestError, match="no layer 40, 41 there"):
        sync("llama_scope_lxr_8x", layers="31,40-41")
    with pytest.raises(RequestError, match="expected numbers and ranges"):
        sync("llama_scope_lxr_8x", layers="a-b")
    with pytest.raises(RequestError, match="at least one source"):
        sync()


def test_a_release_is_synced_layer_by_layer_as_the_registry_says(server):
    saes = registry.sources()["llama_scope_lxr_8x"]
    assert saes["l15r_8x"] == NAME and len(saes) == 32
    for layer in (12, 13):
        name = saes[f"l{layer}r_8x"]
        server.put(f"v1/{name}/explanations/batch-0.jsonl.gz", [exported(name, 1, "one")])
    found = sync("llama_scope_lxr_8x", layers="12-14")
    assert [(each.source.layer, each.labels, bool(each.complete_at)) for each in found] == [
        (12, 1, True), (13, 1, True), (14, 0, False)  # of a known SAE: not explained yet
    ]  # fmt: skip


def test_three_states_of_a_feature(server):
    made = [exported(NAME, 0, "zero"), exported(NAME, 2, " \0 "), exported(NAME, 9, "nine")]
    server.put(f"{FOLDER}batch-0.jsonl.gz", made)
    server.put(f"{FOLDER}batch-1.jsonl.gz", b"broken")
    sync(NAME)
    assert show(f"{NAME}/0").state is State.LABELLED
    assert show(f"{NAME}/2").state is State.UNLABELLED  # it is in the export, without a text
    assert show(f"{NAME}/5").state is State.UNKNOWN  # it may be in the file that is missing
    server.put(f"{FOLDER}batch-1.jsonl.gz", [exported(NAME, 1, "one")])
    found = sync(NAME)[0]
    assert show(f"{NAME}/5").state is State.UNLABELLED  # the whole export does not have it
    assert show(f"{NAME}/10").state is State.UNKNOWN  # beyond what the export knows
    assert (found.labelled, found.unlabelled) == (3, 7)


def test_density_and_maximum_come_with_the_feature_files(server):
    server.put(f"{FOLDER}batch-0.jsonl.gz", [exported(NAME, 7, "seven")])
    numbers = {"modelId": SOURCE.model, "layer": SOURCE.name, "index": "7",
               "maxActApprox": 6.5, "frac_nonzero": 0.01}  # fmt: skip
    server.put(f"v1/{NAME}/features/batch-0.jsonl.gz", [numbers, {**numbers, "index": "8"}])
    sync(NAME)
    assert show(f"{NAME}/7").labels[0].density is None
    sync(NAME, numbers=True)
    label = show(f"{NAME}/7").labels[0]
    assert (label.density, label.max_activation) == (0.01, 6.5)
    assert show(f"{NAME}/8").state is State.UNLABELLED
    sync(NAME)  # without the numbers: what is here of them stays
    assert show(f"{NAME}/7").density == 0.01


def test_a_feature_that_is_newer_than_the_export_is_fetched_alone(filled):
    sync(NAME)
    new = neuron(*NAME.split("/"), 9000, explanation("n", "brand new"), maxActApprox=3.0)
    bare = neuron(*NAME.split("/"), 9001)
    for each in (new, bare):
        filled.neurons[SOURCE.model, SOURCE.name, each["index"]] = each
    found = fetch(f"{NAME}/9000", f"{NAME}/9001")
    assert [each.state for each in found] == [State.LABELLED, State.UNLABELLED]
    assert show(f"{NAME}/9000").labels[0].max_activation == 3.0
    assert show(f"{NAME}/9000").origins[0][0] == "api/9000"
    sync(NAME)  # which does not take away what did not come from the export
    assert show(f"{NAME}/9000").state is State.LABELLED
    with pytest.raises(RequestError, match=r"no feature .*/9002"):
        fetch(f"{NAME}/9002")


BOMBED = """
import resource, sys, time
from interp_steer.errors import SteerError
from interp_steer.labels import coverage, import_files
import_files([sys.argv[1]])  # what a first import loads is not counted
resource.setrlimit(resource.RLIMIT_AS, (300 * 2**20,) * 2)
for path in sys.argv[2:]:
    start = time.process_time()
    try:
        import_files([path])
        print("taken", path)
    except SteerError as error:
        print(f"{time.process_time() - start:.2f}", error)
print(sum(each.labels for each in coverage()))
"""


def test_a_bomb_is_refused_within_2_seconds_and_300_mb(tmp_path):
    """Each of 1.5 MB or less; unpacked most would take gigabytes."""
    row = plain(1)
    blocks = {
        "zeros": b"\0" * 2**24,
        "blank lines": b"\n" * 2**24,
        "one row": row * (2**24 // len(row)),
    }
    files = {name: b"".join([gzip.compress(block)] * 64) for name, block in blocks.items()}
    files |= {
        "gzip in gzip": gzip.compress(files["zeros"]),
        "a long line": gzip.compress(b'{"a": "' + random.Random(0).randbytes(10**7).hex().encode()),
        "deep": b'{"modelId": ' + b"[" * 1_500_000,
        "a number of 6,000 digits": row.replace(b'"index": "0"', b'"index": ' + b"1" * 6000),
        "empty": b"",
        "nothing in gzip": gzip.compress(b""),
        "a list of nothing": b"[]",
    }
    for name, data in {"good": plain(), **files}.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", BOMBED, "good", *files], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    *said, labels = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr, done.stderr
    for name, line in zip(files, said, strict=True):
        seconds, _, error = line.partition(" ")
        assert error.startswith(f"{name}: ") and float(seconds) < 2, line
    assert labels == "5"


def test_import_from_disk(tmp_path):
    folder = tmp_path / "explanations"
    folder.mkdir()
    file = folder / "batch-0.jsonl.gz"
    other = NAME.replace("15", "16")
    lines = [exported(NAME, 1, "one"), exported(other, 1, "two", 1)]
    server = Neuronpedia()
    server.put("x", lines)
    server.close()
    file.write_bytes(server.files["x"])
    found = import_files([file])
    assert [(str(each.source), each.labels) for each in found] == [(NAME, 1), (other, 1)]
    assert found[0].source.release == "llama_scope_lxr_8x"
    import_files([file])  # again: the same rows, not twice
    assert [each.labels for each in coverage()] == [1, 1]
    before = rows()
    file.write_bytes(server.files["x"][:-10])
    with pytest.raises(RunError, match="broken gzip"):
        import_files([file])
    assert rows() == before
    with pytest.raises(RequestError, match="no such file"):
        import_files([tmp_path / "none.jsonl"])
