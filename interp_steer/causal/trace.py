"""Where steering acts: how far it moves later layers, and which later parts carry its effect.

    propagation(model, prompts, steer).table
    mediation(model, items, steer, "logit_difference").summary()

Everything is a forward pass; each variant resumes from the pass that it departs from, as in
`ablation` and `patching`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.causal.branch import Trunk, Variant, check_names
from interp_steer.causal.patch import Patching, given, hooks, patch, places
from interp_steer.causal.scores import (
    ANSWER,
    Reading,
    answered,
    chosen_scores,
    first_tokens,
    summarised,
    sweep,
)
from interp_steer.engine.admission import Admission
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import Prompt
from interp_steer.stats import shares
from interp_steer.steering.intervention import Intervention
from interp_steer.steering.lens import JacobianLens
from interp_steer.util.console import Report

__all__ = ["Mediation", "Patching", "Propagation", "mediation", "patch", "propagation"]

RESTORED = ("attn_out", "mlp_out", "z")
Prompts = Sequence[Item | Prompt]


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
            `layer`, `rank` (from 1), `token`, `rise`, `before`, `after`, `read` ("logit lens"; with
            a Jacobian lens also "jacobian lens").
    """

    table: pd.DataFrame
    risen: pd.DataFrame

    def _repr_html_(self) -> str:
        from interp_steer.util.html import frame

        return frame(self.summary())

    def summary(
        self, column: str = "last_relative", level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """The mean of a column, named by `score`, at every layer with its interval over prompts."""
        check_names("column", [column], [str(name) for name in self.table.columns[2:]])
        named = self.table.assign(score=column)
        return summarised(named, ["layer", "score"], column, level, seed)


class _Apart:
    """Compares steered prompts with their unsteered selves, layer by layer."""

    def __init__(self, model: SteeringModel, top: int, lens: JacobianLens | None) -> None:
        self.model, self.top, self.lens = model, top, lens
        self.norms: dict[int, list[Tensor]] = {}
        self.rows: list[dict[str, object]] = []
        self.before: dict[tuple[str, int], Tensor] = {}
        self.after: dict[tuple[str, int], Tensor] = {}

    def add(
        self,
        names: Sequence[str],
        steered: Sequence[Sequence[bool]],
        layer: int,
        plain: Sequence[Float[Tensor, "_ d_model"]],
        moved: Sequence[Float[Tensor, "_ d_model"]],
    ) -> None:
        """Streams after a block, of prompts with these names and steered positions."""
        lasts = torch.stack([torch.stack([x[-1] for x in side]) for side in (plain, moved)])
        lasts = lasts.to(self.model.device)
        before, after = self._read("logit lens", layer, self.model.unembed(lasts))
        kl = (before.exp() * (before - after)).sum(-1)
        if self.lens and layer in self.lens.layers:
            self._read("jacobian lens", layer, self.lens.read(self.model, layer, lasts))
        for n, (name, mask) in enumerate(zip(names, steered, strict=True)):
            apart = (moved[n].float() - plain[n].float()).norm(dim=-1)
            self.norms.setdefault(layer, []).append(plain[n][1:].float().norm(dim=-1))
            chosen = apart[torch.tensor(mask)]
            far = {"last": apart[-1], "steered": chosen.mean(), "all": apart[1:].mean()}
            numbers = {name: value.item() for name, value in far.items()}
            self.rows.append({"item": name, "layer": layer, **numbers, "kl": kl[n].item()})

    def _read(
        self, by: str, layer: int, logits: Float[Tensor, "2 prompt d_vocab"]
    ) -> Float[Tensor, "2 prompt d_vocab"]:
        """Adds up what a lens reads, and gives its log-probabilities."""
        logprobs = logits.float().cpu().log_softmax(-1)
        for kept, now in zip((self.before, self.after), logprobs, strict=True):
            kept[by, layer] = kept.get((by, layer), 0) + now.exp().sum(0)
        return logprobs

    def found(self) -> Propagation:
        table = pd.DataFrame(self.rows)
        medians = {layer: torch.cat(seen).median().item() for layer, seen in self.norms.items()}
        table["median"] = table["layer"].map(medians)
        for name in ("last", "steered", "all"):
            table[f"{name}_relative"] = table[name] / table["median"]
        risen, count = [], table["item"].size / len(medians)
        for (by, layer), after in self.after.items():
            before = self.before[by, layer]
            rise = after - before
            for rank, token in enumerate(rise.topk(self.top).indices.tolist(), start=1):
                shares = [part[token].item() / count for part in (rise, before, after)]
                risen.append((layer, rank, self.model.decode_token(token), *shares, by))
        columns = ["layer", "rank", "token", "rise", "before", "after", "read"]
        return Propagation(table, pd.DataFrame(risen, columns=columns))


def propagation(
    model: SteeringModel,
    prompts: Prompts,
    steer: Sequence[Intervention],
    *,
    top: int = 10,
    batch: int = 16,
    lens: JacobianLens | None = None,
    report: Report | None = None,
) -> Propagation:
    """How far steering moves the stream at every later layer, and what the logit lens reads there.

    The lens is unembed(final_norm(x)) (nostalgebraist 2020); at the last layer it is the output.

    Args:
        steer: resolved interventions (lengths, not doses).
        top: tokens a layer in `risen`.
        batch: prompts at once.
        lens: reads the layers that it has beside the logit lens, as unembed(final_norm(J x)).
        report: called with the number of prompts done.

    Raises:
        RequestError: no prompt or intervention, a prompt of one token, or as `Engine.generate`.
    """
    items = [Item.of(one) for one in prompts]
    if not items or not steer:
        raise RequestError("propagation needs prompts and an intervention")
    if lens:
        lens.check(model)
    engine = Engine(model)
    rows = [Row(item.prompt, tuple(steer)) for item in items]
    encoded = [engine.admission.steered(row) for row in rows]
    for item, (_, prompt) in zip(items, encoded, strict=True):
        if len(prompt.ids) < 2:
            raise RequestError(f"{item.text[:60]!r} is one token long: only its first position")
    first = min(site.layer for one in steer for site in one.sites)
    sites = [Site("resid_post", layer) for layer in range(first, model.n_layers)]
    compared = _Apart(model, top, lens)
    order = sorted(range(len(items)), key=lambda n: len(encoded[n][1].ids))
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        masks = []
        for steering, prompt in (encoded[n] for n in some):
            scopes = [i.scope.prompt_mask(prompt.content) for i in steering.interventions]
            masks.append([any(mask[p] for mask in scopes) for p in range(len(prompt.ids))])
        both = [*(Row(rows[n].prompt) for n in some), *(rows[n] for n in some)]
        scores = engine.score(both, [()] * len(both), taps=sites, batch=len(both))
        for site in sites:
            plain, moved = scores[: len(some)], scores[len(some) :]
            streams = [[score.taps[site] for score in side] for side in (plain, moved)]
            compared.add([items[n].id for n in some], masks, site.layer, *streams)
        if report:
            report(start + len(some))
    return compared.found()


@dataclass(frozen=True, eq=False)
class Mediation:
    """What `mediation` found.

    Attributes:
        table: a row for each restored part and prompt: `component`, `layer`, `head` (missing but
            at `z`), `item`, `score` (its name), and the score `unsteered`, `steered`, `restored`.
    """

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        from interp_steer.util.html import frame

        return frame(self.summary())

    def summary(self, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """The share of the effect that goes with each part, largest first; a mean over prompts
        over a mean:

            (mean steered - mean restored) / (mean steered - mean unsteered)

        See `shares.summarised`; `effect` is the denominator.
        """
        by = ["component", "layer", "head", "score"]
        steered = self.table["steered"]
        gone, effect = steered - self.table["restored"], steered - self.table["unsteered"]
        found = shares.summarised(self.table, by, gone, effect, level, seed)
        return found.sort_values("estimate", ascending=False, ignore_index=True)

    def doubt(self, summary: pd.DataFrame) -> str | None:
        """Why the shares of a summary should not be believed, if so; see `shares.doubt`."""
        score = self.table["score"].iloc[0] if len(self.table) else "steering"
        return shares.doubt(summary, f"the effect on {score}")

    @property
    def warning(self) -> str | None:
        """The same of `summary()`."""
        return self.doubt(self.summary())


def mediation(
    model: SteeringModel,
    prompts: Prompts,
    steer: Sequence[Intervention],
    score: str = "kl_last",
    *,
    words: Sequence[str] = (),
    answer: int = ANSWER,
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
        words, answer: the concept's, for the score `words`, and how many tokens of an answer it
            reads; as for `ablation.ablate`.
        components: of `RESTORED`, from the first steered block on; `z` goes head by head.
        heads, batch, report: as for `ablation.ablate`.

    Raises:
        RequestError: an unknown name or score, an intervention that does not fit, or none; or
            steering after which no block follows.
    """
    check_names("component", components, RESTORED)
    if not steer:
        raise RequestError("mediation needs an intervention whose effect is traced")
    begins = min(site.block for one in steer for site in one.sites)
    if begins >= model.n_layers:
        raise RequestError("steering after the last block is mediated by none; steer earlier")
    readings = [Reading.of(model, Item.of(one)) for one in prompts]
    score = chosen_scores(readings, [score], words)[0]
    if score == "words":
        readings = answered(model, readings, answer)
    admission = Admission(model)
    rows = [admission.steered(Row(one.item.prompt, tuple(steer))) for one in readings]
    where = places(model, components, range(begins, model.n_layers), heads)

    def variants(trunk: Trunk, chunk: list[int]) -> list[Variant]:
        steered = trunk.steered([rows[n] for n in chunk])
        return [steered, *((*steered, *given(place, trunk.real, trunk)) for place in where)]

    clean, values = sweep(
        model, readings, [score], variants, keep=hooks(where),
        words=first_tokens(model, words), batch=batch, report=report,
    )  # fmt: skip
    plain, steered = clean[:, 0].tolist(), values[0, :, 0].tolist()
    found = [
        (*place, one.item.id, score, plain[n], steered[n], restored[n])
        for place, restored in zip(where, values[1:, :, 0].tolist(), strict=True)
        for n, one in enumerate(readings)
        if one.has(score)
    ]
    names = ["component", "layer", "head", "item", "score", "unsteered", "steered", "restored"]
    return Mediation(pd.DataFrame(found, columns=names).astype({"head": "Int64"}))
