"""Items as tokens, and their scores under many variants of one pass, in bounded memory."""

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.causal.branch import Trunk, Variant, check_names
from interp_steer.engine.bank import Hook
from interp_steer.errors import RequestError
from interp_steer.model.block import exactly
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import Prompt
from interp_steer.util.console import Report, watched

SCORES = ("logit_difference", "kl_last", "kl_all", "loss", "words")
"""`logit_difference`: log p(y+) - log p(y-) at the first token in which an item's answers differ.
`kl_last`: KL(clean || changed) at the last prompt position. `kl_all`: its mean over all positions
but the first. `loss`: cross-entropy of the continuation, or of the prompt's own tokens. `words`:

    ln( 1/T sum_{t = 1..T} sum_{w in W} p(w | prompt, a_1 .. a_{t-1}) )

the log of the mean probability that a word begins, over the positions of an answer a that every
variant reads alike: the item's continuation, else the unchanged model's own greedy answer (see
`answered`). W are the first tokens of given words. All in nats."""
ANSWER = 32  # tokens of an answer that `words` reads
TOKENS_AT_ONCE = 8192  # of all variants that pass through a block together
ITEM_TOKENS = 1024  # of items whose streams before every block are kept together
LOGITS_AT_ONCE = 2**25  # numbers; a vocabulary's logits of every scored position are many


@dataclass(frozen=True)
class Reading:
    """An item as tokens, and where in them its scores are found.

    Attributes:
        ids: the prompt, and after it the continuation, what the two answers share, or the model's
            own answer.
        last: the last prompt position.
        own: how many of the ids the item itself brings; the rest is the model's own answer.
        loss: positions whose next token counts for the loss, from and up to.
        at: the position that predicts the tokens in which the answers differ.
        pair: these two tokens, y+ first; None without answers.
        answer: how many positions, from the last prompt position on, `words` reads.
    """

    item: Item
    ids: tuple[int, ...]
    last: int
    own: int
    loss: tuple[int, int]
    at: int
    pair: tuple[int, int] | None
    answer: int = 1

    @classmethod
    def of(cls, model: SteeringModel, item: Item) -> "Reading":
        """Raises RequestError if the answers do not differ, or the tokens exceed the context."""
        prompt = model.encode(item.prompt).ids
        last, loss, shared, pair = len(prompt) - 1, (0, len(prompt) - 1), 0, None
        tail: tuple[int, ...] = ()
        if item.continuation is not None:
            tail = model.encode_after(item.prompt, item.continuation)
            loss = last, last + len(tail)
        if item.positive is not None and item.negative is not None:
            sides = item.positive, item.negative
            yes, no = (model.encode_after(item.prompt, answer) for answer in sides)
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
        own = len(prompt) + len(tail)
        return cls(item, (*prompt, *tail), last, own, loss, last + shared, pair)

    def has(self, score: str) -> bool:
        """Whether the item has what a score needs."""
        if score == "logit_difference":
            return self.pair is not None
        if score == "loss":
            return self.loss[0] < self.loss[1]
        return score != "kl_all" or self.own > 1

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
        points = []
        for row, one in enumerate(readings):
            read = set(range(len(one.ids))) if everywhere else {one.last, one.at}
            read |= set(range(one.last, one.last + one.answer))
            points += [(row, position) for position in sorted(read)]
        self._point = {place: n for n, place in enumerate(points)}
        self._rows, self._positions = torch.tensor(points, device=trunk.model.device).T
        after = [(*readings[row].ids, 0)[position + 1] for row, position in points]
        self._next = torch.tensor(after, device=trunk.model.device)
        self._clean: Tensor | None = None
        self.clean: Float[Tensor, "item score"] = self.of(trunk.streams[-1][None])[0]

    @exactly()
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
                    spoken = logprobs[:, last : last + one.answer][..., self.words]
                    value = spoken.flatten(1).logsumexp(-1) - math.log(one.answer)
                elif score == "kl_last":
                    value = kl[:, last]
                else:
                    start = self._point[row, 0]
                    begin, end = one.loss if score == "loss" else (1, one.own)
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
    with watched("trying variants", 1.0, report) as told:
        for chunk in batches([len(one.ids) for one in readings], batch):
            rows = [readings[n] for n in chunk]
            trunk = Trunk(model, [one.ids for one in rows], keep)
            judge = Judge(trunk, rows, scores, words)
            made = variants(trunk, chunk)
            shape = len(made), *judge.clean.shape
            out = torch.full(shape, torch.nan, dtype=torch.float32)
            size = max(1, (batch or TOKENS_AT_ONCE // trunk.real.shape[1]) // len(chunk))
            # neighbours enter at neighbouring blocks, so that a part of them begins late
            order = sorted(range(len(made)), key=lambda n: sorted(edit.block for edit in made[n]))
            for start in range(0, len(made), size):
                some = order[start : start + size]
                out[some] = judge.of(trunk.branch([made[n] for n in some], resume))
                if told:
                    done = len(chunk) * (start + len(some)) / len(made)
                    told((len(clean) + done) / len(readings))
            for place, n in enumerate(chunk):
                clean[n], values[n] = judge.clean[place], out[:, place]
    numbers = range(len(readings))
    return torch.stack([clean[n] for n in numbers]), torch.stack([values[n] for n in numbers], 1)


def batches(lengths: Sequence[int], batch: int | None) -> list[list[int]]:
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


def answered(
    model: SteeringModel, readings: Sequence[Reading], length: int = ANSWER
) -> list[Reading]:
    """Readings whose answers `words` reads: those that bring no continuation go on with the
    unchanged model's own greedy answer.

    Args:
        length: of an answer so many positions are read at most; 1 is the last prompt position
            alone.

    Raises:
        RequestError: no such length, or a prompt that leaves no room for the answer.
    """
    from interp_steer.engine.engine import Engine
    from interp_steer.engine.row import Row, Sampling

    if type(length) is not int or length < 1:
        raise RequestError(f"an answer of {length!r} tokens; expected at least 1")
    if length == 1:
        return list(readings)
    sampling = Sampling(max_new_tokens=length - 1)  # the last position's token is not read
    silent = [one for one in readings if one.own == one.last + 1]
    results = Engine(model).generate([Row(one.item.prompt, (), sampling) for one in silent])
    said = {one: result.token_ids for one, result in zip(silent, results, strict=True)}
    whole = [replace(one, ids=(*one.ids, *said.get(one, ()))) for one in readings]
    return [replace(one, answer=min(length, len(one.ids) - one.last)) for one in whole]


def first_tokens(model: SteeringModel, words: Sequence[str]) -> list[int]:
    """The tokens with which any of the words begins: after a space, and at the start of a line.

    Raises:
        RequestError: a word is empty, or has no token of its own.
    """
    found: set[int] = set()
    for word in map(str.strip, words):
        if not word:
            raise RequestError("a word is empty")
        said = set()
        for before, text in (("a", f" {word}"), ("a\n", word)):
            with suppress(RequestError):  # the tokenizer may join a line's end to the word
                said.add(model.encode_after(before, text)[0])
        # a bare mark of a space, before a word that the tokenizer spells out, begins any word
        said = {token for token in said if model.decode_token(token).strip()}
        if not said:
            raise RequestError(f"{word!r} begins with no token of its own")
        found |= said
    return sorted(found)


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
    from interp_steer.stats import intervals

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
