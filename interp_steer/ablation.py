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

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_steer.bank import Hook, compile_banks
from interp_steer.console import Report
from interp_steer.direction import Direction, DirectionSet
from interp_steer.errors import RequestError, nearest
from interp_steer.forward import Steered
from interp_steer.intervention import Intervention, Scope, Vector
from interp_steer.item import Item
from interp_steer.model import SteeringModel
from interp_steer.prompt import Encoded, Prompt, readable
from interp_steer.site import Site

# what is changed for each component
HOOKS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("resid_pre",),
    "resid_post": ("resid_post",),
    "block": ("attn_out", "mlp_out"),
    "attn_out": ("attn_out",),
    "mlp_out": ("mlp_out",),
    "z": ("z",),
    "direction": ("resid_post",),
    "feature": (),
}
COMPONENTS = tuple(HOOKS)
"""`resid_pre`, `resid_post`: the whole stream before or after a block. `block`: what a block adds
to the stream, which passes by. `attn_out`, `mlp_out`: one of its two parts. `z`: one attention head
at a time. `direction`: one direction of the stream after a block. `feature`: an SAE's latent."""
METHODS = ("zero", "mean", "resample", "directional")
"""`zero`; `mean` over positions of a data set; `resample`: the value in another prompt of the same
length; `directional`: x - v v'x (Arditi et al. 2024, arXiv 2406.11717)."""
SPANS = ("layer", "window", "upward", "downward")
"""`layer`: each alone; `window`: `width` neighbours; `upward`: from the first layer up to each;
`downward`: from each to the last."""
SCORES = ("logit_difference", "kl_last", "kl_all", "loss", "words")
"""`logit_difference`: log p(y+) - log p(y-) at the first token in which an item's answers differ.
`kl_last`: KL(clean || changed) at the last prompt position. `kl_all`: its mean over all positions
but the first. `loss`: cross-entropy of the continuation, or of the prompt's own tokens. `words`:
log-probability, at the last prompt position, of any first token of given words. All in nats."""

BETWEEN = ("resid_pre", "resid_post")  # between blocks, not inside one
TOKENS_AT_ONCE = 8192  # of all variants that pass through a block together
ITEM_TOKENS = 1024  # of items whose streams before every block are kept together
LOGITS_AT_ONCE = 2**25  # numbers; a vocabulary's logits of every scored position are many


@dataclass(frozen=True)
class Reading:
    """An item as tokens, and where in them its scores are found.

    Attributes:
        ids: the prompt, and after it the continuation or what the two answers share.
        last: the last prompt position.
        loss: positions whose next token counts for the loss, from and up to.
        at: the position that predicts the tokens in which the answers differ.
        pair: these two tokens, y+ first; None without answers.
    """

    item: Item
    ids: tuple[int, ...]
    last: int
    loss: tuple[int, int]
    at: int
    pair: tuple[int, int] | None

    @classmethod
    def of(cls, model: SteeringModel, item: Item) -> "Reading":
        """Raises RequestError if the answers do not differ, or the tokens exceed the context."""
        prompt = model.encode(item.prompt).ids
        last, loss, shared, pair = len(prompt) - 1, (0, len(prompt) - 1), 0, None
        tail: tuple[int, ...] = ()
        if item.continuation is not None:
            tail = token_ids(model, item.continuation)
            loss = last, last + len(tail)
        if item.positive is not None and item.negative is not None:
            yes, no = token_ids(model, item.positive), token_ids(model, item.negative)
            differs = (i for i, (y, n) in enumerate(zip(yes, no, strict=False)) if y != n)
            found = next(differs, None)
            if found is None:
                raise RequestError(
                    f"of the answers {item.positive!r} and {item.negative!r} one begins with all "
                    "tokens of the other: no token tells them apart"
                )
            shared, pair = found, (yes[found], no[found])
            tail = tail or yes[:shared]
            if tail[:shared] != yes[:shared]:
                raise RequestError(
                    f"{item.text[:60]!r} has answers that begin alike and a continuation that "
                    "does not; make it two items"
                )
        if len(prompt) + len(tail) > model.n_ctx:
            raise RequestError(
                f"{item.text[:60]!r} and what follows are {len(prompt) + len(tail)} tokens long; "
                f"the context of {model.name} holds {model.n_ctx}"
            )
        return cls(item, (*prompt, *tail), last, loss, last + shared, pair)

    def has(self, score: str) -> bool:
        """Whether the item has what a score needs."""
        if score == "logit_difference":
            return self.pair is not None
        if score == "loss":
            return self.loss[0] < self.loss[1]
        return score != "kl_all" or len(self.ids) > 1

    def with_prompt(self, model: SteeringModel, other: Prompt, said: str) -> tuple[int, ...]:
        """The tokens of another prompt in place of this one's, with the same tail.

        Raises:
            RequestError: the two prompts have different numbers of tokens.
        """
        ids, own = model.encode(other).ids, self.ids[: self.last + 1]
        if len(ids) != len(own):
            raise RequestError(
                f"{self.item.text[:60]!r} has {len(own)} tokens and {said} {len(ids)}: "
                "activations are exchanged between prompts of one length"
            )
        return (*ids, *self.ids[self.last + 1 :])


