"""Activation patching: activations of one prompt put into the pass of another.

    patch(model, items, ["resid_pre"]).summary()

Causal tracing: Meng et al. 2022 (arXiv 2202.05262); what the numbers do and do not say: Heimersheim
& Nanda 2024 (arXiv 2404.15255).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from interp_steer.causal.branch import (
    BETWEEN,
    HOOKS,
    Edit,
    Trunk,
    Variant,
    check_names,
    check_range,
    put,
)
from interp_steer.causal.scores import Reading, chosen_scores, sweep
from interp_steer.engine.bank import Hook
from interp_steer.errors import RequestError, nearest
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import Item
from interp_steer.stats import shares
from interp_steer.util.console import Report

PATCHED = ("resid_pre", "resid_post", "block", "attn_out", "mlp_out", "z")
POSITIONS = ("each", "all", "last")
SCORE = "logit_difference"


def places(
    model: SteeringModel,
    components: Sequence[str],
    layers: Sequence[int],
    heads: Sequence[int] | None,
) -> list[tuple[str, int, int | None]]:
    """Component, layer and head of everything that is put in, one at a time."""
    numbers = check_range("head", heads, model.n_heads, model.name) if "z" in components else []
    return [
        (component, layer, head)
        for component in components
        for layer in layers
        for head in (numbers if component == "z" else (None,))
    ]


def hooks(places: Sequence[tuple[str, int, int | None]]) -> set[Hook]:
    return {(kind, layer) for component, layer, _ in places for kind in HOOKS[component]}


def given(
    place: tuple[str, int, int | None], mask: Bool[Tensor, "item pos"], source: Trunk
) -> Variant:
    """Edits that put a place's activations of another pass in."""
    component, layer, head = place
    return tuple(
        Edit(kind, layer, partial(put, mask, source.value(kind, layer, head)), head)
        for kind in HOOKS[component]
    )


