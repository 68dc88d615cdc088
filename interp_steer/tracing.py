"""Where an effect passes through: patching, propagation, mediation.

    patch(model, items, ["resid_pre"], positions="each").summary()
    propagation(model, prompts, steer).table
    mediation(model, items, steer, "logit_difference").summary()

Everything is a forward pass; each variant resumes from the pass that it departs from, as in
`ablation`. Causal tracing: Meng et al. 2022 (arXiv 2202.05262); what the numbers do and do not say:
Heimersheim & Nanda 2024 (arXiv 2404.15255).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from interp_steer.bank import Hook
from interp_steer.branch import HOOKS, Edit, Trunk, Variant, check_names, check_range, put
from interp_steer.console import Report
from interp_steer.errors import RequestError, nearest
from interp_steer.forward import run, shared_blocks
from interp_steer.intervention import Intervention
from interp_steer.item import Item
from interp_steer.model import SteeringModel
from interp_steer.prompt import Prompt
from interp_steer.reading import Reading, chosen_scores, first_tokens, summarised, sweep
from interp_steer.row import Row
from interp_steer.stepper import Admission

PATCHED = ("resid_pre", "resid_post", "block", "attn_out", "mlp_out", "z")
RESTORED = ("attn_out", "mlp_out", "z")
# Effects smaller than this, in nats, are the rounding of float32 logits: no share of them is taken.
NO_EFFECT = 1e-3
Prompts = Sequence[Item | Prompt]


def _places(
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


def _hooks(places: Sequence[tuple[str, int, int | None]]) -> set[Hook]:
    return {(kind, layer) for component, layer, _ in places for kind in HOOKS[component]}


def _given(
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
            `clean`, `corrupt`, `value` (logit differences in nats), `normalised` (0: as corrupted,
            1: as clean; missing where the two prompts do not differ in effect).
    """

    table: pd.DataFrame

    def summary(self, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """The mean normalised effect of each place with its interval over items."""
        by = ["component", "layer", "head", "position"]
        return summarised(self.table, by, "normalised", level, seed)


def patch(
    model: SteeringModel,
    items: Sequence[Item],
    components: Sequence[str] = ("resid_pre",),
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: str | Sequence[int] = "all",
    batch: int | None = None,
    report: Report | None = None,
) -> Patching:
    """Activation patching: activations of the clean prompt put into the corrupted prompt's pass.

    (LD_patched - LD_corrupt) / (LD_clean - LD_corrupt), LD the logit difference: how much of the
    clean answer one place brings back (Wang et al. 2023, arXiv 2211.00593). The first position is
    patched too: the clean pass's own value does no damage.

    Args:
        items: with answers, and a `corrupted` prompt of the same length in tokens.
        components: of `PATCHED`; `block` is what a block adds, `z` goes head by head.
        positions: "all" at once, "each" alone, or some alone; negative ones count from the end of
            the prompt.
        layers, heads, batch, report: as for `ablation.ablate`.

    Raises:
        RequestError: an unknown name, no such layer, head or position, or an item without answers
            or without a corrupted prompt of the same length.
    """
    check_names("component", components, PATCHED)
    readings = [Reading.of(model, item) for item in items]
    chosen_scores(readings, ["logit_difference"], ())
    corrupted = []
    for one in readings:
        if one.item.corrupted is None or one.pair is None:
            lacks = "a corrupted prompt" if one.pair else "answers, positive and negative"
            raise RequestError(f"{one.item.text[:60]!r} cannot be patched: it lacks {lacks}")
        ids = one.with_prompt(model, one.item.corrupted, "its corrupted prompt")
        corrupted.append(replace(one, ids=ids))
    places = _places(
        model, components, check_range("layer", layers, model.n_layers, model.name), heads
    )
    columns = _columns(positions, readings)
    keep = _hooks(places)

    def variants(trunk: Trunk, chunk: list[int]) -> list[Variant]:
        source = Trunk(model, [readings[n].ids for n in chunk], keep)
        made = []
        for column in columns:
            at = torch.tensor([[_index(column, readings[n])] for n in chunk]).to(model.device)
            mask = trunk.real if column is None else trunk.positions == at
            made += [_given(place, mask, source) for place in places]
        return made

    score = ["logit_difference"]
    clean, _ = sweep(model, readings, score, lambda trunk, chunk: [], batch=batch)
    corrupt, values = sweep(model, corrupted, score, variants, batch=batch, report=report)
    rows = []
    for number, (column, (component, layer, head)) in enumerate(
        (column, place) for column in columns for place in places
    ):
        for n, one in enumerate(readings):
            at = _index(column, one)
            if at > one.at:
                continue  # the item is shorter
            token = None if column is None else model.decode_token(one.ids[at])
            ends = clean[n, 0].item(), corrupt[n, 0].item(), values[number, n, 0].item()
            rows.append((component, layer, head, column, token, one.item.id, *ends))
    names = ["component", "layer", "head", "position", "token", "item", "clean", "corrupt", "value"]
    table = pd.DataFrame(rows, columns=names).astype({"head": "Int64", "position": "Int64"})
    gained, whole = table["value"] - table["corrupt"], table["clean"] - table["corrupt"]
    return Patching(table.assign(normalised=(gained / whole).where(whole.abs() >= NO_EFFECT)))


def _columns(positions: str | Sequence[int], readings: Sequence[Reading]) -> list[int | None]:
    """Positions as asked for, None for all at once, checked against every prompt."""
    if positions == "all":
        return [None]
    if positions == "each":
        return list(range(max(one.at for one in readings) + 1))
    if isinstance(positions, str):
        raise RequestError(f"unknown positions {positions!r}{nearest(positions, ('all', 'each'))}")
    for position in positions:
        for one in readings:
            if not 0 <= _index(position, one) <= one.last:
                raise RequestError(
                    f"position {position} is out of range: {one.item.text[:60]!r} has positions "
                    f"0-{one.last}"
                )
    return list(positions)


def _index(position: int | None, one: Reading) -> int:
    """An absolute position; 0 for all at once."""
    return (position or 0) + (one.last + 1 if (position or 0) < 0 else 0)


@dataclass(frozen=True, eq=False)
class Propagation:
    """What `propagation` found.

    Attributes:
        table: a row for each prompt and layer from the first steered one on: `item`, `layer`;
            |x_steered - x| after the block at the `last` position, as a mean over the `steered`
            positions (missing if none is) and over `all` positions but the first; the `median` |x|
            of all prompts' positions but the first; `last_relative`, `steered_relative`,
            `all_relative`: divided by it; `kl`: KL(unsteered || steered) of the logit lens at the
            last position, in nats.
        risen: the tokens whose probability under the lens rises most, in the mean over prompts:
            `layer`, `rank` (from 1), `token`, `rise`, `before`, `after`.
    """

    table: pd.DataFrame
    risen: pd.DataFrame

    def summary(
        self, column: str = "last_relative", level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """The mean of a column at every layer with its interval over prompts."""
        check_names("column", [column], [str(name) for name in self.table.columns[2:]])
        return summarised(self.table, ["layer"], column, level, seed)


class _Apart:
    """Watches steered rows beside their unsteered selves, layer by layer."""

    def __init__(self, model: SteeringModel, first: int, top: int) -> None:
        self.model, self.top = model, top
        self.hooks: set[Hook] = {("resid_post", n) for n in range(first, model.n_layers)}
        self.norms: dict[int, list[Tensor]] = {}
        self.rows: list[dict[str, object]] = []
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}

    def expect(self, names: Sequence[str], steered: Sequence[Sequence[bool]]) -> None:
        """Tells what the next pass holds: prompts, and their steered positions."""
        self._names, self._steered = names, steered

    def __call__(self, hook: Hook, x: Tensor, place: Tensor | None) -> None:
        _, layer = hook
        x = x if place is None else x[place]
        plain, moved = x.chunk(2)
        apart = (moved.float() - plain.float()).norm(dim=-1)
        logits = self.model.unembed(torch.stack([plain[:, -1], moved[:, -1]]))
        before, after = logits.float().log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1)
        for kept, now in ((self.before, before), (self.after, after)):
            kept[layer] = kept.get(layer, 0) + now.exp().sum(0)
        for row, (name, mask) in enumerate(zip(self._names, self._steered, strict=True)):
            mine = apart[row, len(apart[row]) - len(mask) :]  # right-aligned
            chosen = torch.tensor(mask, device=mine.device)
            norms = plain[row, len(apart[row]) - len(mask) + 1 :].float().norm(dim=-1)
            self.norms.setdefault(layer, []).append(norms.cpu())
            far = {"last": mine[-1], "steered": mine[chosen].mean(), "all": mine[1:].mean()}
            numbers = {name: value.item() for name, value in far.items()}
            self.rows.append({"item": name, "layer": layer, **numbers, "kl": kl[row].item()})

    def found(self) -> Propagation:
        table = pd.DataFrame(self.rows)
        medians = {layer: torch.cat(seen).median().item() for layer, seen in self.norms.items()}
        table["median"] = table["layer"].map(medians)
        for name in ("last", "steered", "all"):
            table[f"{name}_relative"] = table[name] / table["median"]
        risen, count = [], table["item"].size / len(medians)
        for layer, after in self.after.items():
            rise = after - self.before[layer]
            for rank, token in enumerate(rise.topk(self.top).indices.tolist(), start=1):
                shares = [part[token].item() / count for part in (rise, self.before[layer], after)]
                risen.append((layer, rank, self.model.decode_token(token), *shares))
        columns = ["layer", "rank", "token", "rise", "before", "after"]
        return Propagation(table, pd.DataFrame(risen, columns=columns))


