"""Directions from other tools' files and objects.

    imported("warm.gguf", name="warm")                     # llama.cpp, repeng: its own layers
    imported("v.npy", at="15", name="warm")                # one vector, one layer
    imported("all.pt", at="0-31", name="warm")             # a row a layer
    imported(control_vector, name="warm")                  # a repeng or steering-vectors object

Nothing in a file is run: pickles are read as weights only.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp_steer.errors import RequestError, RunError, first_line, nearest
from interp_steer.export import control_vector
from interp_steer.model.site import Site
from interp_steer.steering.direction import Direction, DirectionSet, load, together
from interp_steer.steering.file import FORMAT
from interp_steer.steering.grammar import Reader
from interp_steer.util import tensor_file
from interp_steer.util.files import explained

SUFFIXES = (".gguf", ".npy", ".pt", ".pth", ".bin", ".safetensors")
_NUMBERED = re.compile(r"(?:(?:.*[._])?(?:layers?|blocks?|direction|h)[._]?)?(\d{1,4})")


def imported(
    given: Any, *, at: str | int | None = None, name: str = "imported", key: str | None = None
) -> Direction | DirectionSet:
    """A direction from a file, an array or an object of another tool.

    Args:
        given: a path; an array or tensor `[d_model]` or `[layer, d_model]`; a mapping of layers to
            vectors; a repeng `ControlVector` or a steering-vectors `SteeringVector`, whose layer L
            is the output of block L (`resid_post`).
        at: the layer or the sites, where what is given does not say: "15", "mlp_out 12", "0-31".
        key: which tensor of a file that holds several.

    Raises:
        RequestError: it is none of these, or the layers are not said.
        RunError: a damaged file.
    """
    if isinstance(given, (str, Path)):
        return _from_file(Path(given), at, name, key)
    if isinstance(given, (Direction, DirectionSet)):
        return given.named(name)
    for attribute, tool in (("directions", "repeng"), ("layer_activations", "steering-vectors")):
        layers = getattr(given, attribute, None)
        if isinstance(layers, Mapping):
            if getattr(given, "layer_type", "decoder_block") != "decoder_block":
                raise RequestError(
                    f"this vector is of {given.layer_type!r}; only those of whole blocks "
                    "('decoder_block') are read"
                )
            return _by_site(layers, name, {"method": tool})
    if isinstance(given, Mapping):
        return _by_site(given, name, {})
    return _placed(_numbers(given, "what is given"), at, name, {})


def _from_file(
    path: Path, at: str | int | None, name: str, key: str | None
) -> Direction | DirectionSet:
    if not path.is_file():
        raise RequestError(f"no file {path}")
    source = {"method": "imported", "file": path.name} | ({"tensor": key} if key else {})
    if path.suffix == ".gguf":
        return control_vector.read(path, name)
    if path.suffix == ".npy":
        try:
            with explained(path):
                array = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise RunError(f"{path} is damaged or holds objects: {first_line(error)}") from error
        return _placed(_numbers(array, path), at, name, source)
    if path.suffix == ".safetensors":
        with tensor_file.opened(path) as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
            keys = list(file.keys())
        if ours:
            return load(path).named(name)
        chosen = _chosen(path, keys, key, at)
        with tensor_file.opened(path) as file:
            found: Any = {one: file.get_tensor(one) for one in chosen}
        return _of_tensors(found, path, at, name, key, source)
    if path.suffix in SUFFIXES:
        try:
            with explained(path):
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            if "weights_only" in str(error) or "Unsupported" in str(error):
                raise RequestError(
                    f"{path} holds objects, and reading them would run their code: load it with "
                    "the tool that wrote it, and give the object to imported(...) in Python"
                ) from None
            raise RunError(f"{path} is damaged: {first_line(error)}") from error
        if isinstance(found, Mapping):
            return _of_tensors(found, path, at, name, key, source)
        return _placed(_numbers(found, path), at, name, source)
    raise RequestError(f"{path.name}: expected a {', '.join(SUFFIXES)} file")


def _chosen(path: Path, keys: list[str], key: str | None, at: str | int | None) -> list[str]:
    """The tensors to be read: one, or one for each layer."""
    if key is not None:
        if key not in keys:
            raise RequestError(f"{path} has no tensor {key!r}{nearest(key, keys)}")
        return [key]
    placed = [one for one in keys if _site(one) is not None]
    if len(keys) > 1 and (at is not None or len(placed) < len(keys)):
        shown = ", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "")
        raise RequestError(f"{path} holds {len(keys)} tensors; name one by --key: {shown}")
    return keys


def _of_tensors(
    found: Mapping[Any, Any], path: Path, at: str | int | None, name: str, key: str | None,
    source: Mapping[str, str],
) -> Direction | DirectionSet:  # fmt: skip
    """From tensors by name: the one that is asked for, or all by their layers."""
    tensors = {str(k): _of_lm_eval(v) if isinstance(v, Mapping) else v for k, v in found.items()}
    tensors = {k: v for k, v in tensors.items() if isinstance(v, (Tensor, np.ndarray))}
    if not tensors:
        raise RequestError(f"{path} holds no tensor")
    names = _chosen(path, list(tensors), key, at)
    if len(names) == 1 and (at is not None or _site(names[0]) is None):
        return _placed(_numbers(tensors[names[0]], path), at, name, source)
    return _by_site({k: tensors[k] for k in names}, name, source)


def _of_lm_eval(entry: Mapping[str, Any]) -> Any:
    """What an entry adds, or the direction that it clamps to a value."""
    vector = entry.get("steering_vector")
    if isinstance(vector, Tensor) and entry.get("action") == "add":
        return vector * float(entry.get("steering_coefficient", 1.0))
    return vector


def _site(key: Any) -> Site | None:
    """The site that a tensor's name says: a hook point, a module, or a block's number."""
    with suppress(RequestError):
        return Site.parse(str(key))
    found = _NUMBERED.fullmatch(str(key))
    return Site("resid_post", int(found[1])) if found else None


def _by_site(
    given: Mapping[Any, Any], name: str, source: Mapping[str, str]
) -> Direction | DirectionSet:
    """From vectors by layer or module; one that is zero leaves its layer alone."""
    members = []
    for key, numbers in given.items():
        site, vector = _site(key), _numbers(numbers, key)
        if site is None:
            raise RequestError(f"{key!r} is no layer; expected a number")
        if vector.ndim != 1:
            raise RequestError(f"{key} has shape {list(vector.shape)}, expected one axis")
        if vector.any():
            members.append(Direction.of(vector, site.hook_point, name, source))
    return _together(members, name)


def _together(members: list[Direction], name: str) -> Direction | DirectionSet:
    """One direction, or a set of them."""
    if not members:
        raise RequestError("every number is zero: it points nowhere")
    return together(members, name)


def _placed(
    vector: Tensor, at: str | int | None, name: str, source: Mapping[str, str]
) -> Direction | DirectionSet:
    """One vector at one site, or a row a site."""
    if at is None:
        raise RequestError(
            f"numbers of shape {list(vector.shape)} do not say where they belong: give --at, such "
            "as --at 15 (the output of block 15, counted from 0) or --at 'mlp_out 15'"
        )
    sites = Reader(str(at)).only(Reader.sites)
    rows = vector[None] if vector.ndim == 1 else vector
    if rows.ndim != 2 or (vector.ndim == 2 and len(rows) != len(sites)):
        raise RequestError(
            f"numbers of shape {list(vector.shape)} for {len(sites)} sites; expected [d_model], or "
            f"[{len(sites)}, d_model]"
        )
    if vector.ndim == 1 and len(sites) > 1:
        raise RequestError(f"one vector has one home, and --at names {len(sites)} sites")
    members = [
        Direction.of(row, site.hook_point, name, source)
        for site, row in zip(sites, rows, strict=True)
        if row.any()
    ]
    return _together(members, name)


def _numbers(given: Any, what: object) -> Tensor:
    """As float32, or float64 where it is; bfloat16 and halves are widened."""
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        given = torch.from_numpy(given.astype(np.promote_types(given.dtype, np.float32)))
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = getattr(given, "dtype", type(given).__name__)
        raise RequestError(f"{what} is {kind}; expected floating-point numbers")
    return given.detach().to("cpu", torch.promote_types(given.dtype, torch.float32))
