"""Attribution patching: every patching effect at once, to first order.

    attribute(model, items, ["z"]).summary()

Patching a place exactly costs a pass. Two passes and one backward pass give the first-order
estimate of all places: (clean activation - corrupted one) times the gradient of the logit
difference, at the corrupted prompt. Nanda 2023 ("Attribution patching"), Syed et al. 2023 (arXiv
2310.10348). It ranks places before an exact run. It fails where the answer is not nearly linear in
the activation: saturated attention, large changes of the residual stream (Kramár et al. 2024, arXiv
2403.00745).
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.causal.branch import check_names, check_range
from interp_steer.causal.patch import SCORE, Patching, check, columns_of, index_of, places
from interp_steer.causal.scores import Reading, chosen_scores
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item
from interp_steer.util.console import Report

ATTRIBUTED = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")


def attribute(
    model: SteeringModel,
    items: Sequence[Item],
    components: Sequence[str] = ("z",),
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: str | Sequence[int] = "all",
    report: Report | None = None,
) -> Patching:
    """What `patch` would find, estimated to first order from two passes an item.

    Args:
        items: as for `patch`: with answers, and a `corrupted` prompt of the same length.
        components: of `ATTRIBUTED`.
        positions: as for `patch`; "all" is the sum over positions.
        layers, heads: as for `patch`.
        report: called with the share done.

    Returns:
        The table of `patch`, `value` being the corrupted logit difference plus the estimate.

    Raises:
        RequestError: as `patch` does.
    """
    check_names("component", components, ATTRIBUTED)
    check(items, components, positions)
    readings = [Reading.of(model, item) for item in items]
    chosen_scores(readings, [SCORE], ())
    chosen = check_range("layer", layers, model.n_layers, model.name)
    where = places(model, components, chosen, heads)
    columns = columns_of(positions, readings)
    rows = []
    for n, one in enumerate(readings):
        assert one.item.corrupted is not None
        ids = one.with_prompt(model, one.item.corrupted, "its corrupted prompt")
        kinds = {(kind, layer) for kind, layer, _ in where}
        clean, values, _ = _pass(model, one.ids, one, kinds, backward=False)
        corrupt, others, slopes = _pass(model, ids, one, kinds, backward=True)
        # over the width: [pos], and at z [pos, head]
        moved = {at: ((values[at] - others[at]) * slopes[at]).sum(-1) for at in kinds}
        for column in columns:
            at = index_of(column, one)
            if at > one.at:
                continue  # the item is shorter
            token = None if column is None else model.decode_token(one.ids[at])
            for kind, layer, head in where:
                effects = moved[kind, layer] if head is None else moved[kind, layer][:, head]
                effect = (effects.sum() if column is None else effects[at]).item()
                rows.append(
                    (kind, layer, head, column, token, one.item.id, SCORE, clean, corrupt,
                     corrupt + effect)
                )  # fmt: skip
        if report:
            report((n + 1) / len(readings))
    names = ["component", "layer", "head", "position", "token", "item", "score"]
    table = pd.DataFrame(rows, columns=[*names, "clean", "corrupt", "value"])
    return Patching(table.astype({"head": "Int64", "position": "Int64"}))


def _pass(
    model: SteeringModel,
    ids: Sequence[int],
    reading: Reading,
    kinds: set[tuple[str, int]],
    backward: bool,
) -> tuple[
    float,
    dict[tuple[str, int], Float[Tensor, "pos ..."]],
    dict[tuple[str, int], Float[Tensor, "pos ..."]],
]:
    """Logit difference, activations, and its gradients by them, of one sequence of tokens."""
    assert reading.pair is not None
    held: dict[tuple[str, int], Tensor] = {}
    hooked, one = model.hooked, torch.tensor([list(ids)], device=model.device)

    def begin(x: Tensor, hook: object) -> Tensor:
        return x.detach().requires_grad_() if backward else x

    def hold(at: tuple[str, int], x: Tensor, hook: object) -> None:
        if backward:
            x.retain_grad()
        held[at] = x

    def holding(at: tuple[str, int]) -> Any:
        return lambda x, hook: hold(at, x, hook)

    hooks: list[Any] = [("blocks.0.hook_resid_pre", begin)]
    hooks += [
        (Site(kind, layer, 0 if kind == "z" else None).hook_name, holding((kind, layer)))
        for kind, layer in sorted(kinds)
    ]
    with torch.set_grad_enabled(backward):
        logits = hooked.run_with_hooks(one, fwd_hooks=hooks, prepend_bos=False)
        yes, no = reading.pair
        difference = logits[0, reading.at, yes].float() - logits[0, reading.at, no].float()
        if backward:
            difference.backward()
    values = {at: x.detach()[0].float() for at, x in held.items()}
    slopes = {
        at: x.grad[0].float() if x.grad is not None else torch.zeros_like(values[at])
        for at, x in held.items()
    } if backward else {}  # fmt: skip
    return difference.item(), values, slopes
