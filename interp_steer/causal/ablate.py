"""Layer-wise ablation on the forward pass: what a model loses without one of its parts.

    found = ablate(model, items, ["attn_out", "mlp_out"], ["mean"])
    found.summary()

Work is shared. The unablated pass is computed once and the stream before every block is kept; each
variant starts from the kept stream at its first changed block, and all that have started pass
through a block as one batch. Over all layers that is about half of full passes.

The first position is left as it is unless asked for. It is an attention sink, whatever its token:
its stream is a hundred times as long as the others' and most heads rest on it, so that changing it
breaks every later block alike and hides what the part in question does. Padding is never changed.

Zero ablation takes the model off its distribution; the mean keeps it closer, and resampling keeps
what both prompts share and so asks about their difference alone: Heimersheim & Nanda 2024 (How to
use and interpret activation patching, arXiv 2404.15255), Wang et al. 2023 (arXiv 2211.00593).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.causal.branch import HOOKS, Edit, Trunk, Variant, check_names, check_range, put
from interp_steer.causal.scores import (
    ANSWER,
    Reading,
    answered,
    batches,
    chosen_scores,
    first_tokens,
    summarised,
    sweep,
    tidy,
)
from interp_steer.engine.bank import Hook, Steering
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.intervention import Intervention, Scope, Vector
from interp_steer.util.console import Report

COMPONENTS = tuple(HOOKS)
"""`resid_pre`, `resid_post`: the whole stream before or after a block. `block`: what a block adds
to the stream, which passes by. `attn_out`, `mlp_out`: one of its two parts. `z`: one attention head
at a time. `direction`: one direction of the stream after a block. `feature`: an SAE's latent."""
COMPONENTS_OF_A_BLOCK = ("attn_out", "mlp_out")
METHODS = ("zero", "mean", "resample", "directional")
"""`zero`; `mean` over positions of a data set; `resample`: the value in another prompt of the same
length; `directional`: x - v v'x (Arditi et al. 2024, arXiv 2406.11717)."""
SPANS = ("layer", "window", "upward", "downward")
"""`layer`: each alone; `window`: `width` neighbours; `upward`: from the first layer up to each;
`downward`: from each to the last."""

OWN = {"direction": ("directional",), "feature": ("zero",)}  # methods, whichever are asked for


