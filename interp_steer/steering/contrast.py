"""Directions from contrasting prompts: one pass over the prompts, then one pure function a method.

Each method takes activations of positive and negative prompts at one layer, `[n, d_model]` each,
and returns a vector in the model's residual units.
"""

import datetime
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError, nearest, note
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import digests
from interp_steer.prompts.prompt import Encoded, Prompt
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.util import tensor_file
from interp_steer.util.console import progress
from interp_steer.util.files import whole

FORMAT = "interp-steer/contrast/1"
POSITIONS = ("mean", "last", "answer")
ALIKE = 0.01  # share of the differences' second moment that centring must leave for a component

Positive = Float[Tensor, "n_positive d_model"]
Negative = Float[Tensor, "n_negative d_model"]


def mean_difference(positive: Positive, negative: Negative) -> Float[Tensor, " d_model"]:
    """Mean of the positives minus mean of the negatives.

    Rimsky et al. 2024 (CAA, arXiv 2312.06681); DiffMean in AxBench (arXiv 2501.17148).
    """
    return positive.mean(0) - negative.mean(0)


def principal_component(positive: Positive, negative: Negative) -> Float[Tensor, " d_model"]:
    """First principal component of the centred pairwise differences (Zou et al. 2023, RepE).

    Its sign and length are those of the difference of means along it, so positives project higher.
    Centring removes what all pairs have in common: where every pair differs in the same way, that
    is the concept itself, and `mean_difference` is the method to use. A `SteerWarning` says so
    where less than `ALIKE` of the variance is left, or no more than float32 rounds away.
    """
    if len(positive) != len(negative) or len(positive) < 3:
        raise RequestError(
            "the principal component needs at least 3 prompts of each kind, in pairs; got "
            f"{len(positive)} positive and {len(negative)} negative"
        )
    difference = positive - negative
    centred = difference - difference.mean(0)
    rounding = torch.finfo(torch.float32).eps * (positive.norm() + negative.norm())
    if centred.norm() <= max(math.sqrt(ALIKE) * difference.norm(), rounding):
        note(
            f"all pairs differ alike: centring leaves less than {ALIKE:.0%} of the variance, or no "
            "more than rounding, and the principal component is of that rest, not of what the "
            "pairs have in common; mean-difference is the method to use"
        )
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    first = components[0]
    along = torch.dot(mean_difference(positive, negative), first)
    return torch.mul(first, along)


def logistic_probe(positive: Positive, negative: Negative) -> Float[Tensor, " d_model"]:
    """Weights of a logistic probe on standardised activations, mapped back to residual units.

    With z = (x - mean) / sd and logit = w.z + b, the gradient of the logit in x is w / sd. Its
    length means nothing as a shift, so it is given that of the difference of means along it.
    """
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([positive, negative]).double()
    spread = x.std(0).clamp_min(1e-8 * x.abs().max())
    labels = [1] * len(positive) + [0] * len(negative)
    probe = LogisticRegression(max_iter=2000).fit(((x - x.mean(0)) / spread).numpy(), labels)
    weights = torch.from_numpy(probe.coef_[0]) / spread
    unit = (weights / weights.norm()).to(positive.dtype)
    along = torch.dot(mean_difference(positive, negative), unit)
    return torch.mul(unit, along)


METHODS: dict[str, Callable[[Positive, Negative], Float[Tensor, " d_model"]]] = {
    "mean-difference": mean_difference,
    "principal-component": principal_component,
    "logistic-probe": logistic_probe,
}


