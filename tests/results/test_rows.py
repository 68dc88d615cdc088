"""The file of rows: whole chunks or nothing, whatever happens to the process or the disk."""

import errno
import json
import os
from pathlib import Path

import pytest

from interp_steer.errors import RequestError, RunError
from interp_steer.results.rows import Results, merge

ABOUT = {"model": "m1", "dtype": "float32"}


def rows(*names: str, text: str = "a") -> list[dict]:
    return [{"key": name, "text": text, "metrics": {"x": 1.0}} for name in names]


def written(path: Path, *chunks: tuple[str, ...]) -> Results:
    results = Results(path, ABOUT)
    with results.writing():
        for number, names in enumerate(chunks):
            results.append(rows(*names), f"c{number}")
    return results


def test_reads_back_what_was_appended(tmp_path):
    odd = "tab\t newline\n \u2028 \U0001f5fc é \x00"
    results = Results(tmp_path / "rows.jsonl", ABOUT)
    with results.writing():
        results.append(rows("a", "b", text=odd), "c0")
    again = Results(tmp_path / "rows.jsonl", ABOUT)
    assert list(again.rows) == ["a", "b"]
    assert again.rows["a"]["text"] == odd
    assert len((tmp_path / "rows.jsonl").read_bytes().splitlines()) == 3  # head, and a line a row


def test_every_torn_end_is_cut_to_whole_chunks(tmp_path):
    path = tmp_path / "rows.jsonl"
    written(path, ("a", "b"), ("c", "d", "e"))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    head, first = ends[0], ends[2]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        results = Results(path, ABOUT)
        expected = [] if cut < first else ["a", "b"]
        assert list(results.rows) == expected, cut
        with results.writing():
            pass
        kept = path.read_bytes()
        assert kept == whole[: first if cut >= first else head], cut
        with results.writing():
            results.append(rows("z"), "cz")
        assert list(Results(path, ABOUT).rows) == [*expected, "z"], cut


def test_damage_before_the_end_is_told_and_nothing_is_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    written(path, ("a",), ("b",))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"{broken}\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunError, match="damaged at byte"):
        Results(path, ABOUT)
    assert path.read_bytes() == b"".join(lines)


def test_a_file_of_another_model_or_kind_is_refused_and_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    written(path, ("a",))
    with pytest.raises(RequestError, match="another model"):
        Results(path, {**ABOUT, "model": "m2"})
    with pytest.raises(RequestError, match="another model"):
        Results(path, {**ABOUT, "dtype": "bfloat16"})
    for text in ("notes of mine", "notes\nof mine\n", '{"format": "other"}\n'):
        path.write_text(text)
        with pytest.raises(RequestError, match="not a results file"):
            Results(path, ABOUT)
        assert path.read_text() == text


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    results = written(path, ("a",))
    before = path.read_bytes()
    real = os.write

    def full(handle, data):
        real(handle, bytes(data)[:10])  # some of it gets there
        raise OSError(errno.ENOSPC, "No space left on device")

    with results.writing():
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(RunError, match="the disk is full"):
            results.append(rows("b"), "c1")
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert "b" not in results
        results.append(rows("b"), "c1")  # there is room again
    assert list(Results(path, ABOUT).rows) == ["a", "b"]


def test_two_writers_are_one_too_many(tmp_path):
    path = tmp_path / "rows.jsonl"
    with (
        Results(path, ABOUT).writing(),
        pytest.raises(RunError, match="being written by another"),
        Results(path, ABOUT).writing(),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"rows\.jsonl"),
        Results(tmp_path / "file" / "rows.jsonl", ABOUT).writing(),
    ):
        pass


