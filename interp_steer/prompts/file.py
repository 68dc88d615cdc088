"""Prompt files: what each kind of file lists, as entries, items, or one side of a contrast.

| file | holds |
|---|---|
| `.txt`, `.md`, or no suffix | one text a line |
| `.json` | a list of entries; `FILE.json:NAME` takes the list under a name of an object |
| `.jsonl`, `.ndjson` | one entry a line |
| `.csv`, `.tsv` | a header with fields of an entry; `FILE.csv:COLUMN` takes any column as texts |

`entry` has the forms of an entry; `FILE.jsonl:FIELD` takes one field of objects as texts.
A table of six columns that ends in A, B, C or D is one of MMLU's: question, four choices, answer.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_steer.errors import RequestError, nearest, note
from interp_steer.prompts.entry import KNOWN, PROMPTS, SIDES, Entry
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import Prompt
from interp_steer.util.files import parse_json, read_text

QUESTIONS = Path(__file__).parents[1] / "data" / "questions.txt"  # that come along
TEXTS = ("", ".txt", ".md")
LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
LARGEST = 128 * 2**20  # bytes of a prompt file
MMLU = ("question", "A", "B", "C", "D", "answer")  # columns of its files
SUFFIXES = (*TEXTS[1:], ".json", *LINES, *TABLES)


@dataclass(frozen=True)
class PromptFile:
    """A file that was read.

    Attributes:
        path: as it was given, with the part after the colon.
        entries: what it lists, at least one.
    """

    path: str
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, path: str | Path) -> "PromptFile":
        """Reads a file of one of the kinds above, its suffix in any case.

        Warns once with a `SteerWarning` that names fields that are not read.

        Raises:
            RequestError: no such file, not of this form, or empty; it names the entry, from 1.
        """
        return cls.of(str(path), _listed(str(path)))

    @classmethod
    def of(cls, path: str, listed: Sequence[object]) -> "PromptFile":
        """The same of what a file, or something else of that name, lists."""
        found = []
        for number, given in enumerate(listed, start=1):
            with numbered(path, number):
                found.append(Entry.of(given))
        unread = dict.fromkeys(name for entry in found for name in entry.unread)
        if unread:
            note(f"{path}: fields that are not read: {', '.join(unread)}")
        return cls(path, tuple(found))

    def items(self, *, as_chat: bool = False, system: str | None = None) -> list[Item]:
        """An item for each entry; see `Item.of`."""
        found = []
        for number, entry in enumerate(self.entries, start=1):
            with numbered(self.path, number):
                found.append(Item.of_entry(entry, as_chat=as_chat, system=system))
        return found

    def side(self, side: str, as_chat: bool | None = None) -> list[Prompt]:
        """The prompts of one side of a contrast, "positive" or "negative"; see `Entry.side`."""
        found = []
        for number, entry in enumerate(self.entries, start=1):
            with numbered(self.path, number):
                found.append(entry.side(side, as_chat))
        return found

    def asked(self, side: str) -> list[Prompt]:
        """What each prompt of a side asks, without its answer."""
        return [entry.asked(side) for entry in self.entries]


def read_items(path: str | Path, *, as_chat: bool = False, system: str | None = None) -> list[Item]:
    """Items of a prompt file; raises as `PromptFile.read` and `Item.of` do."""
    return PromptFile.read(path).items(as_chat=as_chat, system=system)


def read_prompts(path: str | Path, side: str = "prompt") -> list[Prompt]:
    """Prompts of a file: what is asked, or with side "positive" or "negative" that side of each.

    Raises:
        RequestError: no such file, not of this form, or empty.
    """
    file = PromptFile.read(path)
    return file.side(side) if side in SIDES else [item.prompt for item in file.items()]


def is_file(path: str | Path) -> bool:
    """Whether a path, perhaps with a column or field after a colon, is a file."""
    return os.path.isfile(_parted(str(path))[0])  # a name that no file can have is none


@contextmanager
def numbered(path: str | Path, number: int) -> Iterator[None]:
    """Puts the file and the entry's number, from 1, before an error."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{path}, entry {number}: {error}") from error


def _parted(path: str) -> tuple[str, list[str]]:
    """A path, and the names that follow it behind colons."""
    found = re.fullmatch(r"(.+?\.(?:csv|tsv|json|jsonl|ndjson))((?::[^:/\\]+)+)", path, re.I)
    if found is None or os.path.isfile(path):
        return path, []
    return found[1], found[2][1:].split(":")


