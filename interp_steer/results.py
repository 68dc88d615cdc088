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
from typing import Any

from interp_steer.errors import RequestError, RunError
from interp_steer.files import explained, whole

FORMAT = "interp-steer/rows/1"

Record = Mapping[str, Any]


class Results:
    """A file of rows, read whole; rows by key, the last one of a key counts.

    Args:
        path: the file; made by the first `append`.
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
        if self.path.is_file():
            self._read()

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, key: object) -> bool:
        return key in self.rows

    def _read(self) -> None:
        with explained(self.path):
            data = self.path.read_bytes()
        head, newline, _ = data.partition(b"\n")
        begins = json.dumps({"format": FORMAT}).encode()[:-1]
        if not newline and (head[: len(begins)] == begins[: len(head)]):
            self._end = 0  # torn before the first line was whole
            return
        try:
            told = json.loads(head)
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
        self._end = at = len(head) + 1
        waiting: list[Record] = []
        while (stop := data.find(b"\n", at)) >= 0:
            try:
                record = json.loads(data[at:stop])
                waiting.append({"key": record["key"], **record})
                size = record["of"]
            except (ValueError, KeyError, TypeError) as error:
                if data.find(b"\n", stop + 1) < 0:
                    break  # torn inside the last line, and the newline came through
                raise RunError(
                    f"{self.path} is damaged at byte {at}; its rows up to there are whole"
                ) from error
            at = stop + 1
            if waiting[-1]["chunk"] != waiting[0]["chunk"]:
                waiting = waiting[-1:]  # of a torn chunk that another one was written behind
            if len(waiting) == size:
                self.rows.update({str(row["key"]): row for row in waiting})
                waiting, self._end = [], at

    @contextmanager
    def writing(self) -> Iterator["Results"]:
        """Holds the file for this process alone, and cuts off what a crash has torn.

        Raises:
            RunError: another process writes to it, or it cannot be written.
        """
        import fcntl

        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"{self.path} is being written by another run") from error
            with explained(self.path):
                size = os.fstat(handle).st_size
                if size and self._end is None:
                    self._read()  # made since
                if size > (self._end or 0):
                    os.ftruncate(handle, self._end or 0)
                if not self._end:
                    self._write(handle, [{"format": FORMAT, **self.about}])
            self._handle = handle
            yield self
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
        self.rows.update({str(line["key"]): line for line in lines})

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
    rows = {key: row for file in files for key, row in file.rows.items()}
    bare = [{k: v for k, v in row.items() if k not in ("chunk", "of")} for row in rows.values()]
    with whole(Path(out)) as part:
        part.unlink()
        merged = Results(part, files[0].about)
        with merged.writing():
            if bare:
                merged.append(bare, "merged")
    return Results(out, files[0].about)