@dataclass(frozen=True)
class Cut:
    """What one variant takes out: a component by a method in layers `first` to `last`."""

    component: str
    method: str
    first: int
    last: int
    head: int | None = None

    @property
    def operator(self) -> str:
        """`zero`, `mean`, `resample`, or the operator of an intervention."""
        if self.component == "feature":
            return "latent_clamp"
        return "ablate" if self.method == "directional" else self.method

    @property
    def closed(self) -> bool:
        """Whether the stream after the first block follows without running that block.

        It does where a value is put in at the block's end: no part of the block reads that value.
        So the stream is the unchanged one with the value added in place of what stood there.
        """
        return self.component in ("mlp_out", "block") and self.operator in METHODS

    def places(self, vector: Vector | None) -> list[Hook]:
        """Every hook that is changed; a feature's is its own."""
        if self.component == "feature" and isinstance(vector, Direction):
            return [(vector.site.component, self.first)]
        layers = range(self.first, self.last + 1)
        return [(component, layer) for layer in layers for component in HOOKS[self.component]]

    @property
    def span(self) -> str:
        """`3`, or `3-5` with both ends."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, eq=False)
class Ablation:
    """What `ablate` found.

    Attributes:
        table: a row for each cut, item and score: `component`, `method`, `layer` and `last` (first
            and last of the span), `span` (its text), `head` (missing but at `z`), `item` (its id),
            `score`, `clean` (without ablation), `value`, `change` (value - clean).
    """

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        from interp_steer.util.html import frame

        return frame(self.summary())

    def summary(self, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """The mean change of each cut and score with its interval over items; see `summarised`."""
        by = ["component", "method", "layer", "last", "span", "head", "score"]
        return summarised(self.table, by, "change", level, seed)


def ablate(
    model: SteeringModel,
    items: Sequence[Item],
    components: Sequence[str] = COMPONENTS_OF_A_BLOCK,
    methods: Sequence[str] = ("zero",),
    *,
    span: str = "layer",
    width: int = 3,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    vector: Vector | None = None,
    reference: Sequence[Item] = (),
    scores: Sequence[str] | None = None,
    words: Sequence[str] = (),
    answer: int = ANSWER,
    first: bool = False,
    resume: bool = True,
    batch: int | None = None,
    report: Report | None = None,
) -> Ablation:
    """Takes components out, span by span, and scores what is left.

    Args:
        items: prompts, with answers for `logit_difference`, a continuation for its `loss`, a
            `corrupted` prompt for `resample` (else the next item of the same length is used).
        components: of `COMPONENTS`. `z` goes head by head, one layer at a time. `direction` is
            always ablated by `directional`, whatever the methods, and `feature` by setting its
            latent to 0, x - f(x) d, at the one site that its SAE encodes, whatever the layers.
        methods: of `METHODS`.
        span: of `SPANS`.
        width: layers of a window.
        layers: where single layers and windows begin and cumulative spans end; None is all.
        heads: of `z`; None is all.
        vector: for `direction`, `directional` and `feature`; a DirectionSet gives each layer its
            own.
        reference: prompts whose mean `mean` puts in, first positions left out; none is `items`.
        scores: of `SCORES`; None is all that some item can have.
        words: for the score `words`, with and without a space before them.
        answer: how many positions of an answer `words` reads, where the item has no continuation;
            1 is the last prompt position alone.
        first: whether the first position is ablated too.
        resume: False computes each variant from the first block on, for comparison.
        batch: rows (items x variants) at once; None is 8192 tokens.
        report: called with the share done, 0 to 1.

    Raises:
        RequestError: an unknown name, no such layer or head, no vector, items that lack what is
            asked of them, or parts that do not go together.
    """
    cuts = _cuts(model, components, methods, span, width, layers, heads, vector)
    readings = [Reading.of(model, item) for item in items]
    asked = chosen_scores(readings, scores, words)
    if "words" in asked:
        readings = answered(model, readings, answer)
    needs = {
        method: {
            (component, layer)
            for cut in cuts
            if cut.method == method
            for component, layer in cut.places(vector)
        }
        for method in METHODS
    }
    known = [model.encode(one.prompt).ids for one in reference or items]
    means = _means(model, known, needs["mean"]) if needs["mean"] else {}
    partners = _partners(model, readings) if needs["resample"] else []

    def variants(trunk: Trunk, chunk: list[int]) -> list[Variant]:
        changed = trunk.changed(first)
        own = [Encoded(readings[n].ids, (True,) * len(readings[n].ids)) for n in chunk]
        source = trunk
        if partners:
            source = Trunk(model, [partners[n] for n in chunk], needs["resample"])

        @cache
        def value(operator: str, component: str, layer: int, head: int | None) -> Tensor:
            if operator == "resample":
                return source.value(component, layer, head)
            if operator == "mean":
                mean = means[component, layer]
                return mean if head is None else mean[head]
            return torch.zeros((), dtype=model.dtype, device=model.device)

        @cache
        def edit(operator: str, component: str, layer: int, head: int | None) -> Variant:
            if operator not in METHODS and vector is not None:
                site, scope = Site(component, layer), Scope(first=first)
                one = Intervention(operator, (vector,), 0.0, "", (site,), scope)
                steering = Steering((one,), model.device)
                return trunk.steered([(steering, prompt) for prompt in own])
            known = value(operator, component, layer, head)
            return (Edit(component, layer, partial(put, changed, known), head),)

        @cache
        def begun(operator: str, component: str, layer: int) -> Variant:
            x = trunk.streams[layer]
            for part in ("attn_out", "mlp_out"):
                gone = part in HOOKS[component]
                x = x + (value(operator, part, layer, None) if gone else trunk.value(part, layer))
            return (Edit("resid_post", layer, partial(put, changed, x)),)

        def variant(cut: Cut) -> Variant:
            parts = [edit(cut.operator, *place, cut.head) for place in cut.places(vector)]
            if cut.closed:
                parts[: len(HOOKS[cut.component])] = [begun(cut.operator, cut.component, cut.first)]
            return tuple(one for part in parts for one in part)

        return [variant(cut) for cut in cuts]

    clean, values = sweep(
        model, readings, asked, variants,
        keep={("attn_out", cut.first) for cut in cuts if cut.closed},
        words=first_tokens(model, words), resume=resume, batch=batch, report=report,
    )  # fmt: skip
    columns = ["component", "method", "layer", "last", "span", "head"]
    names = [(c.component, c.method, c.first, c.last, c.span, c.head) for c in cuts]
    return Ablation(tidy(columns, names, readings, asked, clean, values))


def check(
    components: Sequence[str], methods: Sequence[str], span: str, vector: Vector | None
) -> None:
    """Raises RequestError for all that can be told without a model; see `ablate`."""
    check_names("component", components, COMPONENTS)
    check_names("method", methods, METHODS)
    check_names("span", (span,), SPANS)
    for component in components:
        own = OWN.get(component, methods)
        if vector is None and (component == "feature" or "directional" in own):
            raise RequestError(f"ablating {component} needs a vector: what is ablated there")
        if component == "z" and (span != "layer" or "directional" in own):
            raise RequestError(
                "z is ablated by zero, mean or resample, and one layer at a time: heads of "
                "different layers that share a number share nothing else; use attn_out"
            )
        if component == "feature" and not (isinstance(vector, Direction) and vector.is_feature):
            raise RequestError(
                "component 'feature' needs a feature of an SAE as vector, made with "
                "feature(release, sae_id, index); for other vectors use 'direction'"
            )


def _cuts(
    model: SteeringModel,
    components: Sequence[str],
    methods: Sequence[str],
    span: str,
    width: int,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    vector: Vector | None,
) -> list[Cut]:
    """Everything that is asked for, checked against the model."""
    check(components, methods, span, vector)
    ends = check_range("layer", layers, model.n_layers, model.name)
    if span == "window" and not 1 <= width <= model.n_layers:
        raise RequestError(f"a window of {width} layers; {model.name} has {model.n_layers}")
    spans = {
        "layer": [(n, n) for n in ends],
        "window": [(n, n + width - 1) for n in ends if n + width <= model.n_layers],
        "upward": [(0, n) for n in ends],
        "downward": [(n, model.n_layers - 1) for n in ends],
    }[span]
    if not spans:
        raise RequestError(f"no window of {width} layers begins at {layers} and ends in the model")
    cuts: list[Cut] = []
    for component in components:
        own = OWN.get(component, methods)
        if component == "z":
            numbers = check_range("head", heads, model.n_heads, model.name)
            cuts += [Cut("z", m, n, n, head) for m in own for n, _ in spans for head in numbers]
        elif component == "feature":
            assert isinstance(vector, Direction)
            model.check(vector.site, len(vector.unit))
            cuts.append(Cut("feature", "zero", vector.site.layer, vector.site.layer))
        else:
            cuts += [Cut(component, method, *ends) for method in own for ends in spans]
    for cut in cuts:
        if cut.method == "directional" and vector is not None:
            for _, layer in cut.places(vector):
                one = vector[layer] if isinstance(vector, DirectionSet) else vector
                model.check(Site("resid_post", layer), len(one.unit))
    return cuts


def _means(
    model: SteeringModel, known: Sequence[Sequence[int]], hooks: Collection[Hook]
) -> dict[Hook, Float[Tensor, "*d"]]:
    """Mean activation over all positions of all prompts, first ones left out."""
    sums: dict[Hook, Tensor] = {}
    count = 0
    for chunk in batches([len(ids) for ids in known], None):
        trunk = Trunk(model, [known[n] for n in chunk], hooks)
        counted = trunk.changed()
        count += int(counted.sum())
        for hook in hooks:
            total = trunk.value(*hook)[counted].float().sum(0).cpu().double()
            sums[hook] = sums[hook] + total if hook in sums else total
    if not count:
        raise RequestError("no prompt is two tokens long: there is no mean but of first positions")
    return {hook: (total / count).to(model.device, model.dtype) for hook, total in sums.items()}


def _partners(model: SteeringModel, readings: Sequence[Reading]) -> list[tuple[int, ...]]:
    """For each item the tokens whose activations are put in its place."""
    found = []
    for n, one in enumerate(readings):
        if one.item.corrupted is not None:
            found.append(one.with_prompt(model, one.item.corrupted, "its corrupted prompt"))
            continue
        prompt = one.ids[: one.last + 1]
        others = [*readings[n + 1 :], *readings[:n]]
        alike = (o for o in others if o.last == one.last and o.ids[: o.last + 1] != prompt)
        other = next(alike, None)
        if other is None:
            raise RequestError(
                f"nothing to resample {one.item.text[:60]!r} from: it has no corrupted prompt, "
                f"and no other item has {len(prompt)} tokens"
            )
        found.append(one.with_prompt(model, other.item.prompt, "the other"))
    return found