def test_merge_keeps_each_row_once(tmp_path):
    written(tmp_path / "one", ("a", "b"))
    written(tmp_path / "two", ("b", "c"))
    merged = merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert sorted(merged.rows) == ["a", "b", "c"]
    lines = [json.loads(x) for x in (tmp_path / "out").read_text().splitlines()[1:]]
    assert sorted(line["key"] for line in lines) == ["a", "b", "c"]
    other = Results(tmp_path / "three", {**ABOUT, "model": "m2"})
    with other.writing():
        other.append(rows("d"), "c0")
    with pytest.raises(RequestError, match="another model"):
        merge([tmp_path / "one", tmp_path / "three"], tmp_path / "out")
    assert sorted(Results(tmp_path / "out").rows) == ["a", "b", "c"]
    with pytest.raises(RequestError, match="no results file"):
        merge([tmp_path / "one", tmp_path / "four"], tmp_path / "out")


def test_rows_that_were_added_since_the_file_was_read_stay(tmp_path):
    path = tmp_path / "rows.jsonl"
    written(path, ("a",))
    early = Results(path, ABOUT)
    with Results(path, ABOUT).writing() as other:
        other.append(rows("b", "c"), "c1")
    with early.writing():
        assert list(early.rows) == ["a", "b", "c"]
        early.append(rows("d"), "c2")
    assert list(Results(path, ABOUT).rows) == ["a", "b", "c", "d"]


def test_a_file_that_was_replaced_is_not_written_to(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    written(path, ("a",))
    real = os.open

    def late(name, *options):
        handle = real(name, *options)
        merge([path], path)  # between opening and locking
        return handle

    results = Results(path, ABOUT)
    monkeypatch.setattr(os, "open", lambda *given: (monkeypatch.undo(), late(*given))[1])
    with pytest.raises(RunError, match="being written by another"), results.writing():
        pass
    assert list(Results(path, ABOUT).rows) == ["a"]


def test_a_row_that_is_measured_again_keeps_what_it_had(tmp_path):
    def row(**changes):
        first = {"key": "a", "text": "x", "token_ids": [1, 2], "metrics": {"m": 1.0, "n": None}}
        return {**first, **changes}

    path = tmp_path / "rows.jsonl"
    with Results(path, ABOUT).writing() as results:
        results.append([row()], "c0")
        again = {"metrics": {"n": 2.0, "o": 3.0}, "text": None, "token_ids": None}
        results.append([row(**again)], "c1")
        expected = {"m": 1.0, "n": 2.0, "o": 3.0}
        assert results.rows["a"]["metrics"] == expected
    found = Results(path, ABOUT).rows["a"]
    assert found["metrics"] == expected and found["text"] == "x"
    # of two machines' files, too, whichever comes first
    written(tmp_path / "other", ("b",))
    with Results(tmp_path / "other").writing() as results:
        results.append([row(metrics={"p": 4.0})], "c1")
    for order in ([path, tmp_path / "other"], [tmp_path / "other", path]):
        merged = merge(order, tmp_path / "out")
        assert merged.rows["a"]["metrics"] == {**expected, "p": 4.0}
    with Results(path).writing() as results:  # another answer: its numbers are its own
        results.append([row(token_ids=[1, 3], text="y", metrics={"m": 9.0})], "c2")
    assert Results(path).rows["a"]["metrics"] == {"m": 9.0}


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b"[1]",
        b'{"key": "z", "chunk": "c1", "of": "1", "metrics": {}}',
        b'{"key": "z", "chunk": "c1", "of": 1, "metrics": [1]}',
        b'{"key": "z", "of": 1, "metrics": {}}',
        b"9" * 6000,
    ],
)
def test_every_damaged_line_is_told(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    written(path, ("a",), ("b",))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + line + b"\n" + lines[2])
    with pytest.raises(RunError, match=f"damaged at byte {len(lines[0] + lines[1])};") as caught:
        Results(path, ABOUT)
    assert "\n" not in str(caught.value)
    path.write_bytes(line + b"\n" + lines[1])
    with pytest.raises(RequestError, match="not a results file"):
        Results(path, ABOUT)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    written(path, ("a",))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(2**36)  # sparse: 64 GiB of zeros
    with pytest.raises(RunError, match=f"damaged at byte {size};"):
        Results(path, ABOUT)
    with path.open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(RequestError, match="not a results file"):
        Results(path, ABOUT)
