"""GGUF control vectors: llama.cpp's `--control-vector`, and repeng's files.

A tensor `direction.L` (float32, one axis, L from 1) is added to the output of block L at every
position. llama.cpp reads the tensors alone; repeng asks for `controlvector.model_hint` as well.
Block 0 has no number there.
"""

from pathlib import Path

import torch

from interp_steer.errors import RequestError, RunError
from interp_steer.export.constant import Constants, refuse_others
from interp_steer.model.site import Site
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.util.files import explained, whole

KIND = "controlvector"
HINT = "llama"  # the model_type, as repeng has it


def check(found: Constants, path: Path) -> None:
    """Refuses a site that is no resid_post, block 0, and a name that llama.cpp would misread."""
    refuse_others(found, ("resid_post",), "a control vector")
    if any(site.layer == 0 for site in found):
        raise RequestError(
            "a control vector has no layer 0: its `direction.1` is block 1. Take `export "
            "steered-gguf` or `export checkpoint`, or steer at layer 1 or later"
        )
    if ":" in path.name:
        raise RequestError(
            f"{path.name}: llama.cpp takes what follows a colon for a strength; expected a name "
            "without one"
        )


def write(found: Constants, path: Path) -> Path:
    """Writes vectors at their full length, for a strength of 1; raises RequestError as `check`."""
    import gguf

    check(found, path)
    with whole(path) as part:
        writer = gguf.GGUFWriter(part, KIND)
        writer.add_string(f"{KIND}.model_hint", HINT)
        writer.add_uint32(f"{KIND}.layer_count", len(found))
        for site, vector in found.items():
            writer.add_tensor(f"direction.{site.layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def read(path: Path, name: str) -> DirectionSet:
    """The vectors of a file, each at its length.

    Raises:
        RunError: it cannot be read, or holds no vectors.
    """
    import gguf

    with explained(path), path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RunError(f"{path} is damaged or not a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        tensors = [(tensor.name, torch.from_numpy(tensor.data.copy())) for tensor in reader.tensors]
    except Exception as error:  # gguf's reader believes what it reads
        raise RunError(f"{path} is damaged: {str(error)[:200]}") from error
    members = []
    for key, vector in tensors:
        before, _, layer = key.partition(".")
        if before != "direction" or not layer.isdecimal() or not 0 < int(layer) < 10_000:
            raise RunError(
                f"{path} holds {key[:60]!r}; a control vector holds direction.1, direction.2 ..."
            )
        if vector.ndim != 1 or vector.dtype != torch.float32:
            raise RunError(f"{path}: {key} is not float32 numbers on one axis")
        if vector.any():  # a layer that is left alone
            source = {"method": "GGUF control vector", "file": path.name}
            hook_point = Site("resid_post", int(layer)).hook_point
            members.append(Direction.of(vector, hook_point, name, source))
    if not members:
        raise RunError(f"{path} holds no direction that is not zero")
    return DirectionSet(members, name)
