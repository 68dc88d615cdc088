"""Files of directions: safetensors with attributes in the metadata, checked as they are read."""

import json
from pathlib import Path
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.steering.direction import FORMAT, Direction, DirectionSet
from interp_steer.util import tensor_file
from interp_steer.util.files import whole


def read(path: Path) -> Direction | DirectionSet:
    """A file of either kind; see `direction.load`."""
    from interp_steer.features.feature import with_present_maximum

    if not path.is_file():
        raise RequestError(f"no direction file {path}")
    with tensor_file.opened(path) as file:
        about = file.metadata() or {}
        if about.get("format") == FORMAT:
            entries = tensor_file.parsed(about, "members")
            if not isinstance(entries, list) or not entries:
                raise ValueError("it lists no members")
            members = [_member(file, about["name"], entry) for entry in entries]
            if {entry["hook_point"] for entry in entries} != set(file.keys()):
                raise ValueError("its members are not its tensors")
            members = [with_present_maximum(member) for member in members]
            one = about["kind"] == "direction" and len(members) == 1
            return members[0] if one else DirectionSet(members, about["name"])
    raise RequestError(f"{path} is a safetensors file but not a direction ({FORMAT})")


def _member(file: Any, name: str, entry: object) -> Direction:
    """One direction of a file; raises ValueError where it says what cannot be."""
    if not isinstance(entry, dict):
        raise ValueError("a member is no list of facts by name")
    hook, norm = entry["hook_point"], entry["norm"]
    if not isinstance(hook, str) or not isinstance(norm, str):
        raise ValueError("a member's hook point and norm are texts")
    source = tensor_file.texts(entry["source"], "a member's source")
    vector = tensor_file.floats(file, hook, axes=1)
    return Direction(vector, hook, float.fromhex(norm), name, source, entry["max_activation"])


def write(path: Path, name: str, members: list[Direction], kind: str) -> Path:
    """Writes directions and all their attributes, whole or not at all."""
    from safetensors.torch import save

    about = [
        {
            "hook_point": m.hook_point,
            "norm": m.norm.hex(),
            "source": dict(m.source),
            "max_activation": m.max_activation,
        }
        for m in members
    ]
    metadata = {"format": FORMAT, "kind": kind, "name": name, "members": json.dumps(about)}
    if len(metadata["members"]) > tensor_file.LARGEST_HEADER // 2:
        raise RequestError(f"the source of {name} is too long to be stored with it")
    data = save({m.hook_point: m.unit.contiguous() for m in members}, metadata)
    with whole(path) as part:
        part.write_bytes(data)
    return path
