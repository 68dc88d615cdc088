"""Directions by name: which file a name in a line of interventions stands for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from interp_steer.errors import RequestError, SteerError
from interp_steer.steering.direction import Direction, DirectionSet, is_name, load
from interp_steer.util.files import cache_dir

SUFFIX = ".safetensors"


class Directions(Mapping[str, Direction | DirectionSet]):
    """Directions by name, for `parse`: given as `NAME=FILE`, else a file, else a stored one.

    What has a slash or ends in `.safetensors` is a path. Any other name is that of a direction in
    the cache's `directions/`; only where none is stored, that of a file in the working directory.
    """

    def __init__(self, given: Sequence[str] = (), beside: Path | None = None) -> None:
        """Files are looked for in the folder `beside` first, then in the working directory.

        Raises RequestError if an entry is not of the form NAME=FILE.
        """
        self._beside = beside or Path()
        self._files: dict[str, Path] = {}
        for entry in given:
            name, sign, file = entry.partition("=")
            if not sign or not is_name(name) or not file:
                raise RequestError(f"--direction {entry!r}: expected NAME=FILE")
            self._files[name] = Path(file)

    def __getitem__(self, name: str) -> Direction | DirectionSet:
        """Raises KeyError where nothing has the name, RequestError where two things have it, and
        whatever `load` does of the one that has: no other takes a damaged file's place.
        """
        return load(self.path(name))

    def path(self, name: str) -> Path:
        """The file of a name; raises as `directions[name]` does."""
        if name in self._files:
            return self._files[name]
        if "/" in name or "\\" in name or name.lower().endswith(SUFFIX):
            if file := self._here(name):
                return file
            raise KeyError(name)
        stored, file = cache_dir("directions") / f"{name}{SUFFIX}", self._here(f"{name}{SUFFIX}")
        if _is_file(stored):
            if file and not _equal(file, stored):
                raise RequestError(
                    f"{name!r} is the stored direction {stored} and another file, {file}: for "
                    f"that one write ./{name}{SUFFIX}, or rename one of them"
                )
            return stored
        if found := file or self._here(name):
            return found
        raise KeyError(name)

    def _here(self, name: str) -> Path | None:
        """A file of that path, relative to the folder beside or to the working directory."""
        with suppress(OSError, RuntimeError):  # a name too long for a file, or an unknown ~user
            path = Path(name).expanduser()
            return next((p for p in (self._beside / path, path) if p.is_file()), None)
        return None

    def __iter__(self) -> Iterator[str]:
        kept = {path.stem for path in cache_dir("directions").glob(f"*{SUFFIX}")}
        return iter(sorted({*self._files, *kept}))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _equal(file: Path, stored: Path) -> bool:
    with suppress(SteerError):  # damaged, or no direction
        return file.resolve() == stored.resolve() or load(file) == load(stored)
    return False


def _is_file(path: Path) -> bool:
    with suppress(OSError):  # a name too long for a file
        return path.is_file()
    return False
