"""Results on disk: a file of JSON lines to which whole chunks of rows are appended.

Every line holds one row under the key of its content, so that a file means the same to any study
that asks for the row, and two machines' files are one after the other. A chunk is there whole or
not at all: what a crash has torn is cut off when the file is next written to.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from interp_steer.errors import RequestError, RunError
from interp_steer.util.files import LARGEST_TEXT, explained, parse_json, whole
from interp_steer.util.locking import locked

FORMAT = "interp-steer/rows/1"

Record = Mapping[str, Any]


class Results:
    """A file of rows; rows by key, what is said last of a key counts (see `joined`).

    Args:
        path: the file; made by the first `writing`.
        about: what all its rows share: model fingerprint, dtype. A file of something else is
            refused.

    Raises:
        RequestError: the file is of another model or format.
        RunError: it cannot be read.
    """

    def __init__(self, path: str | Path, about: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.about = dict(about or {})
        self.rows: dict[str, Record] = {}
        self._end: int | None = None  # where the last whole chunk ends; None: no file yet
        self._seen: tuple[int, ...] = ()  # the file as it was when it was read
        if self.path.is_file():
            self._read()

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: object) -> bool:
        return key in self.rows

    def _read(self) -> None:
        self.rows, self._end = {}, None
        with explained(self.path), self.path.open("rb") as file:
            self._seen = _state(file.fileno())
            if self._head(file.readline(LARGEST_TEXT)):
                self._chunks(file)

    def _head(self, head: bytes) -> bool:
        """Reads the first line; False if it was torn before it was whole."""
        begins = json.dumps({"format": FORMAT}).encode()[:-1]
        if not head.endswith(b"\n") and head[: len(begins)] == begins[: len(head)]:
            self._end = 0
            return False
        try:
            told = parse_json(head.decode(), self.path)
            mine = {key: told[key] for key in self.about}
            if told["format"] != FORMAT:
                raise KeyError("format")
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{self.path} is not a results file ({FORMAT})") from error
        for key, value in self.about.items():
            if mine[key] != value:
                raise RequestError(
                    f"{self.path} holds rows of another model ({key} {mine[key]}, expected "
                    f"{value}); choose another folder"
                )
        self.about = {key: value for key, value in told.items() if key != "format"}
        self._end = len(head)
        return True

    def _chunks(self, file: BinaryIO) -> None:
        at = self._end or 0
        waiting: dict[str, Record] = {}
        chunk = None
        while (line := file.readline(LARGEST_TEXT)).endswith(b"\n"):
            try:
                record = parse_json(line.decode(), self.path)
                key, size = str(record["key"]), record["of"]
                if type(size) is not int or not isinstance(record["metrics"], dict):
                    raise TypeError("not as it was written")
                if record["chunk"] != chunk or key in waiting:
                    chunk, waiting = record["chunk"], {}  # behind a chunk that was torn
            except (ValueError, KeyError, TypeError) as error:
                if not file.readline(LARGEST_TEXT).endswith(b"\n"):
                    return  # torn inside the last line, and the newline came through
                raise self._damaged(at) from error
            waiting[key] = record
            at += len(line)
            if len(waiting) == size:
                for key, record in waiting.items():
                    self.rows[key] = joined(self.rows.get(key), record)
                waiting, self._end = {}, at
        if len(line) == LARGEST_TEXT:
            raise self._damaged(at)

    def _damaged(self, at: int) -> RunError:
        return RunError(f"{self.path} is damaged at byte {at}; its rows up to there are whole")

    @contextmanager
    def writing(self) -> Iterator["Results"]:
        """Holds the file for this process alone, reads what was added since, and cuts off what a
        crash has torn.

        Raises:
            RunError: another process writes to it, or it cannot be written.
        """
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with explained(self.path):
                # a file that was put in its place meanwhile is another one
                if not locked(handle) or self.path.stat().st_ino != os.fstat(handle).st_ino:
                    raise RunError(f"{self.path} is being written by another run")
                size = os.fstat(handle).st_size
                if size and _state(handle) != self._seen:
                    self._read()
                if not size:
                    self._end = 0
                if size > (self._end or 0):
                    os.ftruncate(handle, self._end or 0)
                if not self._end:
                    self._write(handle, [{"format": FORMAT, **self.about}])
            self._handle = handle
            try:
                yield self
            finally:
                self._seen = _state(handle)  # `rows` and the file say the same
        finally:
            os.close(handle)

    def append(self, records: Sequence[Mapping[str, Any]], chunk: str) -> None:
        """Adds a chunk of rows, whole or not at all; inside `writing`.

        Raises:
            RunError: the disk is full or the folder read-only; nothing was added.
        """
        lines = [{**record, "chunk": chunk, "of": len(records)} for record in records]
        with explained(self.path):
            self._write(self._handle, lines)
        for line in lines:
            self.rows[str(line["key"])] = joined(self.rows.get(str(line["key"])), line)

    def _write(self, handle: int, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(
            json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines
        )
        data = memoryview(text.encode())
        start = self._end or 0
        try:
            os.lseek(handle, start, os.SEEK_SET)
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        except OSError:
            with suppress(OSError):
                os.ftruncate(handle, start)
            raise
        self._end = os.lseek(handle, 0, os.SEEK_CUR)


def joined(before: Record | None, after: Record) -> Record:
    """One row that was measured twice, as one: what is said last counts.

    What only the earlier record says is kept, such as metrics that were not asked for again, unless
    the two hold different answers, as two machines' may.
    """
    if before is None:
        return after
    answers = [one.get("token_ids") for one in (before, after)]
    if None not in answers and answers[0] != answers[1]:
        return after

    def both(old: Record, new: Record) -> dict[str, Any]:
        return {**new, **old, **{name: value for name, value in new.items() if value is not None}}

    return {**both(before, after), "metrics": both(before["metrics"], after["metrics"])}


def _state(handle: int) -> tuple[int, ...]:
    about = os.fstat(handle)
    return about.st_ino, about.st_size, about.st_mtime_ns


def merge(paths: Sequence[str | Path], out: str | Path) -> Results:
    """Several machines' files as one, each row once.

    Raises:
        RequestError: they are of different models, or none is given.
        RunError: a file cannot be read or written.
    """
    if not paths:
        raise RequestError("nothing to merge")
    for path in paths:
        if not Path(path).is_file():
            raise RequestError(f"no results file {path}")
    files = [Results(paths[0])]
    files += [Results(path, files[0].about) for path in paths[1:]]
    rows: dict[str, Record] = {}
    for file in files:
        for key, row in file.rows.items():
            rows[key] = joined(rows.get(key), row)
    bare = [{k: v for k, v in row.items() if k not in ("chunk", "of")} for row in rows.values()]
    with whole(Path(out)) as part:
        part.unlink()
        merged = Results(part, files[0].about)
        with merged.writing():
            if bare:
                merged.append(bare, "merged")
    return Results(out, files[0].about)
