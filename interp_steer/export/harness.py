"""The file of lm-eval's model `steered` (EleutherAI, lm-evaluation-harness 0.4.13).

    lm_eval --model steered --model_args pretrained=DIR,steer_path=steer.pt --tasks arc_easy

An entry is a module of transformers whose output is changed at every position, padding included.
The vector is written at its full length with a coefficient of 1: lm-eval casts it to the model's
format first and multiplies then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.export.constant import EVERYWHERE, Constants, constants, refuse_others
from interp_steer.model.model import SteeringModel
from interp_steer.model.shape import Bounds
from interp_steer.model.site import Site
from interp_steer.steering.intervention import Intervention, brief
from interp_steer.util.files import whole

SUFFIXES = (".pt", ".pth")


def entries(steps: Sequence[Intervention], model: SteeringModel | Bounds) -> dict[str, Any]:
    """lm-eval's entries of a line: constant adds, and clamps of one direction with `all+first`.

    Raises:
        RequestError: another step; two of them at one module.
    """
    clamps = [one for one in steps if one.operator in ("clamp", "ablate")]
    adds = [one for one in steps if one not in clamps]
    found: dict[str, Any] = {}
    for one in clamps:
        if one.scope != EVERYWHERE or one.gate:
            raise RequestError(
                f"cannot export {brief([one])!r}: lm-eval clamps at every position; write it with "
                "`on all+first` and without a condition"
            )
        one.check(model)
        for site, value in zip(one.sites, one.lengths(), strict=True):
            key = _module(site)
            if key in found:
                raise RequestError(f"lm-eval changes {key} once, and the line clamps it twice")
            found[key] = _entry(one.at(site)[0].unit, value or 0.0, "clamp")
    added: Constants = constants(adds, model) if adds or not clamps else {}
    refuse_others(added, ("resid_post", "attn_out", "resid_pre"), "lm-eval")
    for site, vector in added.items():
        key = _module(site)
        if key in found:
            raise RequestError(f"lm-eval changes {key} once, and the line adds and clamps there")
        found[key] = _entry(vector, 1.0, "add")
    return found


def write(found: dict[str, Any], path: Path) -> Path:
    """Writes entries; raises RequestError for a name that lm-eval would not read."""
    import torch

    if path.suffix not in SUFFIXES:
        raise RequestError(f"{path.name}: lm-eval reads {' or '.join(SUFFIXES)} files")
    with whole(path) as part:
        torch.save(found, part)
    return path


def _entry(vector: Any, coefficient: float, action: str) -> dict[str, Any]:
    return {
        "steering_vector": vector.clone(), "steering_coefficient": coefficient, "action": action,
        "bias": None, "head_index": None,
    }  # fmt: skip


def _module(site: Site) -> str:
    """The module whose output is the site."""
    if site.module is None:
        raise RequestError(f"lm-eval has no module whose output is {site}")
    return site.module
