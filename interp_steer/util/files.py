"""Where files live, how one is written: whole or not at all, and how a stranger's text is read."""

import errno
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp_steer.errors import RequestError, RunError, SteerError

LARGEST_TEXT = 16 * 2**20  # bytes of a text file that is read whole
DEEPEST = 64  # levels of nesting
MOST_LISTS = 500_000  # lists and mappings of one text
LONGEST_NUMBER = 300  # digits of a whole number: a float still holds it


def cache_dir(*parts: str) -> Path:
    """A folder below the cache, made if it is missing.

    The cache is `INTERP_STEER_CACHE` if set, else `cache/` of the checkout that this file belongs
    to, else the user's own cache folder.

    Raises:
        RunError: the folder cannot be made.
    """
    checkout = Path(__file__).resolve().parents[2]
    if told := os.environ.get("INTERP_STEER_CACHE"):
        root = Path(os.path.expanduser(told))
    elif _is_ours(checkout / "pyproject.toml"):
        root = checkout / "cache"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "interp-steer"
    folder = root.joinpath(*parts)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_ours(path: Path) -> bool:
    """Whether it is this project's own file, not one that happens to lie in site-packages."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        return bool(found["project"]["name"] == "interp-steer")
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to read or write `path` into one clear line."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "permission denied",
            errno.EROFS: "the file system is read-only",
        }.get(error.errno or 0, error.strerror or str(error))
        raise RunError(f"{path}: {reason}") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; it takes the name `path` only if the block succeeds.

    Raises:
        RunError: the disk is full, read-only, or the folder cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        part = Path(name)
        try:
            yield part
            mask = os.umask(0)  # mkstemp is private; the finished file follows the user's umask
            os.umask(mask)
            part.chmod(0o666 & ~mask)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_text(path: Path, limit: int = LARGEST_TEXT, error: type[SteerError] = RequestError) -> str:
    """A file of UTF-8 text, without a byte order mark; at most `limit` bytes are read.

    Args:
        error: what is raised for a file that is too large or no UTF-8: `RequestError` for what a
            person wrote, `RunError` for what should be as it was written.

    Raises:
        RunError: the file cannot be read.
    """
    with explained(path), path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path} holds more than {limit:,} bytes, the most that is read of such a file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not UTF-8 text (byte {wrong.start})") from wrong


def read_lines(path: Path, error: type[SteerError] = RequestError) -> Iterator[str]:
    """The lines of a file of any length, each no longer than `read_text` reads; raises alike."""
    with explained(path), path.open("rb") as file:
        while line := file.readline(LARGEST_TEXT):
            if len(line) == LARGEST_TEXT:
                raise error(f"{path} holds a line of more than {LARGEST_TEXT:,} bytes")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as wrong:
                raise error(f"{path} is not UTF-8 text") from wrong


def parse_json(text: str, where: object, error: type[SteerError] = RequestError) -> Any:
    """What a JSON text says.

    Args:
        where: names the text in errors: a file, or a file and an entry.
        error: what is raised; see `read_text`.

    Raises:
        error: it is no JSON; it is nested more than 64 levels deep; it holds more than 500,000
            lists and objects, a whole number of more than 300 digits, half a character, or one key
            twice.
    """
    too_much = _too_much(text)
    if too_much:
        raise error(f"{where} {too_much}")
    try:
        found = json.loads(text, parse_int=whole_number, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as wrong:
        raise error(f"{where} is not valid JSON: {wrong}") from wrong
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:  # no file and no terminal can hold a lone surrogate
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as wrong:
            half = wrong.object[wrong.start]
            raise error(f"{where} holds half a character, {half!a}") from wrong
    return found


def whole_number(text: str) -> int:
    """The number that digits stand for; ValueError beyond 300 of them."""
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a whole number of {len(text)} digits, expected at most {LONGEST_NUMBER}")
    return int(text)


def _too_much(text: str) -> str:
    """What is wrong with the lists of a JSON text, told before it is read; or nothing."""
    lists = text.count("[") + text.count("{")
    if lists <= DEEPEST:
        return ""
    depth = lists = 0
    for found in re.finditer(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', text, re.DOTALL):
        mark = found[0]
        if mark in ("[", "{"):
            lists, depth = lists + 1, depth + 1
            if depth > DEEPEST:
                return f"is nested more than {DEEPEST} levels deep"
            if lists > MOST_LISTS:
                return f"holds more than {MOST_LISTS:,} lists and objects"
        elif mark in ("]", "}"):
            depth -= 1
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return made
