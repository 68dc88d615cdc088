"""Choosing the next token for many rows at once, each with its own setting and seed.

A sampled token is argmax(logits / T + Gumbel noise), which draws from softmax(logits / T). The
noise is a hash of (row seed, step, token id): the same on every device, and no row's draw depends
on which rows stand beside it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_steer.engine.row import Sampling

Logits = Float[Tensor, "batch d_vocab"]


def _signed(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def _mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The 32-bit integer hash `lowbias32` (Wellons, public domain), on int32 that wraps."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel(
    seeds: Int[Tensor, " batch"], steps: Int[Tensor, " batch"], d_vocab: int
) -> Float[Tensor, "batch d_vocab"]:
    """Standard Gumbel noise, a pure function of (seed, step, token id).

    Args:
        seeds: any 64-bit integers.
        steps: how many tokens the row has generated.
    """
    low, high = (seeds & 0xFFFFFFFF), ((seeds >> 32) & 0xFFFFFFFF)
    words = [(w - ((w & 0x80000000) << 1)).to(torch.int32) for w in (low, high, steps)]
    key = _mixed(_mixed(_mixed(words[0]) ^ words[1]) + words[2] * _signed(0x9E3779B9))
    token = torch.arange(d_vocab, device=seeds.device, dtype=torch.int32)
    # two rounds, so that tokens of neighbouring steps do not share a sequence
    bits = _mixed(_mixed(token * _signed(0x85EBCA6B))[None] ^ key[:, None])
    uniform = (((bits >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23  # strictly between 0 and 1
    return uniform.log_().neg_().log_().neg_()


class Sampler:
    """The sampling settings of a batch as tensors."""

    def __init__(
        self,
        settings: Sequence[Sampling],
        seeds: Sequence[int],
        seen: Bool[Tensor, "batch d_vocab"] | None,
        device: torch.device,
    ) -> None:
        """`seen` marks the ids of each row so far; needed if any row has a repetition penalty."""

        numbers = [[s.temperature, s.repetition_penalty, s.top_p] for s in settings]
        columns = torch.tensor(numbers, dtype=torch.float32).to(device)
        self.temperature, self.penalty, self.top_p = columns.split(1, dim=1)
        self.top_k = torch.tensor([[s.top_k] for s in settings]).to(device)
        wrapped = [((s + 2**63) % 2**64) - 2**63 for s in seeds]
        self.seeds = torch.tensor(wrapped, dtype=torch.int64).to(device)
        self.seen = seen
        self.penalised = any(s.repetition_penalty != 1 for s in settings)
        self.drawn = any(s.temperature > 0 for s in settings)
        cuts = [s.top_k for s in settings if s.temperature > 0 and (s.top_p < 1 or s.top_k)]
        self.cut = bool(cuts)
        self.best = max(cuts) if all(cuts) and cuts else 0  # how many need ranking; 0 is all

    def scores(self, logits: Logits, steps: Int[Tensor, " batch"]) -> Logits:
        """What the next token is the argmax of: penalised, scaled, cut, with noise."""
        scores = logits.float()
        if self.penalised and self.seen is not None:
            punished = torch.where(scores > 0, scores / self.penalty, scores * self.penalty)
            scores = torch.where(self.seen, punished, scores)
        if not self.drawn:
            return scores
        sampled = self.temperature > 0
        scores = torch.where(sampled, scores / self.temperature.clamp_min(1e-6), scores)
        if self.cut:
            scores = torch.where(sampled & self._outside(scores), -torch.inf, scores)
        noise = gumbel(self.seeds, steps, scores.shape[-1])
        return torch.where(sampled, scores + noise, scores)

    def pick(self, logits: Logits, steps: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The next token of every row; -1 where its score is not a number."""
        best, chosen = self.scores(logits, steps).max(-1)
        return chosen.where(best.isfinite(), -1)

    def mark(self, chosen: Int[Tensor, " batch"]) -> None:
        """Counts tokens as seen."""
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)

    def _outside(self, scores: Logits) -> Bool[Tensor, "batch d_vocab"]:
        """Tokens that top-k, then top-p, leave out; equals of the k-th best stay."""
        size = scores.shape[-1]
        width = min(self.best or size, size)
        ranked, order = scores.topk(width) if width < size else scores.sort(descending=True)
        low = (self.top_k > 0) & (scores < ranked.gather(1, self.top_k.clamp(1, width) - 1))
        upto = scores.masked_fill(low, -torch.inf).softmax(-1).gather(1, order).cumsum(-1)
        before = upto.roll(1, -1)
        before[:, 0] = 0  # the best token always stays
        last = (upto[:, -1:] >= self.top_p).expand(scores.shape)  # what is not ranked comes last
        outside: Tensor = low | ((self.top_p < 1) & last.scatter(1, order, before >= self.top_p))
        return outside