def token_ids(model: SteeringModel, text: str) -> tuple[int, ...]:
    """Tokens of a text that follows a prompt directly."""
    return tuple(model.tokenizer(readable(text), add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of activations at one place, for all items of a trunk.

    Variants that hold the same edits (the same objects) up to a block share the computation.

    Attributes:
        component, layer, head: where; without a head `z` is changed whole.
        change: a function on `[item, pos, d_model]`; at one head `[item, pos, d_head]`, at the
            whole `z` `[item, pos, head, d_head]`.
    """

    component: str
    layer: int
    change: Callable[[Tensor], Tensor]
    head: int | None = None

    @property
    def block(self) -> int:
        """The first block that it changes, or whose input it changes."""
        return self.layer + (self.component == "resid_post")


Variant = tuple[Edit, ...]


class Trunk:
    """The unchanged pass over some token sequences, from which variants branch off.

    The sequences are right-padded: padding comes after every real token, so that plain causal
    attention is right for sequences of any lengths.

    Attributes:
        real: which positions are no padding, [item, pos].
        positions: absolute positions, -1 at padding, [item, pos].
        streams: the stream before each block, and after the last one; [item, pos, d_model] each.
        kept: activations at the hooks that were asked for.
    """

    def __init__(
        self,
        model: SteeringModel,
        sequences: Sequence[Sequence[int]],
        keep: Collection[Hook] = (),
    ) -> None:
        """Computes it; `keep` names hooks whose activations are kept."""
        self.model = model
        longest = max(len(ids) for ids in sequences)
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in sequences]
        lengths = torch.tensor([[len(ids)] for ids in sequences], device=model.device)
        where = torch.arange(longest, device=model.device)[None]
        self.real: Bool[Tensor, "item pos"] = where < lengths
        self.positions = torch.where(self.real, where, -1)
        self.streams: list[Float[Tensor, "item pos d_model"]] = []
        self.kept: dict[Hook, Tensor] = {}
        with torch.no_grad():
            x = model.embed(torch.tensor(padded, device=model.device))
            self._rotary = model.rotary(x, where)
            for layer in range(model.n_layers):
                self.streams.append(x)
                with model.inside(
                    {
                        hook: partial(self._keep, hook)
                        for hook in keep
                        if hook[1] == layer and hook[0] not in BETWEEN
                    }
                ):
                    x = model.block(layer, x, self._rotary, None)
            self.streams.append(x)

    def _keep(self, hook: Hook, x: Tensor) -> Tensor:
        self.kept[hook] = x
        return x

    def value(self, component: str, layer: int, head: int | None = None) -> Tensor:
        """An activation of the unchanged pass, `[item, pos, d_model]` or as `Edit.change` has it;
        one inside a block must have been kept.
        """
        if component in BETWEEN:
            return self.streams[layer + (component == "resid_post")]
        x = self.kept[component, layer]
        return x if head is None else x[:, :, head]

    def changed(self, first: bool = False) -> Bool[Tensor, "item pos"]:
        """Positions open to ablation: no padding, and the first one only if asked."""
        return self.positions >= (0 if first else 1)

    def steered(self, rows: Sequence[Steered]) -> Variant:
        """Edits that steer each item by interventions of its own."""
        banks = compile_banks(rows, self.model.device)
        return tuple(
            Edit(component, layer, partial(bank.apply, positions=self.positions))
            for (component, layer), bank in banks.items()
        )

    @torch.no_grad()
    def branch(
        self, variants: Sequence[Variant], resume: bool = True
    ) -> Float[Tensor, "variant item pos d_model"]:
        """The stream after the last block under each variant.

        At every block the batch holds one entry for each different history of edits so far; those
        of equal history part where they begin to differ.

        Args:
            resume: False computes every variant from the first block on, for comparison.
        """

        def histories(layer: int) -> list[tuple[int, Variant]]:
            so_far = [tuple(e for e in variant if e.block <= layer) for variant in variants]
            return [(-1 if resume else n, edits) for n, edits in enumerate(so_far)]

        unchanged: tuple[int, Variant] = (-1, ())
        x = self.streams[0][None][:0]
        before = [unchanged] * len(variants)
        at: dict[tuple[int, Variant], int] = {}
        for layer in range(self.model.n_layers + 1):
            now = histories(layer)
            parents = {new: old for new, old in zip(now, before, strict=True) if new != unchanged}
            if parents.keys() != at.keys():
                sources = [at.get(old, -1) + 1 for old in parents.values()]
                x = torch.cat([self.streams[layer][None], x])[sources]
                at = {history: n for n, history in enumerate(parents)}
            before = now
            if at:
                x = self._through(x, layer, [edits for _, edits in at])
        order = [at.get(history, -1) + 1 for history in before]
        return torch.cat([self.streams[-1][None], x])[order]

    def _through(
        self, x: Float[Tensor, "entry item pos d_model"], layer: int, edits: list[Variant]
    ) -> Float[Tensor, "entry item pos d_model"]:
        """Edits before a block, and the block with the edits inside it."""
        inside: dict[Hook, list[tuple[int, Edit]]] = {}
        for entry, variant in enumerate(edits):
            for edit in variant:
                if edit.block != layer:
                    continue
                if edit.component in BETWEEN:
                    x[entry] = edit.change(x[entry])  # x is the batch's own copy
                else:
                    inside.setdefault((edit.component, layer), []).append((entry, edit))
        if layer == self.model.n_layers:
            return x

        def changed(some: list[tuple[int, Edit]], inner: Tensor) -> Tensor:
            out = inner.clone().view(*x.shape[:2], *inner.shape[1:])
            for entry, edit in some:
                part = out[entry] if edit.head is None else out[entry, :, :, edit.head]
                part.copy_(edit.change(part))
            return torch.flatten(out, 0, 1)

        with self.model.inside({hook: partial(changed, some) for hook, some in inside.items()}):
            flat = self.model.block(layer, x.flatten(0, 1), self._rotary, None)
        return flat.view(x.shape)


def put(
    mask: Bool[Tensor, "item pos"], value: Float[Tensor, "..."], x: Float[Tensor, "item pos *d"]
) -> Float[Tensor, "item pos *d"]:
    """`value` in place of `x` where the mask says so."""
    return torch.where(mask[(..., *(None,) * (x.ndim - 2))], value.to(x.dtype), x)


class Judge:
    """Scores of streams after the last block, for the items of one trunk.

    Attributes:
        clean: the scores of the trunk itself.
    """

    def __init__(
        self,
        trunk: Trunk,
        readings: Sequence[Reading],
        scores: Sequence[str],
        words: Sequence[int] = (),
    ) -> None:
        self.model, self.readings, self.scores = trunk.model, readings, scores
        self.words = torch.tensor(words, dtype=torch.long, device=trunk.model.device)
        everywhere = "kl_all" in scores or "loss" in scores
        points = [
            (row, position)
            for row, one in enumerate(readings)
            for position in (range(len(one.ids)) if everywhere else sorted({one.last, one.at}))
        ]
        self._point = {place: n for n, place in enumerate(points)}
        self._rows, self._positions = torch.tensor(points, device=trunk.model.device).T
        after = [(*readings[row].ids, 0)[position + 1] for row, position in points]
        self._next = torch.tensor(after, device=trunk.model.device)
        self._clean: Tensor | None = None
        self.clean: Float[Tensor, "item score"] = self.of(trunk.streams[-1][None])[0]

    @torch.no_grad()
    def of(
        self, x: Float[Tensor, "variant item pos d_model"]
    ) -> Float[Tensor, "variant item score"]:
        """Scores; NaN where an item has not what a score needs. The first call says what the
        clean distributions are.
        """
        found = []
        size = max(1, LOGITS_AT_ONCE // (len(self._next) * self.model.d_vocab))
        for some in x.split(size):
            logits = self.model.unembed(some[:, self._rows, self._positions])
            logprobs = logits.float().log_softmax(-1)
            if self._clean is None:
                self._clean = logprobs[0]
            found.append(self._scored(logprobs, self._clean).cpu())
        return torch.cat(found)

    def _scored(
        self,
        logprobs: Float[Tensor, "variant point d_vocab"],
        clean: Float[Tensor, "point d_vocab"],
    ) -> Float[Tensor, "variant item score"]:
        out = logprobs.new_full((len(logprobs), len(self.readings), len(self.scores)), torch.nan)
        kl = own = logprobs.new_empty(len(logprobs), 0)
        if {"kl_last", "kl_all"} & set(self.scores):
            chance = clean.exp()
            kl = torch.stack([(chance * (clean - one)).sum(-1) for one in logprobs])
        if "loss" in self.scores:
            own = logprobs.gather(2, self._next[None, :, None].expand(len(logprobs), -1, 1))[..., 0]
        for row, one in enumerate(self.readings):
            last, at = self._point[row, one.last], self._point[row, one.at]
            for column, score in enumerate(self.scores):
                if not one.has(score):
                    continue
                if score == "logit_difference" and one.pair:
                    value = logprobs[:, at, one.pair[0]] - logprobs[:, at, one.pair[1]]
                elif score == "words":
                    value = logprobs[:, last, self.words].logsumexp(-1)
                elif score == "kl_last":
                    value = kl[:, last]
                else:
                    start = self._point[row, 0]
                    begin, end = one.loss if score == "loss" else (1, len(one.ids))
                    taken = -own if score == "loss" else kl
                    value = taken[:, start + begin : start + end].mean(-1)
                out[:, row, column] = value
        return out


def sweep(
    model: SteeringModel,
    readings: Sequence[Reading],
    scores: Sequence[str],
    variants: Callable[[Trunk, list[int]], Sequence[Variant]],
    *,
    keep: Collection[Hook] = (),
    words: Sequence[int] = (),
    resume: bool = True,
    batch: int | None = None,
    report: Report | None = None,
) -> tuple[Float[Tensor, "item score"], Float[Tensor, "variant item score"]]:
    """Scores of items, unchanged and under every variant, in bounded memory.

    Args:
        variants: makes the variants for a trunk over some of the items, named by their numbers;
            as many and in the same order for each.
        keep: hooks whose activations the trunk keeps.
        words: token ids for the score `words`.
        resume, batch, report: as for `ablate`.
    """
    clean: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    for chunk in _chunks([len(one.ids) for one in readings], batch):
        rows = [readings[n] for n in chunk]
        trunk = Trunk(model, [one.ids for one in rows], keep)
        judge = Judge(trunk, rows, scores, words)
        made = variants(trunk, chunk)
        out = torch.full((len(made), *judge.clean.shape), torch.nan)
        size = max(1, (batch or TOKENS_AT_ONCE // trunk.real.shape[1]) // len(chunk))
        # neighbours enter at neighbouring blocks, so that a part of them begins late
        order = sorted(range(len(made)), key=lambda n: sorted(edit.block for edit in made[n]))
        for start in range(0, len(made), size):
            some = order[start : start + size]
            out[some] = judge.of(trunk.branch([made[n] for n in some], resume))
            if report:
                done = len(chunk) * (start + len(some)) / len(made)
                report((len(clean) + done) / len(readings))
        for place, n in enumerate(chunk):
            clean[n], values[n] = judge.clean[place], out[:, place]
    numbers = range(len(readings))
    return torch.stack([clean[n] for n in numbers]), torch.stack([values[n] for n in numbers], 1)


def _chunks(lengths: Sequence[int], batch: int | None) -> list[list[int]]:
    """Items of like lengths together, as many as their kept streams allow."""
    if batch is not None and batch < 1:
        raise RequestError(f"batch is {batch}, expected at least 1")
    chunks: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        full = chunks and (len(chunks[-1]) + 1) * lengths[n] > ITEM_TOKENS
        if not chunks or full or len(chunks[-1]) == batch:
            chunks.append([])
        chunks[-1].append(n)
    return chunks


def check_names(kind: str, given: Sequence[str], choices: Sequence[str]) -> None:
    """Raises RequestError for a name that is none of the choices, or for none at all."""
    if not given:
        raise RequestError(f"no {kind} given{nearest('', choices)}")
    for name in given:
        if name not in choices:
            raise RequestError(f"unknown {kind} {name!r}{nearest(name, choices)}")


def check_range(kind: str, given: Sequence[int] | None, count: int, name: str) -> list[int]:
    """Numbers of layers or heads, all for None; raises RequestError for one out of range."""
    numbers = list(range(count)) if given is None else list(given)
    if not numbers:
        raise RequestError(f"no {kind} given: {name} has {kind}s 0-{count - 1}")
    for one in numbers:
        if not 0 <= one < count:
            raise RequestError(f"{kind} {one} is out of range: {name} has {kind}s 0-{count - 1}")
    return numbers


def chosen_scores(
    readings: Sequence[Reading], scores: Sequence[str] | None, words: Sequence[str]
) -> list[str]:
    """The scores asked for, or all that some item can have; raises RequestError for others."""
    if not readings:
        raise RequestError("no items given")
    able = [
        score
        for score in SCORES
        if any(one.has(score) for one in readings) and (words or score != "words")
    ]
    if scores is None:
        return able
    check_names("score", scores, SCORES)
    for score in scores:
        if score not in able:
            lacks = {
                "logit_difference": "no item has answers, positive and negative",
                "words": "no words are given",
            }.get(score, "every prompt is one token long")
            raise RequestError(f"{score} cannot be had: {lacks}; of these items: {', '.join(able)}")
    return list(dict.fromkeys(scores))


def first_tokens(model: SteeringModel, words: Sequence[str]) -> list[int]:
    """The first token of every word, with and without a space before it."""
    said = [token_ids(model, text) for word in words for text in (word.strip(), f" {word.strip()}")]
    if not all(said):
        raise RequestError("a word is empty")
    return sorted({ids[0] for ids in said})


def tidy(
    columns: Sequence[str],
    names: Sequence[tuple[object, ...]],
    readings: Sequence[Reading],
    scores: Sequence[str],
    clean: Float[Tensor, "item score"],
    values: Float[Tensor, "variant item score"],
) -> pd.DataFrame:
    """A row for each variant, item and score that the item has: the variant's own columns, then
    `item`, `score`, `clean`, `value`, `change`.
    """
    before = clean.tolist()
    rows = [
        (*name, one.item.id, score, before[i][s], of_variant[i][s])
        for name, of_variant in zip(names, values.tolist(), strict=True)
        for i, one in enumerate(readings)
        for s, score in enumerate(scores)
        if one.has(score)
    ]
    table = pd.DataFrame(rows, columns=[*columns, "item", "score", "clean", "value"])
    if "head" in table:
        table["head"] = table["head"].astype("Int64")
    return table.assign(change=table["value"] - table["clean"])


def summarised(
    table: pd.DataFrame, by: Sequence[str], column: str, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Means of a column over items with intervals, one row for each setting of `by`.

    Returns:
        The columns of `by`, then `estimate`, `low`, `high` (NaN where no interval can be told),
        `n` (items), `missing` (items without a finite value, left out) and `interval` (how it was
        formed, or why there is none).
    """
    from interp_steer import intervals

    rows = []
    for setting, some in table.groupby(list(by), sort=False, dropna=False):
        # one value an item: items that are given twice are no further evidence
        values = some.groupby("item", sort=False)[column].mean().to_numpy(float)
        known = values[np.isfinite(values)]
        row: dict[str, object] = dict(zip(by, setting, strict=True))
        row |= dict.fromkeys(("estimate", "low", "high"), math.nan)
        row |= {"n": len(known), "missing": len(values) - len(known), "interval": "no values"}
        if len(known):
            found = intervals.mean(known, level=level, seed=seed)
            limits = {"low": found.low, "high": found.high, "interval": found.method}
            row |= {"estimate": found.estimate, **limits}
        rows.append(row)
    ends = ["estimate", "low", "high", "n", "missing", "interval"]
    out = pd.DataFrame(rows, columns=[*by, *ends])
    return out.astype({"low": float, "high": float})


# --- ablation -----------------------------------------------------------------------------------


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
        """Whether the stream after the first block needs no computing: nothing in the block reads
        what is put in, and what it does read is not changed yet.
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

    def summary(self, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """The mean change of each cut and score with its interval over items; see `summarised`."""
        by = ["component", "method", "layer", "last", "span", "head", "score"]
        return summarised(self.table, by, "change", level, seed)


def ablate(
    model: SteeringModel,
    items: Sequence[Item],
    components: Sequence[str] = ("attn_out", "mlp_out"),
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
        def edit(operator: str, component: str, layer: int, head: int | None) -> Edit:
            if operator not in METHODS and vector is not None:
                site, scope = Site(component, layer), Scope(first=first)
                one = Intervention(operator, (vector,), 0.0, "", (site,), scope)
                return trunk.steered([((one,), prompt) for prompt in own])[0]
            known = value(operator, component, layer, head)
            return Edit(component, layer, partial(put, changed, known), head)

        @cache
        def begun(operator: str, component: str, layer: int) -> Edit:
            x = trunk.streams[layer]
            for part in ("attn_out", "mlp_out"):
                gone = part in HOOKS[component]
                x = x + (value(operator, part, layer, None) if gone else trunk.value(part, layer))
            return Edit("resid_post", layer, partial(put, changed, x))

        def variant(cut: Cut) -> Variant:
            edits = [edit(cut.operator, *place, cut.head) for place in cut.places(vector)]
            if cut.closed:
                edits[: len(HOOKS[cut.component])] = [begun(cut.operator, cut.component, cut.first)]
            return tuple(edits)

        return [variant(cut) for cut in cuts]

    clean, values = sweep(
        model, readings, asked, variants,
        keep={("attn_out", cut.first) for cut in cuts if cut.closed},
        words=first_tokens(model, words), resume=resume, batch=batch, report=report,
    )  # fmt: skip
    columns = ["component", "method", "layer", "last", "span", "head"]
    names = [(c.component, c.method, c.first, c.last, c.span, c.head) for c in cuts]
    return Ablation(tidy(columns, names, readings, asked, clean, values))


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
    for kind, given, choices in (
        ("component", components, COMPONENTS),
        ("method", methods, METHODS),
        ("span", (span,), SPANS),
    ):
        check_names(kind, given, choices)
    ends = check_range("layer", layers, model.n_layers, model.name)
    if not 1 <= width <= model.n_layers:
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
        own = {"direction": ("directional",), "feature": ("zero",)}.get(component, methods)
        if vector is None and (component == "feature" or "directional" in own):
            raise RequestError(f"ablating {component} needs a vector: what is ablated there")
        if component == "z":
            if span != "layer" or "directional" in own:
                raise RequestError(
                    "z is ablated by zero, mean or resample, and one layer at a time: heads of "
                    "different layers that share a number share nothing else; use attn_out"
                )
            numbers = check_range("head", heads, model.n_heads, model.name)
            cuts += [Cut("z", m, n, n, head) for m in own for n, _ in spans for head in numbers]
        elif component == "feature":
            if not isinstance(vector, Direction) or not vector.is_feature:
                raise RequestError(
                    "component 'feature' needs a feature of an SAE as vector, made with "
                    "feature(release, sae_id, index); for other vectors use 'direction'"
                )
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
    for chunk in _chunks([len(ids) for ids in known], None):
        trunk = Trunk(model, [known[n] for n in chunk], hooks)
        counted = trunk.changed()
        count += int(counted.sum())
        for hook in hooks:
            total = trunk.value(*hook)[counted].double().sum(0)
            sums[hook] = sums[hook] + total if hook in sums else total
    if not count:
        raise RequestError("no prompt is two tokens long: there is no mean but of first positions")
    return {hook: (total / count).to(model.dtype) for hook, total in sums.items()}


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
