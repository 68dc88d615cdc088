"""Where clients put steering in a request, and what it means in our grammar.

| a request has | of |
|---|---|
| `steering`: a text | our one line, such as "add(eiffel, 0.5 dose) at 13" |
| `steering`: `[{"vector", "layer", "coefficient"}]` | ours |
| `steering`: `[{"point", "layers"}]` | interp-engine |
| `steering`: `{"vectors": [...]}` | EasySteer |
| `vllm_xargs`: `{"hotwire": "..."}` | hotwire-vllm |
| `vllm_xargs`: `{"apply_steering_vectors": "..."}` | vllm-lens |
| a model's name `base+setting` | any client |

Vectors are known by name, or are in the request; a path is neither. What another tool does at every
position is `all+first` here. What we do not do as it does is refused, never approximated.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp_steer.errors import RequestError, nearest
from interp_steer.model.site import Site
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import Reader, parse
from interp_steer.steering.intervention import Intervention, Scope, Vector

Known = Mapping[str, Vector]
FIELDS = ("steering", "vllm_xargs")
MISSPELT = ("steer", "steering_vectors", "steering_vector", "steer_vectors", "interventions")
XARGS = ("hotwire", "apply_steering_vectors")
EVERYWHERE, PROMPT = Scope(first=True), Scope("prompt", first=True)
MOST = 256  # vectors in one request
SHOWN = (
    'such as \'add(NAME, 0.5 dose) at 13\' or [{"vector": "NAME", "layer": 13, "coefficient": 8}]'
)
LARGEST = 2**26  # bytes of one vector after decompression


def carried(body: Mapping[str, Any], known: Known) -> tuple[Intervention, ...] | None:
    """The steering of a request's fields; None where it has none.

    Raises:
        RequestError: two carriers, a misspelt field, an unknown vector, or what we do not do.
    """
    for name in MISSPELT:
        if name in body:
            raise RequestError(f"unknown field {name!r}; steering is in 'steering', {SHOWN}")
    extra = body.get("vllm_xargs")
    if extra is not None and not isinstance(extra, Mapping):
        raise RequestError("vllm_xargs is no object")
    xargs = [name for name in XARGS if extra and name in extra]
    carriers = [*(["steering"] if body.get("steering") is not None else []), *xargs]
    if len(carriers) > 1:
        raise RequestError(f"steering comes in {' and in '.join(carriers)}; expected one of them")
    if not carriers:
        return None
    given = body["steering"] if carriers == ["steering"] else (extra or {})[carriers[0]]
    if carriers == ["hotwire"]:
        return _hotwire(_json(given, "hotwire"), known)
    if carriers == ["apply_steering_vectors"]:
        return _vllm_lens(_json(given, "apply_steering_vectors"))
    if isinstance(given, str):
        try:
            return parse(given, known)
        except RequestError as error:
            raise RequestError(f"{error}; {SHOWN}") from None
    if isinstance(given, Mapping):
        return _easysteer(given, known)
    if isinstance(given, list) and given and all(isinstance(one, Mapping) for one in given):
        if any("layers" in one for one in given):
            return _interp_engine(given, body.get("steer_generated", True))
        return tuple(_ours(one, known) for one in given)
    raise RequestError(f"steering is {type(given).__name__}; expected {SHOWN}")


def _ours(given: Mapping[str, Any], known: Known) -> Intervention:
    """`{"vector": name, "layer": 13, "coefficient": 8, "scope": "all", "operator": "add"}`."""
    _only(given, ("vector", "layer", "coefficient", "scope", "operator"), "steering")
    scope = Reader(str(given.get("scope", "all"))).only(Reader.scope)
    return Intervention(
        str(given.get("operator", "add")),
        (vector_of(given.get("vector"), known),),
        _number(given, "coefficient"),
        "",
        (_layer(given),),
        scope,
    )


def _hotwire(given: Any, known: Known) -> tuple[Intervention, ...]:
    """`{"id": name, "layer": L, "scale": s}`: the scale multiplies the stored vector."""
    found = []
    for one in _mappings(given, "hotwire"):
        _only(one, ("id", "layer", "scale", "decode_only"), "hotwire")
        if one.get("decode_only"):
            raise RequestError(
                "decode_only steers what was generated but not the prompt's last position, which "
                "no scope here does; scope 'generated' of our own line has both"
            )
        vector = vector_of(one.get("id"), known)
        site = (_layer(one),)
        found.append(
            Intervention("add", (vector,), _number(one, "scale", 1.0), "raw", site, EVERYWHERE)
        )
    return tuple(found)


def _easysteer(given: Mapping[str, Any], known: Known) -> tuple[Intervention, ...]:
    """`{"vectors": [{"source": name, "scale", "layers", "apply": {"prompt", "generation"}}]}`."""
    _only(given, ("vectors", "conflict", "debug"), "steering")
    found = []
    scopes = {("all", "all"): EVERYWHERE, ("all", "none"): PROMPT}
    for one in _mappings(given.get("vectors"), "steering.vectors"):
        fields = ("source", "algorithm", "scale", "layers", "normalize", "apply")
        _only(one, fields, "steering.vectors")
        if one.get("algorithm", "direct") != "direct" or one.get("normalize"):
            raise RequestError("of EasySteer's algorithms only 'direct' without normalize is here")
        told = one.get("apply")
        if not isinstance(told, Mapping):
            raise RequestError('steering.vectors needs apply: {"prompt": "all", ...}')
        _only(told, ("prompt", "generation"), "apply")
        applied = (str(told.get("prompt", "none")), str(told.get("generation", "none")))
        if applied not in scopes:
            raise RequestError(
                f"apply is {dict(told)}; expected prompt 'all' with generation 'all' or 'none'"
            )
        layers = one.get("layers")
        if not isinstance(layers, list) or not layers:
            raise RequestError("steering.vectors needs layers, such as [13]")
        sites = tuple(_layer({"layer": layer}) for layer in layers)
        name = str(one.get("source")).removesuffix(".gguf")
        vector = vector_of(name, known)
        scale = _number(one, "scale", 1.0)
        found.append(Intervention("add", (vector,), scale, "raw", sites, scopes[applied]))
    return tuple(found)


def _interp_engine(given: Sequence[Any], generated: Any) -> tuple[Intervention, ...]:
    """`[{"point": "resid_post", "layers": {"13": [{"method", "vector", ...}]}}]`."""
    scope = EVERYWHERE if generated is not False else PROMPT
    found: list[Intervention] = []
    for spec in given:
        _only(spec, ("point", "stream", "layers"), "steering")
        point = spec.get("point", "resid_post")
        if point != "resid_post" or spec.get("stream") is not None:
            raise RequestError(f"steering at {point!r}; here vectors in a request go to resid_post")
        layers = spec.get("layers")
        if not isinstance(layers, Mapping):
            raise RequestError('steering needs layers, such as {"13": [...]}')
        for layer, operations in layers.items():
            site = _layer({"layer": int(layer) if str(layer).isdecimal() else layer})
            for one in _mappings(operations, f"layers.{layer}"):
                found.append(_operation(one, site, scope))
    if len(found) > MOST:
        raise RequestError(f"{len(found)} operations; expected at most {MOST}")
    return tuple(found)


def _operation(one: Mapping[str, Any], site: Site, scope: Scope) -> Intervention:
    """One of interp-engine's operations."""
    method = one.get("method")
    vector = _inline(_tensor(one.get("vector")), site)
    fields = {
        "additive": ("scale", "normalize"), "ablate": (), "projection_cap": ("min", "max"),
    }  # fmt: skip
    if method not in fields:
        raise RequestError(f"method {method!r} is not done here{nearest(method, fields)}")
    _only(one, ("method", "vector", *fields[method]), f"method {method}")
    if method == "ablate":
        return Intervention("ablate", (vector,), 0.0, "", (site,), scope)
    if method == "additive":
        unit = "" if one.get("normalize") else "raw"
        return Intervention("add", (vector,), _number(one, "scale"), unit, (site,), scope)
    low, high = one.get("min"), one.get("max")
    if low is None and high is None:
        raise RequestError("projection_cap needs min, max or both")
    if low is not None and high is not None and low != high:
        raise RequestError("projection_cap between two bounds is not done here; give one, or equal")
    kind = "clamp" if low == high else "clamp_min" if high is None else "clamp_max"
    value = _number(one, "max" if low is None else "min")
    return Intervention(kind, (vector,), value, "", (site,), scope)


