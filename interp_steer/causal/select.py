"""Choosing a direction over layers and positions, as for refusal (Arditi et al. 2024)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.causal.branch import check_names, check_range
from interp_steer.causal.scores import LOGITS_AT_ONCE, Reading, first_tokens, summarised
from interp_steer.causal.trace import Prompts
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item, digests
from interp_steer.prompts.parts import check_apart
from interp_steer.steering.direction import Direction
from interp_steer.steering.intervention import Intervention, Scope
from interp_steer.util.console import Report, watched

BRANCHES = ("resid_pre", "attn_out", "mlp_out")  # whatever writes to the stream is ablated
RANKED = ("add", "ablate", "both")
Sides = tuple[Prompts, Prompts]
"""Prompts with the behaviour, and prompts without it."""


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select_direction` chose.

    Attributes:
        direction: the chosen difference of means, at resid_post of its layer.
        layer, position: where it was measured; positions count from the end of the prompt.
        table: a row for each candidate: `layer`, `position`, `norm`, `added` (mean change of the
            score of negative prompts as it is added at its layer), `ablated` (of positive prompts
            as it is ablated everywhere), `kl` (mean KL of negative prompts as it is ablated),
            `rank_by` (what candidates are ranked by), `veto` (why it was not eligible, or ""),
            `chosen`. On the prompts that choose: not evidence.
        proof: the chosen one on the prompts that prove: `measure` (`added`, `ablated`, `kl`),
            `item`, `clean`, `value`, `change`.
    """

    direction: Direction
    layer: int
    position: int
    table: pd.DataFrame
    proof: pd.DataFrame

    def _repr_html_(self) -> str:
        from interp_steer.util.html import frame

        return frame(
            self.table.sort_values(["chosen", "rank_by"], ascending=False),
            f"{self.direction.name}: layer {self.layer}, position {self.position}",
        )

    def summary(self, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Mean changes on the prompts that prove, with intervals over prompts."""
        return summarised(self.proof, ["measure"], "change", level, seed)


def select_direction(
    model: SteeringModel,
    build: Sides,
    choose: Sides,
    prove: Sides,
    *,
    words: Sequence[str] = (),
    by: str = "add",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    max_kl: float = 0.1,
    max_depth: float = 0.8,
    first: bool = False,
    name: str = "selected",
    batch: int | None = None,
    report: Report | None = None,
) -> Selection:
    """Chooses a difference of means over layers and positions, as for refusal.

    Arditi et al. 2024 (arXiv 2406.11717): candidates are differences of means at every layer and
    each of the last template tokens. A candidate is vetoed whose ablation at every block input and
    every attention and MLP output moves negative (harmless) prompts by a KL of `max_kl` or more,
    which comes from a layer not below `max_depth` n_layers, or which does not raise the score as
    it is added. Theirs ranks by ablation (`by="ablate"`).

    Args:
        build, choose, prove: (positive, negative) prompts, with and without the behaviour, for
            three parts that share no prompt: what proves is never what chose.
        words: words with which the behaviour begins; the score is the log-probability of their
            first tokens. Without words it is the items' logit difference.
        by: of `RANKED`: what adding brings, what ablating takes, or their sum.
        layers: candidates' layers; None is all.
        positions: candidates' positions from the end; None is the template's tokens after the
            user's text, or the last one.
        first: whether first positions are steered too.
        name: the direction's.
        batch: as for `ablation.ablate`.
        report: called with the share done, 0 to 1. Candidates x prompts full passes are made.

    Raises:
        RequestError: parts that share a prompt, prompts that are too short or lack answers, or no
            candidate that is not vetoed.
    """
    check_names("rank", [by], RANKED)
    parts = {"build": build, "choose": choose, "prove": prove}
    items = {part: [[Item.of(one) for one in side] for side in parts[part]] for part in parts}
    for part, sides in items.items():
        if len(sides) != 2 or not all(sides):
            raise RequestError(f"{part} needs prompts on both sides, (positive, negative)")
    check_apart({part: [item for side in sides for item in side] for part, sides in items.items()})
    numbers = check_range("layer", layers, model.n_layers, model.name)
    positions, vectors = _differences(model, items["build"], positions)
    candidates = [(layer, n) for layer in numbers for n in range(len(positions))]
    table = pd.DataFrame(
        [(layer, positions[n], vectors[layer, n].norm().item()) for layer, n in candidates],
        columns=["layer", "position", "norm"],
    )
    table["veto"] = ""
    table.loc[table["norm"] == 0, "veto"] = "the two sides do not differ there"
    deep = table["layer"] >= max_depth * model.n_layers
    table.loc[deep, "veto"] = f"layer is not below {max_depth:g} x {model.n_layers}"
    left = [n for n in table.index if not table["veto"][n]]

    def direction(at: tuple[int, int], source: Mapping[str, str]) -> Direction:
        hook_point = Site("resid_post", at[0]).hook_point
        return Direction.of(vectors[at], hook_point, name, source)

    def measured(part: str, which: list[int]) -> tuple[pd.DataFrame, Tensor]:
        some = [candidates[n] for n in which]
        tried = [direction(at, {}) for at in some]
        layers = [layer for layer, _ in some]
        return _effects(model, items[part], tried, layers, words, first, batch, report)

    table[["added", "ablated", "kl"]] = math.nan
    if left:
        _, means = measured("choose", left)
        table.loc[left, ["added", "ablated", "kl"]] = means.double().numpy()
    added, taken = table["added"], -table["ablated"]
    table["rank_by"] = {"add": added, "ablate": taken, "both": added + taken}[by]
    fine = table["veto"] == ""
    table.loc[fine & ~(table["kl"] < max_kl), "veto"] = f"KL is not below {max_kl:g}"
    table.loc[(table["veto"] == "") & ~(added > 0), "veto"] = "adding it does not raise the score"
    eligible = [n for n in left if not table["veto"][n]]
    if not eligible:
        counts = "; ".join(f"{n} x {why}" for why, n in table["veto"].value_counts().items())
        raise RequestError(
            f"all {len(table)} candidates are vetoed: {counts} (least KL {table['kl'].min():.3g}); "
            "raise max_kl, or build from more or other prompts"
        )
    best = max(eligible, key=lambda n: float(table["rank_by"][n]))
    table["chosen"] = table.index == best
    layer, n = candidates[best]
    source = {
        "method": "mean-difference, selected", "model": model.name, "revision": model.revision,
        "fingerprint": model.fingerprint, "position": str(positions[n]), "ranked_by": by,
        "prompts": ", ".join(f"{p} {len(a)} + {len(b)}" for p, (a, b) in items.items()),
        "asked": digests(
            [one.prompt for part in ("build", "choose") for side in items[part] for one in side]
        ),
    }  # fmt: skip
    proof, _ = measured("prove", [best])
    return Selection(direction((layer, n), source), layer, positions[n], table, proof)


def _differences(
    model: SteeringModel, build: list[list[Item]], positions: Sequence[int] | None
) -> tuple[list[int], Float[Tensor, "n_layers candidate d_model"]]:
    """Differences of mean resid_post at each layer and position, and the positions."""
    sides = [[model.encode(item.prompt) for item in side] for side in build]
    everything = [one for side in sides for one in side]
    if positions is None:
        if not all(one.located for one in everything):
            raise RequestError(
                "the chat template rewrites messages, so that it cannot be told where it goes on "
                "after the user's text; give positions"
            )
        # of the template, what stands after the user's text
        tails = [next((i for i, c in enumerate(o.content[::-1]) if c), 0) for o in everything]
        positions = range(-max(1, min(tails)), 0)
    shortest = min(len(one.ids) for one in everything)
    for position in positions:
        if not -shortest < position < 0:
            raise RequestError(
                f"position {position} is out of range: candidates stand at -1 to {1 - shortest}, "
                "counted from the end of the shortest prompt that builds, its first position left "
                "out"
            )
    means = []
    for side in sides:
        total = torch.zeros(model.n_layers, len(positions), model.d_model, dtype=torch.float64)
        for start in range(0, len(side), 16):
            some = side[start : start + 16]
            ends = torch.tensor([len(one.ids) for one in some])
            for layer, x, _ in model.residuals(some):
                if layer >= 0:
                    for n, position in enumerate(positions):
                        there = x[torch.arange(len(some)), ends + position]
                        total[layer, n] += there.cpu().double().sum(0)
        means.append(total / len(side))
    return list(positions), (means[0] - means[1]).float()


def _effects(
    model: SteeringModel,
    sides: list[list[Item]],
    directions: Sequence[Direction],
    layers: Sequence[int],
    words: Sequence[str],
    first: bool,
    batch: int | None,
    report: Report | None,
) -> tuple[pd.DataFrame, Float[Tensor, "candidate measure"]]:
    """Adding each direction at its layer, and ablating it everywhere: a row for each measure, item
    and candidate; and means over items of added, ablated, kl.
    """
    score = "words" if words else "logit_difference"
    readings = [[Reading.of(model, item) for item in side] for side in sides]
    for one in (one for side in readings for one in side):
        if not one.has(score):
            raise RequestError(
                f"{one.item.text[:60]!r} has no answers, positive and negative, to be scored by; "
                "give words with which the behaviour begins"
            )
    scope = Scope(first=first)
    everywhere = tuple(Site(kind, n) for n in range(model.n_layers) for kind in BRANCHES)
    ablating = [(Intervention("ablate", (one,), 0, "", everywhere, scope),) for one in directions]
    adding = [
        (Intervention("add", (one,), one.norm, "", (Site("resid_post", layer),), scope),)
        for one, layer in zip(directions, layers, strict=True)
    ]
    tokens, n = first_tokens(model, words), len(directions)
    passes = [(readings[0], ablating), (readings[1], [*adding, *ablating])]
    total = sum(len(items) * len(variants) for items, variants in passes)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with watched("trying candidates", 1.0, report) as told:
        for items, variants in passes:
            ready = sum(kl.numel() for _, _, kl in found)
            size = max(1, LOGITS_AT_ONCE // (model.d_vocab * len(items)))
            parts = []
            for start in range(0, len(variants), size):
                some = variants[start : start + size]
                parts.append(_scored(model, items, some, tokens, batch))
                if told:
                    told((ready + len(items) * (start + len(some))) / total)
            clean, values, kl = zip(*parts, strict=True)
            found.append((clean[0], torch.cat(values), torch.cat(kl)))
    (before, taken, _), (plain, moved, far) = found
    measures = (
        ("added", readings[1], plain, moved[:n]),
        ("ablated", readings[0], before, taken),
        ("kl", readings[1], torch.zeros_like(plain), far[n:]),
    )
    rows = [
        (measure, one.item.id, clean[i].item(), value[i].item())
        for measure, some, clean, values in measures
        for value in values
        for i, one in enumerate(some)
    ]
    table = pd.DataFrame(rows, columns=["measure", "item", "clean", "value"])
    means = torch.stack([(values - clean).mean(1) for _, _, clean, values in measures], 1)
    return table.assign(change=table["value"] - table["clean"]), means


def _scored(
    model: SteeringModel,
    readings: Sequence[Reading],
    variants: Sequence[tuple[Intervention, ...]],
    tokens: Sequence[int],
    batch: int | None,
) -> tuple[Float[Tensor, " item"], Float[Tensor, "variant item"], Float[Tensor, "variant item"]]:
    """The score of items unsteered and under each variant, and the KL from the unsteered ones, at
    the last position of the prompt.
    """
    steered = ((), *variants)
    rows = [Row(one.item.prompt, steer) for steer in steered for one in readings]
    # by words the prompt's last position is read, else what the two answers share comes first
    after = [() if tokens else one.ids[one.last + 1 : one.at + 1] for one in readings]
    scores = Engine(model).score(
        rows,
        after * len(steered),
        reference=[*range(len(readings))] * len(steered),
        last_logits=True,
        batch=batch,
        report=lambda done, note="": None,
    )
    values = torch.empty(len(rows))
    for row, score in enumerate(scores):
        assert score.last_logits is not None and score.kl is not None
        logprobs = score.last_logits.log_softmax(-1)
        pair = readings[row % len(readings)].pair
        if tokens:
            values[row] = logprobs[[*tokens]].logsumexp(-1)
        elif pair:
            values[row] = logprobs[pair[0]] - logprobs[pair[1]]
    far = torch.stack([score.kl[0] for score in scores if score.kl is not None])
    shaped, apart = (x.view(len(steered), len(readings)) for x in (values, far))
    return shaped[0], shaped[1:], apart[1:]
