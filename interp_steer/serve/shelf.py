"""Directions that requests name: those of a folder, and those that the page has made."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

from interp_steer.steering.direction import is_name, load
from interp_steer.steering.intervention import Vector

MOST = 256  # made ones that are kept


class Shelf(Mapping[str, Vector]):
    """The directions of one folder, by their names. A name from the network is never a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, tuple[int, Vector]] = {}
        self._made: OrderedDict[str, Vector] = OrderedDict()
        self._lock = Lock()

    def put(self, vector: Vector) -> Vector:
        """Keeps one that was made, until the server ends or many others came. A stored one of that
        name stays what it is: the new one gets a number.
        """
        with self._lock:
            name, number = vector.name, 2
            while name in set(self._stored()) or (
                name in self._made and self._made[name].sha != vector.sha
            ):
                name, number = f"{vector.name}-{number}", number + 1
            self._made[name] = vector.named(name)
            self._made.move_to_end(name)
            while len(self._made) > MOST:
                self._made.popitem(last=False)
            return self._made[name]

    def __getitem__(self, name: str) -> Vector:
        if name in self._made:
            return self._made[name]
        if not is_name(name) or name not in set(self._stored()):
            raise KeyError(name)
        file = self.path / f"{name}.safetensors"
        written = file.stat().st_mtime_ns
        if name not in self._read or self._read[name][0] != written:
            self._read[name] = written, load(file).named(name)
        return self._read[name][1]

    def _stored(self) -> Iterator[str]:
        return (path.stem for path in self.path.glob("*.safetensors"))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._stored(), *self._made}))

    def __len__(self) -> int:
        return len(list(iter(self)))
