"""Files of directions: safetensors with attributes in the metadata, checked as they are read."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.util import tensor_file
from interp_steer.util.files import whole

FORMAT = "interp-steer/1"
FOREIGN = (".gguf", ".npy", ".pt", ".pth", ".bin")  # of other tools
IMPORT = "`interp-steer direction import {} --name NAME`"

T = TypeVar("T")


Values = tuple[Float[Tensor, " d_model"], str, float, Mapping[str, str], float | None]
"""Of a direction: unit vector, hook point, norm, source, largest activation."""


def read(path: Path, made: Callable[[str, str, list[Values]], T]) -> T:
    """Reads a file of either kind.

    Args:
        made: makes it of its kind ("direction" or "set"), its name and its members' values. What
            is wrong with these is then said of the file.

    Raises:
        RequestError: there is no such file, or it is none of ours.
        RunError: the file is damaged.
    """
    if not path.is_file():
        raise RequestError(f"no direction file {path}")
    if path.suffix in FOREIGN:
        raise RequestError(f"{path} is a {path.suffix} file: {IMPORT.format(path)} reads it")
    with tensor_file.opened(path) as file:
        about = file.metadata() or {}
        if about.get("format") == FORMAT:
            entries = tensor_file.parsed(about, "members")
            if not isinstance(entries, list) or not entries:
                raise ValueError("it lists no members")
            members = [_values(file, entry) for entry in entries]
            if {entry["hook_point"] for entry in entries} != set(file.keys()):
                raise ValueError("its members are not its tensors")
            return made(about["kind"], about["name"], members)
    raise RequestError(
        f"{path} is a safetensors file but not a direction ({FORMAT}); if it holds a vector, "
        f"{IMPORT.format(path)} --at LAYER reads it"
    )


def _values(file: Any, entry: object) -> Values:
    """Those of one direction; raises ValueError where the file says what cannot be."""
    if not isinstance(entry, dict):
        raise ValueError("a member is no list of facts by name")
    hook, norm = entry["hook_point"], entry["norm"]
    if not isinstance(hook, str) or not isinstance(norm, str):
        raise ValueError("a member's hook point and norm are texts")
    source = tensor_file.texts(entry["source"], "a member's source")
    vector = tensor_file.floats(file, hook, axes=1)
    return vector, hook, float.fromhex(norm), source, entry["max_activation"]


def write(path: Path, name: str, members: Sequence[Values], kind: str) -> Path:
    """Writes directions and all their attributes, whole or not at all."""
    from safetensors.torch import save

    about = [
        {"hook_point": hook, "norm": norm.hex(), "source": dict(source), "max_activation": maximum}
        for _, hook, norm, source, maximum in members
    ]
    metadata = {"format": FORMAT, "kind": kind, "name": name, "members": json.dumps(about)}
    if len(metadata["members"]) > tensor_file.LARGEST_HEADER // 2:
        raise RequestError(f"the source of {name} is too long to be stored with it")
    data = save({hook: unit.contiguous() for unit, hook, *_ in members}, metadata)
    with whole(path) as part:
        part.write_bytes(data)
    return path