def _vllm_lens(given: Any) -> tuple[Intervention, ...]:
    """`[{"activations": {...}, "layer_indices": [L], "scale": 1.0}]`: every position."""
    found = []
    for one in _mappings(given, "apply_steering_vectors"):
        fields = ("activations", "layer_indices", "scale", "norm_match", "position_indices")
        _only(one, fields, "apply_steering_vectors")
        if one.get("norm_match") or one.get("position_indices") is not None:
            raise RequestError("norm_match and position_indices are not done here")
        rows, layers = _tensor(one.get("activations")), one.get("layer_indices")
        if not isinstance(layers, list) or rows.ndim != 2 or len(rows) != len(layers):
            raise RequestError(
                f"activations have shape {list(rows.shape)}; expected a row for each of "
                "layer_indices, for all positions"
            )
        scale = _number(one, "scale", 1.0)
        for layer, row in zip(layers, rows, strict=True):
            site = _layer({"layer": layer})
            vector = (_inline(row, site),)
            found.append(Intervention("add", vector, scale, "raw", (site,), EVERYWHERE))
    return tuple(found)


# --- parts ------------------------------------------------------------------------------------


def _only(given: Mapping[str, Any], fields: Sequence[str], what: str) -> None:
    """Refuses fields that would be ignored."""
    for name in given:
        if name not in fields:
            raise RequestError(f"unknown field {name!r} in {what}{nearest(name, fields)}")