def propagation(
    model: SteeringModel,
    prompts: Prompts,
    steer: Sequence[Intervention],
    *,
    top: int = 10,
    batch: int = 16,
    report: Report | None = None,
) -> Propagation:
    """How far steering moves the stream at every later layer, and what the logit lens reads there.

    The lens is unembed(final_norm(x)) (nostalgebraist 2020); at the last layer it is the output.

    Args:
        steer: resolved interventions (lengths, not doses).
        top: tokens a layer in `risen`.
        batch: prompts at once.
        report: called with the number of prompts done.

    Raises:
        RequestError: no prompt or intervention, a prompt of one token, or as `Engine.generate`.
    """
    items = [Item.of(one) for one in prompts]
    if not items or not steer:
        raise RequestError("propagation needs prompts and an intervention")
    admission = Admission(model)
    rows = [admission.steered(Row(item.prompt, tuple(steer))) for item in items]
    for item, (_, one) in zip(items, rows, strict=True):
        if len(one.ids) < 2:
            raise RequestError(f"{item.text[:60]!r} is one token long: only its first position")
    watch = _Apart(model, min(site.layer for one in steer for site in one.sites), top)
    order = sorted(range(len(items)), key=lambda n: len(rows[n][1].ids))
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        masks = []
        for applied, one in (rows[n] for n in some):
            scopes = [i.scope.prompt_mask(one.content) for i in applied]
            masks.append([any(mask[p] for mask in scopes) for p in range(len(one.ids))])
        watch.expect([items[n].id for n in some], masks)
        pairs = [((), rows[n][1]) for n in some], [rows[n] for n in some]
        both = [*pairs[0], *pairs[1]]
        with torch.no_grad():
            run(model, both, [one.ids for _, one in both], watch=watch)
        if report:
            report(start + len(some))
    return watch.found()


