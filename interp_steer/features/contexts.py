"""Where features fire: the top features of a text, the top contexts of features, and features that
tell two sets of texts apart, for SAEs that nobody has labelled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.features.fit import Tally
from interp_steer.features.sae import Sae
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Encoded, Prompt, is_chat
from interp_steer.util.console import Report

PLACES = 2**20  # more than any context holds


@dataclass(frozen=True)
class Active:
    """A feature in a text: its largest value there and where, and its mean over the content."""

    index: int
    activation: float
    position: int
    token: str
    mean: float


@dataclass(frozen=True)
class Context:
    """A place where a feature fires: the largest value in one text.

    Attributes:
        text: the number of the text.
        position: of the token, counted from 0.
        before, token, after: the text around it.
    """

    text: int
    position: int
    activation: float
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Found:
    """A feature that tells positive from negative texts.

    Attributes:
        index: of the feature.
        positive, negative: mean over texts of its mean activation.
        difference: positive - negative.
        auroc: probability that a positive text has the larger mean activation than a negative one,
            ties counted half.
        share: of positive texts in which it fires at all.
    """

    index: int
    positive: float
    negative: float
    difference: float
    auroc: float
    share: float


def top_features(sae: Sae, model: SteeringModel, prompt: Encoded, k: int = 20) -> list[Active]:
    """The features with the largest values on a prompt's content.

    The first position and the tokens of a chat's template do not count: they fire the same features
    in every prompt.

    Raises:
        RequestError: the prompt has one token, or no content.
    """
    (_, latents), *_ = sae.over(model, _readable([prompt]))
    content = torch.tensor(prompt.content[1:], device=latents.device)
    if not content.any():
        raise RequestError("the prompt has no content to read features from")
    latents = latents * content[:, None]
    peaks, at = latents.max(0)
    order = peaks.topk(min(k, len(peaks))).indices.tolist()
    return [
        Active(
            i,
            peaks[i].item(),
            int(at[i]) + 1,
            model.decode_token(prompt.ids[int(at[i]) + 1]),
            (latents[:, i].sum() / content.sum()).item(),
        )
        for i in order
        if peaks[i] > 0
    ]


def top_contexts(
    sae: Sae,
    model: SteeringModel,
    encoded: Sequence[Encoded],
    features: Sequence[int] | None = None,
    k: int = 10,
    width: int = 12,
    tally: Tally | None = None,
    report: Report | None = None,
) -> dict[int, list[Context]]:
    """The texts in which features fire most, one place a text, best first.

    Args:
        features: which; None for all.
        width: tokens shown on either side.
        tally: counts all features' latents on the way.

    Raises:
        RequestError: a feature that the SAE does not have.
    """
    chosen = list(range(sae.d_sae)) if features is None else [sae.index(i) for i in features]
    index = torch.tensor(chosen)
    encoded = _readable(encoded)
    best = torch.zeros(k, len(chosen), dtype=torch.float32)
    places = torch.full((k, len(chosen)), -1)  # text * PLACES + position
    for number, (_, latents) in enumerate(sae.over(model, encoded)):
        if tally:
            tally.count(latents)
        mine = latents if features is None else latents[:, index.to(latents.device)]
        peaks, at = (part.cpu() for part in mine.max(0))
        better = (peaks > best[-1]).nonzero()[:, 0]
        if len(better):
            values = torch.cat([best[:, better], peaks[None, better]])
            known = torch.cat([places[:, better], (number * PLACES + at + 1)[None, better]])
            values, order = values.sort(dim=0, descending=True, stable=True)
            best[:, better] = values[:k]
            places[:, better] = known.gather(0, order)[:k]
        if report:
            report(number + 1)
    return {
        i: [
            _context(model, encoded, int(place), value, width)
            for place, value in zip(
                places[:, column].tolist(), best[:, column].tolist(), strict=True
            )
            if value > 0
        ]
        for column, i in enumerate(chosen)
    }


def _context(
    model: SteeringModel, encoded: Sequence[Encoded], place: int, value: float, width: int
) -> Context:
    text, position = divmod(place, PLACES)
    ids = encoded[text].ids
    return Context(
        text,
        position,
        value,
        model.decode(ids[max(0, position - width) : position], "" if position > width else None),
        model.decode_token(ids[position]),
        model.decode(ids[position + 1 : position + 1 + width], ""),
    )


def find(
    sae: Sae,
    model: SteeringModel,
    positive: Sequence[Encoded],
    negative: Sequence[Encoded],
    k: int = 20,
    by: str = "auroc",
    report: Report | None = None,
) -> list[Found]:
    """Features that fire more in positive than in negative texts, best first.

    A text counts once, with its mean activation over positions, so that long texts weigh no more.

    Args:
        by: "auroc" (ties settled by the difference) or "difference".

    Raises:
        RequestError: a side without texts, or an unknown order.
    """
    if by not in ("auroc", "difference"):
        raise RequestError(f"features are ordered by auroc or difference, not by {by!r}")
    sides = [_readable(positive), _readable(negative)]
    everything = [*sides[0], *sides[1]]
    means = torch.empty(len(everything), sae.d_sae, dtype=torch.float32)
    for number, (_, latents) in enumerate(sae.over(model, everything)):
        means[number] = latents.mean(0).cpu()
        if report:
            report(number + 1)
    up, down = means[: len(sides[0])], means[len(sides[0]) :]
    difference = up.mean(0) - down.mean(0)
    area = auroc(up, down)
    order = difference.argsort(descending=True, stable=True)
    if by == "auroc":
        order = order[area[order].argsort(descending=True, stable=True)]
    return [
        Found(
            i,
            up[:, i].mean().item(),
            down[:, i].mean().item(),
            difference[i].item(),
            area[i].item(),
            (up[:, i] > 0).float().mean().item(),
        )
        for i in order[:k].tolist()
        if difference[i] > 0
    ]


def auroc(
    positive: Float[Tensor, "n d_sae"], negative: Float[Tensor, "m d_sae"]
) -> Float[Tensor, " d_sae"]:
    """P(positive > negative) + P(equal) / 2 for every column, over all pairs (Mann-Whitney U)."""
    from scipy.stats import mannwhitneyu

    # without ties the exact p would be computed, which nobody asks for
    wins = mannwhitneyu(positive.double(), negative.double(), method="asymptotic").statistic
    return torch.from_numpy(wins / len(positive) / len(negative)).float()


def windows(model: SteeringModel, prompts: Sequence[Prompt], length: int) -> list[Encoded]:
    """Prompts as tokens, each in pieces of at most `length`; pieces of one token are left out.

    Raises:
        RequestError: nothing is left.
    """
    pieces = []
    for prompt in prompts:
        if is_chat(prompt):
            ids, content = (one := model.encode(prompt)).ids, one.content
        else:  # a text may be longer than the model's context
            ids = model.token_ids(str(prompt))
            content = (True,) * len(ids)
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) > 1:
                pieces.append(Encoded(piece, content[start : start + length]))
    return _readable(pieces)


def _readable(encoded: Sequence[Encoded]) -> list[Encoded]:
    if not encoded or any(len(one.ids) < 2 for one in encoded):
        raise RequestError("features are read from texts of two tokens or more")
    return list(encoded)