def _mappings(given: Any, what: str) -> list[Mapping[str, Any]]:
    some = [given] if isinstance(given, Mapping) else given
    if not isinstance(some, list) or not some or not all(isinstance(x, Mapping) for x in some):
        raise RequestError(f"{what} is no list of objects")
    if len(some) > MOST:
        raise RequestError(f"{what} has {len(some)} entries; expected at most {MOST}")
    return some


def vector_of(name: Any, known: Known) -> Vector:
    """The vector of that name; raises RequestError with the nearest if there is none."""
    if not isinstance(name, str):
        raise RequestError("a vector is called by its name, a text")
    try:
        return known[name]
    except KeyError:
        raise RequestError(f"unknown vector {name[:80]!r}{nearest(name, known)}") from None


def _layer(given: Mapping[str, Any]) -> Site:
    layer = given.get("layer")
    if type(layer) is not int or not 0 <= layer < 10_000:
        raise RequestError(f"layer is {layer!r}; expected a number from 0")
    return Site("resid_post", layer)


def _number(given: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; expected a number")
    return float(value)


def _json(given: Any, what: str) -> Any:
    """vLLM's type has no lists of objects, so that they come as JSON inside a text."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} is no JSON: {error}") from None


def _inline(vector: Tensor, site: Site) -> Direction:
    """A direction out of a request."""
    if vector.ndim != 1 or not len(vector):
        raise RequestError(f"a vector has shape {list(vector.shape)}; expected one axis")
    return Direction.of(vector, site.hook_point, "inline", {"method": "request"})


_NUMBERS: dict[str, Callable[[bytes], Tensor]] = {
    "float32": lambda raw: torch.from_numpy(np.frombuffer(raw, "<f4").copy()),
    "float16": lambda raw: torch.from_numpy(np.frombuffer(raw, "<f2").astype(np.float32)),
    "bfloat16": lambda raw: torch.from_numpy(np.frombuffer(raw, "<i2").copy()).view(torch.bfloat16),
}


def _tensor(given: Any) -> Tensor:
    """Numbers, or bytes in base64 with dtype and shape, as vllm-lens and interp-engine do."""
    if isinstance(given, list):
        try:
            return torch.tensor(given, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise RequestError(f"a vector holds what is no number: {str(error)[:80]}") from None
    if not isinstance(given, Mapping) or not isinstance(given.get("data"), str):
        raise RequestError("a vector is a list of numbers, or {dtype, shape, data}")
    dtype, shape = given.get("dtype"), given.get("shape")
    if dtype == "int16" and given.get("original_dtype") == "torch.bfloat16":
        dtype = "bfloat16"  # vllm-lens's way: the same bits
    if dtype not in _NUMBERS:
        raise RequestError(f"dtype {dtype!r}{nearest(dtype, _NUMBERS)}")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise RequestError(f"shape is {shape!r}; expected a list of numbers")
    try:
        raw = base64.b64decode(given["data"], validate=True)
    except ValueError as error:
        raise RequestError(f"data is no base64: {error}") from None
    size = math.prod(shape) * (4 if dtype == "float32" else 2)
    if size > LARGEST:
        raise RequestError(f"a vector of {size:,} bytes; expected at most {LARGEST:,}")
    if compression := given.get("compression"):
        raw = _decompressed(raw, compression, size)
    if len(raw) != size:
        raise RequestError(f"data has {len(raw):,} bytes, and shape {shape} needs {size:,}")
    return _NUMBERS[dtype](raw).float().view(shape)


def _decompressed(raw: bytes, kind: Any, size: int) -> bytes:
    """Bytes that were packed by zstd; no more than are expected."""
    if kind != "zstd":
        raise RequestError(f"compression {kind!r}; expected 'zstd', or none")
    try:
        import zstandard
    except ImportError:
        raise RequestError(
            "this server was installed without zstandard; send the bytes without compression"
        ) from None
    try:  # a stream, as a frame may say that it holds more than it may
        return zstandard.ZstdDecompressor().stream_reader(raw).read(size + 1)
    except zstandard.ZstdError as error:
        raise RequestError(f"data cannot be decompressed: {error}") from None
