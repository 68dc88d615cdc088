"""How long the residual stream is: what makes a coefficient a dose."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded


@dataclass(frozen=True)
class Scale:
    """How long the residual stream is: the unit of dose.

    Dose is the length of what is added divided by the median length of what is there. The median,
    because the first position is an attention sink with a norm many times the others'; it is left
    out as well, and so is padding.

    Attributes:
        medians: median length before block 0, then after each block, in residual units.
    """

    medians: tuple[float, ...]

    @classmethod
    def of(cls, model: SteeringModel, prompts: Sequence[Encoded], batch: int = 16) -> "Scale":
        """Measures one unsteered pass over prompts.

        Raises:
            RequestError: no prompt has two tokens.
        """
        lengths: list[list[Tensor]] = [[] for _ in range(model.n_layers + 1)]
        prompts = [one for one in prompts if len(one.ids) > 1]
        if not prompts:
            raise RequestError("no prompt is two tokens long: the residual norm cannot be measured")
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            for layer, x, real in model.residuals(some):
                counted = real.clone()
                counted[:, 0] = False
                lengths[layer + 1].append(x.float().norm(dim=-1)[counted].cpu())
        return cls(tuple(torch.cat(seen).median().item() for seen in lengths))

    def _repr_html_(self) -> str:
        from interp_steer.util.html import bars

        names = ["before layer 0", *(f"after layer {n}" for n in range(len(self.medians) - 1))]
        values = dict[object, float](zip(names, self.medians, strict=True))
        return bars(values, "median length of the residual stream, by layer")

    def at(self, site: Site) -> float:
        """The median residual length at a site's layer; for `attn_out` and `mlp_out` that of the
        stream they write to.

        Raises:
            RequestError: the site is a head's `z`, which is not in residual units, or there is no
                such layer.
        """
        if site.component == "z":
            raise RequestError("a dose is a share of the residual stream; at z give a number")
        if site.layer >= len(self.medians) - 1:
            raise RequestError(
                f"layer {site.layer} is out of range: the model has layers "
                f"0-{len(self.medians) - 2}"
            )
        return self.medians[site.layer + (site.component != "resid_pre")]