def _listed(given: str) -> list[Any]:
    """What a file lists, each entry still as the file has it."""
    name, picked = _parted(given)
    path, suffix = Path(name), Path(name).suffix.lower()
    if not os.path.isfile(path):
        there = os.path.isdir(path)
        raise RequestError(f"{path} is a folder" if there else f"no prompt file {path}")
    if suffix not in (*TEXTS, *SUFFIXES):
        raise RequestError(f"{path}: prompts are read from {', '.join(SUFFIXES)}, not {suffix}")
    text = read_text(path, LARGEST).replace("\r\n", "\n").replace("\r", "\n")
    if suffix in TABLES:
        return _table(path, text, TABLES[suffix], picked)
    if suffix in TEXTS:
        found: Any = [line for line in text.split("\n") if line.strip()]
    elif suffix in LINES:
        lines = enumerate(text.split("\n"), start=1)
        found = [parse_json(line, f"{path}, line {n}") for n, line in lines if line.strip()]
    else:
        found = parse_json(text, path)
        if isinstance(found, dict) and any(isinstance(part, list) for part in found.values()):
            found, picked = _part(path, found, picked)
    if not isinstance(found, list) or not found:
        raise RequestError(f"{path} holds no prompts; expected a list of texts or objects")
    return _field(path, found, picked[0]) if picked else found


def _part(path: Path, given: dict[str, Any], picked: list[str]) -> tuple[Any, list[str]]:
    """The list under the first name of an object, and the names that are left."""
    lists = [name for name, part in given.items() if isinstance(part, list)]
    if not picked or picked[0] not in lists:
        asked = f" has no list {picked[0]!r}" if picked else " is an object"
        raise RequestError(
            f"{path}{asked}; it holds the lists {', '.join(lists)}: name one, as {path}:{lists[0]}"
        )
    return given[picked[0]], picked[1:]


def _field(path: Path, found: list[Any], name: str) -> list[str]:
    """One field of each object, as texts."""
    texts = []
    for number, one in enumerate(found, start=1):
        if not isinstance(one, dict) or not isinstance(one.get(name), str):
            names = ", ".join(map(str, one)) if isinstance(one, dict) else repr(one)[:60]
            raise RequestError(f"{path}, entry {number} has no text {name!r}; it holds {names}")
        texts.append(one[name])
    return texts


def _table(path: Path, text: str, sign: str, picked: list[str]) -> list[Any]:
    """Rows by their header: all fields that are known, or one column as texts."""
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(text), delimiter=sign) if any(row)]
    except (ValueError, csv.Error) as error:
        why = f": {error}" if isinstance(error, csv.Error) else ""
        raise RequestError(f"{path} holds no prompts; expected a header and rows{why}") from error
    if not picked and all(_is_mmlu(row) for row in (header, *rows)):
        header, rows = list(MMLU), [header, *rows]
    columns = [name.strip() for name in header]
    shown = ", ".join(repr(name) for name in columns)
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise RequestError(f"{path} has the column {twice[0]!r} twice; its columns are {shown}")
    for number, row in enumerate(rows, start=1):
        if len(row) > len(columns):
            raise RequestError(f"{path}, entry {number} has {len(row)} cells, expected {shown}")
    if not rows:
        raise RequestError(f"{path} holds no prompts below its header {shown}")
    cells = [dict(zip(columns, row, strict=False)) for row in rows]
    if picked:
        if picked[0] not in columns:
            raise RequestError(
                f"{path} has no column {picked[0]!r}{nearest(picked[0], columns)}; it has {shown}"
            )
        return [row.get(picked[0], "") for row in cells]
    spelled = {name: name.lower() if name.lower() in KNOWN else name for name in columns}
    if not {*PROMPTS, *SIDES} & set(spelled.values()):
        raise RequestError(
            f"{path} has the columns {shown} and none of {', '.join((*PROMPTS, *SIDES))}: name "
            f"the one that holds prompts, as {path}:{columns[-1]}"
        )
    if set(MMLU) <= set(columns):
        return [_mmlu(row) for row in cells]
    return [{spelled[k]: _cell(spelled[k], v) for k, v in row.items() if v} for row in cells]


def _is_mmlu(row: Sequence[str]) -> bool:
    """Whether a row is one of MMLU's own files, which have no header."""
    return len(row) == len(MMLU) and row[-1].strip() in MMLU[1:-1]


def _mmlu(row: dict[str, str]) -> dict[str, object]:
    """A question whose choices have a column each."""
    return {
        "question": row["question"],
        "choices": [row[letter] for letter in MMLU[1:-1]],
        "answer": row["answer"].strip(),
    }


def _cell(name: str, value: str) -> object:
    """A cell's value: texts, and a whole number where the field is one."""
    return int(value) if name == "correct" and value.strip().isdecimal() else value
