"""Steering in a request: what vllm-lens and interp-engine expect, as JSON."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.export.constant import NOTHING, Constants, refuse_others
from interp_steer.model.model import SteeringModel
from interp_steer.model.shape import Bounds
from interp_steer.steering.intervention import CLAMPS, Intervention, brief


def vllm_lens(found: Constants) -> dict[str, Any]:
    """The field of a completion request to vLLM with vllm-lens 1.3: every position.

    Its type allows texts, numbers and lists, so that the vectors are JSON inside a text.

    Raises:
        RequestError: a site that is no resid_post.
    """
    refuse_others(found, ("resid_post",), "vllm-lens")
    activations = torch.stack([*found.values()])
    vector = {
        "activations": {
            "data": _base64(activations),
            "dtype": "float32",
            "original_dtype": "torch.float32",
            "shape": list(activations.shape),
        },
        "layer_indices": [site.layer for site in found],
        "scale": 1.0,
        "norm_match": False,
        "position_indices": None,
    }
    return {"vllm_xargs": {"apply_steering_vectors": json.dumps([vector])}}


def interp_engine(steps: Sequence[Intervention], model: SteeringModel | Bounds) -> dict[str, Any]:
    """The fields of a request to interp-engine 1.14: `add`, `clamp`, one-sided clamps, `ablate`.

    Every position of the prompt, and of the answer: scope `all+first`, or `prompt+first`.

    Raises:
        RequestError: an operator, a scope or a site that it has not; two clamps at one site, which
            hold jointly here and one after the other there.
    """
    if not steps:
        raise RequestError(NOTHING)
    scopes = {(one.scope.kind, one.scope.first) for one in steps}
    if len(scopes) > 1 or not scopes <= {("all", True), ("prompt", True)}:
        raise RequestError(
            "interp-engine steers every position, or every one of the prompt: write all steps "
            "with `on all+first`, or all with `on prompt+first` (--include-first adds `+first`)"
        )
    layers: dict[str, list[dict[str, Any]]] = {}
    clamped: set[str] = set()
    for one in steps:
        if one.gate or (one.operator != "add" and one.operator not in CLAMPS):
            raise RequestError(
                f"cannot export {brief([one])!r}: interp-engine adds, clamps and ablates, without "
                "a condition"
            )
        one.check(model)
        for site, length in zip(one.sites, one.lengths(), strict=True):
            if site.component != "resid_post":
                raise RequestError(f"this export is for resid_post, and the line steers at {site}")
            layer = str(site.layer)
            if one.operator in CLAMPS and layer in clamped:
                raise RequestError(
                    f"two clamps at {site} hold jointly here and one after the other in "
                    "interp-engine: export one of them"
                )
            clamped |= {layer} if one.operator in CLAMPS else set()
            layers.setdefault(layer, []).append(_op(one, one.at(site)[0].unit, length or 0.0))
    ((kind, _),) = scopes
    spec = {"point": "resid_post", "stream": None, "layers": layers}
    return {"steering": [spec], "steer_generated": kind == "all"}


def _op(one: Intervention, unit: Float[Tensor, " d_model"], length: float) -> dict[str, Any]:
    """One operation in interp-engine's words."""
    vector = {"dtype": "float32", "shape": list(unit.shape), "data": _base64(unit)}
    if one.operator == "add":
        return {"method": "additive", "vector": vector, "scale": length, "normalize": False}
    if one.operator == "ablate":
        return {"method": "ablate", "vector": vector}
    low = None if one.operator == "clamp_max" else length
    high = None if one.operator == "clamp_min" else length
    return {"method": "projection_cap", "vector": vector, "min": low, "max": high}


def _base64(numbers: Float[Tensor, "*axes"]) -> str:
    """Float32, little endian."""
    return base64.b64encode(numbers.float().numpy().astype("<f4").tobytes()).decode()