@dataclass(frozen=True, eq=False)
class Mediation:
    """What `mediation` found.

    Attributes:
        table: a row for each restored part and prompt: `component`, `layer`, `head` (missing but
            at `z`), `item`, `unsteered`, `steered`, `restored` (scores), `share` of the effect that
            goes: (steered - restored) / (steered - unsteered); missing where there is no effect.
    """

    table: pd.DataFrame

    def summary(self, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """The mean share of each part with its interval over prompts, largest first."""
        found = summarised(self.table, ["component", "layer", "head"], "share", level, seed)
        return found.sort_values("estimate", ascending=False, ignore_index=True)


def mediation(
    model: SteeringModel,
    prompts: Prompts,
    steer: Sequence[Intervention],
    score: str = "kl_last",
    *,
    words: Sequence[str] = (),
    components: Sequence[str] = ("attn_out", "mlp_out"),
    heads: Sequence[int] | None = None,
    batch: int | None = None,
    report: Report | None = None,
) -> Mediation:
    """Which later parts carry the effect of steering: each restored to its unsteered value alone.

    A part whose restoring takes most of the effect away mediates it. Shares need not add up to 1:
    parts act one after another, and later ones make up for what is taken (Wang et al. 2023; McGrath
    et al. 2023, arXiv 2307.15771). What the stream carries past all parts unchanged is the direct
    effect, and no restoring takes it.

    Args:
        prompts: items with answers, for `logit_difference`; else prompts will do.
        steer: resolved interventions (lengths, not doses), of any operator and at any sites.
        score: of `ablation.SCORES`; `kl_last` is the KL from the unsteered prompt.
        words: the concept's, for the score `words`.
        components: of `RESTORED`, from the first steered block on; `z` goes head by head.
        heads, batch, report: as for `ablation.ablate`.

    Raises:
        RequestError: an unknown name or score, an intervention that does not fit, or none; or
            steering after which no block follows.
    """
    check_names("component", components, RESTORED)
    if not steer:
        raise RequestError("mediation needs an intervention whose effect is traced")
    begins = shared_blocks(steer, model.n_layers)
    if begins >= model.n_layers:
        raise RequestError("steering after the last block is mediated by none; steer earlier")
    readings = [Reading.of(model, Item.of(one)) for one in prompts]
    score = chosen_scores(readings, [score], words)[0]
    admission = Admission(model)
    rows = [admission.steered(Row(one.item.prompt, tuple(steer))) for one in readings]
    places = _places(model, components, range(begins, model.n_layers), heads)

    def variants(trunk: Trunk, chunk: list[int]) -> list[Variant]:
        steered = trunk.steered([rows[n] for n in chunk])
        return [steered, *((*steered, *_given(place, trunk.real, trunk)) for place in places)]

    clean, values = sweep(
        model, readings, [score], variants, keep=_hooks(places),
        words=first_tokens(model, words), batch=batch, report=report,
    )  # fmt: skip
    found = [
        (*place, one.item.id, clean[n, 0].item(), values[0, n, 0].item(), of_place[n, 0].item())
        for place, of_place in zip(places, values[1:], strict=True)
        for n, one in enumerate(readings)
        if one.has(score)
    ]
    names = ["component", "layer", "head", "item", "unsteered", "steered", "restored"]
    table = pd.DataFrame(found, columns=names).astype({"head": "Int64"})
    effect = table["steered"] - table["unsteered"]
    share = (table["steered"] - table["restored"]) / effect
    return Mediation(table.assign(share=share.where(effect.abs() >= NO_EFFECT)))