@dataclass(frozen=True)
class Contrast:
    """Activations of positive and negative prompts at every layer.

    Attributes:
        positive, negative: resid_post in float32, [n_layers, n, d_model].
        source: how they were measured.
    """

    positive: Float[Tensor, "n_layers n_positive d_model"]
    negative: Float[Tensor, "n_layers n_negative d_model"]
    source: dict[str, str] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        model: SteeringModel,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        position: str = "mean",
        batch: int = 16,
        asked: Sequence[Prompt] = (),
    ) -> "Contrast":
        """One unsteered pass over all prompts.

        Args:
            positive, negative: texts or chats; a chat may end with an assistant's answer.
                Texts stay texts: only what is a chat goes through the model's template. The source
                says how many did (`template`), and has a digest of what each prompt asks (`asked`).
            position: "mean" of the answer's tokens (persona vectors, Chen et al. 2025), or of all
                tokens where there is no answer; "last" token; or "answer": the token at which
                the two prompts of a pair first differ, the letter in CAA's A/B questions. The
                first position is an attention sink and never counted.
            asked: what the prompts ask, if that is not all that they say: texts with an answer.

        Raises:
            RequestError: too few prompts, unequal pairs, or an unknown position.
        """
        if position not in POSITIONS:
            raise RequestError(f"unknown position {position!r}{nearest(position, POSITIONS)}")
        if not positive or not negative:
            raise RequestError("a contrast needs positive and negative prompts")
        named = {"positive": positive, "negative": negative}
        sides = [_encoded(model, prompts, side) for side, prompts in named.items()]
        if position == "answer":
            spans = _differing(*sides)
        else:
            spans = [
                [_span(one, position, f"{name} prompt {n}") for n, one in enumerate(side, start=1)]
                for name, side in zip(named, sides, strict=True)
            ]
        rows = [pair for side in zip(sides, spans, strict=True) for pair in zip(*side, strict=True)]
        means: list[Tensor] = []
        with progress("reading the prompts", len(rows)) as report:
            for start in range(0, len(rows), batch):
                some = rows[start : start + batch]
                means.append(_means(model, some))
                report(start + len(some))
        everything = torch.cat(means, dim=1)
        source = {
            "model": model.name,
            "revision": model.revision,
            "fingerprint": model.fingerprint,
            "position": position,
            "prompts": f"{len(positive)} positive, {len(negative)} negative",
            "template": template([*positive, *negative]),
            "asked": digests(asked or [*positive, *negative]),
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        return cls(everything[:, : len(positive)], everything[:, len(positive) :], source)

    def directions(self, method: str = "mean-difference", name: str = "contrast") -> DirectionSet:
        """A direction for every layer by one of `METHODS`.

        Raises:
            RequestError: an unknown method, or prompts that it cannot use.
        """
        if method not in METHODS:
            raise RequestError(f"unknown method {method!r}{nearest(method, METHODS)}")
        solve = METHODS[method]
        return DirectionSet(
            Direction.of(
                solve(self.positive[layer], self.negative[layer]),
                f"blocks.{layer}.hook_resid_post",
                name,
                {**self.source, "method": method},
            )
            for layer in range(len(self.positive))
        )

    def save(self, path: str | Path) -> Path:
        """Writes the activations and their source as a safetensors file, whole or not at all."""
        from safetensors.torch import save

        sides = {"positive": self.positive.contiguous(), "negative": self.negative.contiguous()}
        data = save(sides, {"format": FORMAT, "source": json.dumps(self.source)})
        with whole(Path(path)) as part:
            part.write_bytes(data)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Contrast":
        """Reads what `save` wrote, exactly.

        Raises:
            RequestError: there is no such file, or it is no contrast.
            RunError: the file is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise RequestError(f"no contrast file {path}")
        with tensor_file.opened(path) as file:
            about = file.metadata() or {}
            if about.get("format") == FORMAT:
                source = tensor_file.texts(tensor_file.parsed(about, "source"), "its source")
                sides = [tensor_file.floats(file, side, 3) for side in ("positive", "negative")]
                one, other = sides
                if one.shape[::2] != other.shape[::2]:
                    raise ValueError("its two sides have other layers or widths")
                if not (one.isfinite().all() and other.isfinite().all()):
                    raise ValueError("it holds numbers that are not finite")
                return cls(one, other, source)
        raise RequestError(f"{path} is a safetensors file but not a contrast ({FORMAT})")

    def shuffled(self, seed: int) -> "Contrast":
        """Control: the same activations with shuffled labels.

        Pairs stay pairs: half of them, drawn at random, change sides. Without pairs all labels
        are drawn anew.
        """
        draw = torch.Generator().manual_seed(seed)
        n, m = self.positive.shape[1], self.negative.shape[1]
        everything = torch.cat([self.positive, self.negative], dim=1)
        if n == m:
            swapped = torch.zeros(n, dtype=torch.bool)
            swapped[torch.randperm(n, generator=draw)[: n // 2]] = True
            first = torch.arange(n) + n * swapped
            order = torch.cat([first, (first + n) % (2 * n)])
        else:
            order = torch.randperm(n + m, generator=draw)
        source = {**self.source, "control": "shuffled labels", "seed": str(seed)}
        return Contrast(everything[:, order[:n]], everything[:, order[n:]], source)


def act_add(
    model: SteeringModel, positive: Prompt, negative: Prompt, name: str = "actadd"
) -> list[DirectionSet]:
    """ActAdd (Turner et al. 2023, arXiv 2308.10248): the difference of one pair of prompts.

    Returns one DirectionSet for each position from 1 on, named `name-p1`, `name-p2`, ...; each is
    meant to be added `on positions k-k` alone, at a coefficient that is a multiple of its norm.
    Position 0 is left out: behind a BOS its difference is zero, and without one it is the sink.

    Raises:
        RequestError: the two prompts are not of equal length in tokens; pad the shorter one with
            spaces or words.
    """
    pair = [model.encode(positive), model.encode(negative)]
    lengths = [len(one.ids) for one in pair]
    if lengths[0] != lengths[1] or lengths[0] < 2:
        raise RequestError(
            f"ActAdd needs two prompts of one length of at least 2 tokens, got {lengths[0]} and "
            f"{lengths[1]}; pad the shorter one"
        )
    layers = torch.stack([x[0] - x[1] for layer, x, _ in model.residuals(pair) if layer >= 0])
    source = {"model": model.name, "method": "actadd", "positive": repr(positive)}
    source |= {"negative": repr(negative), "fingerprint": model.fingerprint}
    made = [
        DirectionSet(
            Direction.of(
                layers[layer, position].float(),
                f"blocks.{layer}.hook_resid_post",
                f"{name}-p{position}",
                {**source, "position": str(position)},
            )
            for layer in range(model.n_layers)
        )
        for position in range(1, lengths[0])
        if layers[:, position].any(-1).all()  # equal tokens before the first difference
    ]
    if not made:
        raise RequestError("the two prompts of ActAdd have the same tokens: nothing differs")
    return made


def template(prompts: Sequence[Prompt]) -> str:
    """Whether prompts go through a chat template, in words."""
    chats = sum(not isinstance(one, str) for one in prompts)
    if 0 < chats < len(prompts):
        return f"chat template for {chats} of {len(prompts)} prompts, the others plain text"
    return "chat template" if chats else "plain text"


def _encoded(model: SteeringModel, prompts: Sequence[Prompt], side: str) -> list[Encoded]:
    found = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            found.append(model.encode(prompt))
        except RequestError as error:
            raise RequestError(f"{side} prompt {number}: {error}") from error
    return found


def _span(one: Encoded, position: str, name: str) -> tuple[int, int]:
    """The positions whose mean is taken, from and up to."""
    if len(one.ids) < 2:
        raise RequestError(f"{name} is one token long: only its attention sink could be read")
    if position == "last":
        return len(one.ids) - 1, len(one.ids)
    return max(1, one.answer or 1), len(one.ids)


def _differing(positive: list[Encoded], negative: list[Encoded]) -> list[list[tuple[int, int]]]:
    """For each pair the first position at which its two prompts differ, for both sides."""
    if len(positive) != len(negative):
        raise RequestError(
            f"position 'answer' needs prompts in pairs, got {len(positive)} positive and "
            f"{len(negative)} negative"
        )
    found = []
    for number, (one, other) in enumerate(zip(positive, negative, strict=True), start=1):
        shorter = min(len(one.ids), len(other.ids))
        at = next((i for i in range(shorter) if one.ids[i] != other.ids[i]), 0)
        if at == 0:
            raise RequestError(
                f"pair {number} does not share its beginning and differ later: position 'answer' "
                "is for one question with two answers"
            )
        found.append((at, at + 1))
    return [found, list(found)]


def _means(
    model: SteeringModel, rows: list[tuple[Encoded, tuple[int, int]]]
) -> Float[Tensor, "n_layers n d_model"]:
    """Mean activation of each row's span at every layer."""
    weights: Tensor | None = None
    layers = []
    for layer, x, real in model.residuals([one for one, _ in rows]):
        if weights is None:
            weights = torch.zeros(real.shape, dtype=torch.float32, device=x.device)
            for row, (_, (begin, end)) in enumerate(rows):
                weights[row, begin:end] = 1 / (end - begin)
        if layer >= 0:
            layers.append(torch.einsum("bp,bpd->bd", weights, x.float()).cpu())
    return torch.stack(layers)