@dataclass(frozen=True, eq=False)
class Patching:
    """What `patch` found.

    Attributes:
        table: a row for each place and item: `component`, `layer`, `head` (missing but at `z`),
            `position` (missing for all at once), `token` (the clean prompt's, there), `item`,
            `score`, `clean`, `corrupt`, `value` (logit differences in nats).
    """

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        from interp_steer.util.html import frame

        return frame(
            self.summary().sort_values(
                "estimate", key=lambda share: -share.abs(), kind="stable", na_position="last"
            )
        )

    def summary(self, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """How much of the clean answer each place brings back, a mean over items over a mean:

            (mean LD_patched - mean LD_corrupt) / (mean LD_clean - mean LD_corrupt)

        with LD the logit difference: 0 as corrupted, 1 as clean. See `shares.summarised`; `effect`
        is the denominator.
        """
        by = ["component", "layer", "head", "position", "score"]
        moved, whole = (self.table[name] - self.table["corrupt"] for name in ("value", "clean"))
        return shares.summarised(self.table, by, moved, whole, level, seed)

    def doubt(self, summary: pd.DataFrame) -> str | None:
        """Why the shares of a summary should not be believed, if so; see `shares.doubt`."""
        return shares.doubt(summary, "the difference of clean and corrupted prompts")

    @property
    def warning(self) -> str | None:
        """The same of `summary()`."""
        return self.doubt(self.summary())


def patch(
    model: SteeringModel,
    items: Sequence[Item],
    components: Sequence[str] = ("resid_pre",),
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: str | Sequence[int] = "each",
    batch: int | None = None,
    report: Report | None = None,
) -> Patching:
    """Activation patching: activations of the clean prompt put into the corrupted prompt's pass.

    How much of the clean answer one place brings back (Wang et al. 2023, arXiv 2211.00593). The
    first position is patched too: the clean pass's own value does no damage.

    Args:
        items: with answers, and a `corrupted` prompt of the same length in tokens.
        components: of `PATCHED`; `block` is what a block adds, `z` goes head by head.
        positions: "each" alone, "all" at once, the "last" of the prompt, or some alone; negative
            ones count from the end of the prompt.
        layers, heads, batch, report: as for `ablation.ablate`.

    Raises:
        RequestError: an unknown name, no such layer, head or position, the whole stream at all
            positions, or an item without answers or without a corrupted prompt of the same length.
    """
    check(items, components, positions)
    readings = [Reading.of(model, item) for item in items]
    chosen_scores(readings, [SCORE], ())
    corrupted = []
    for one in readings:
        assert one.item.corrupted is not None
        ids = one.with_prompt(model, one.item.corrupted, "its corrupted prompt")
        corrupted.append(replace(one, ids=ids))
    where = places(
        model, components, check_range("layer", layers, model.n_layers, model.name), heads
    )
    columns = columns_of(positions, readings)
    keep = hooks(where)

    def variants(trunk: Trunk, chunk: list[int]) -> list[Variant]:
        source = Trunk(model, [readings[n].ids for n in chunk], keep)
        made = []
        for column in columns:
            at = torch.tensor([[index_of(column, readings[n])] for n in chunk]).to(model.device)
            mask = trunk.real if column is None else trunk.positions == at
            made += [given(place, mask, source) for place in where]
        return made

    clean, _ = sweep(model, readings, [SCORE], lambda trunk, chunk: [], batch=batch)
    corrupt, values = sweep(model, corrupted, [SCORE], variants, batch=batch, report=report)
    rows = []
    for number, (column, (component, layer, head)) in enumerate(
        (column, place) for column in columns for place in where
    ):
        for n, one in enumerate(readings):
            at = index_of(column, one)
            if at > one.at:
                continue  # the item is shorter
            token = None if column is None else model.decode_token(one.ids[at])
            ends = clean[n, 0].item(), corrupt[n, 0].item(), values[number, n, 0].item()
            rows.append((component, layer, head, column, token, one.item.id, SCORE, *ends))
    names = ["component", "layer", "head", "position", "token", "item", "score"]
    table = pd.DataFrame(rows, columns=[*names, "clean", "corrupt", "value"])
    return Patching(table.astype({"head": "Int64", "position": "Int64"}))


def check(items: Sequence[Item], components: Sequence[str], positions: str | Sequence[int]) -> None:
    """Raises RequestError for all that can be told without a model; see `patch`."""
    check_names("component", components, PATCHED)
    if isinstance(positions, str) and positions not in POSITIONS:
        raise RequestError(f"unknown positions {positions!r}{nearest(positions, POSITIONS)}")
    stream = [name for name in components if name in BETWEEN]
    if positions == "all" and stream:
        raise RequestError(
            f"{stream[0]} at all positions is the whole clean pass: it brings back 1.0 at every "
            "layer, whatever the model; patch positions 'each', 'last' or by number"
        )
    for one in items:
        pair = one.positive is not None and one.negative is not None
        if one.corrupted is None or not pair:
            lacks = "a corrupted prompt" if pair else "answers, positive and negative"
            raise RequestError(f"{one.text[:60]!r} cannot be patched: it lacks {lacks}")


def columns_of(positions: str | Sequence[int], readings: Sequence[Reading]) -> list[int | None]:
    """Positions as asked for, None for all at once, checked against every prompt."""
    if positions == "all":
        return [None]
    if positions == "each":
        return list(range(max(one.at for one in readings) + 1))
    numbers = [-1] if isinstance(positions, str) else list(dict.fromkeys(positions))
    if not numbers:
        raise RequestError("no positions given; expected 'each', 'all', 'last' or numbers")
    for position in numbers:
        for one in readings:
            if not 0 <= index_of(position, one) <= one.last:
                raise RequestError(
                    f"position {position} is out of range: {one.item.text[:60]!r} has positions "
                    f"0-{one.last}"
                )
    return list(numbers)


def index_of(position: int | None, one: Reading) -> int:
    """An absolute position; 0 for all at once."""
    return (position or 0) + (one.last + 1 if (position or 0) < 0 else 0)
