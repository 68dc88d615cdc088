"""How well a contrast's layers tell its two sides apart, from the activations that it holds."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError, SteerWarning
from interp_steer.steering.contrast import METHODS, Contrast

Ups = Float[Tensor, " n_positive"]
Downs = Float[Tensor, " n_negative"]


@dataclass(frozen=True)
class Separation:
    """What helps to choose a layer; None where there are too few prompts to tell.

    Attributes:
        layer: which.
        auc: `auc` of held-out prompts, the mean over the two halves; 0.5 is chance.
        d: `cohens_d` of the same, in standard deviations.
        halves: cosine of the directions that the two halves give: how much of the direction is
            these prompts' own accident.
        pairs: of prompts in pairs, the mean cosine of a pair's difference with the mean of all
            others': whether they differ in one way (Braun et al. 2025, arXiv 2505.22637).
        right: share of held-out pairs whose positive side projects further.
    """

    layer: int
    auc: float | None = None
    d: float | None = None
    halves: float | None = None
    pairs: float | None = None
    right: float | None = None


def auc(positive: Ups, negative: Downs) -> float:
    """Share of (positive, negative) pairs in which the positive one is larger; a tie is half.

    The area under the ROC curve (Hanley and McNeil 1982).
    """
    gap = positive[:, None] - negative
    return float(((gap > 0).double() + (gap == 0).double() / 2).mean())


def cohens_d(positive: Ups, negative: Downs) -> float | None:
    """Difference of the means divided by the pooled standard deviation (Cohen 1988).

    d = (m1 - m2) / sqrt(((n1 - 1) s1^2 + (n2 - 1) s2^2) / (n1 + n2 - 2)). None where a side has
    fewer than two numbers, or nothing varies.
    """
    n, m = len(positive), len(negative)
    if min(n, m) < 2:
        return None
    one, other = positive.double(), negative.double()
    pooled = ((n - 1) * one.var() + (m - 1) * other.var()) / (n + m - 2)
    return float((one.mean() - other.mean()) / pooled.sqrt()) if pooled > 0 else None


def separation(contrast: Contrast, method: str = "mean-difference") -> list[Separation]:
    """How well each layer tells the sides apart, and how steady its direction is.

    The prompts of each side are parted into those of even and of odd number, so that pairs stay
    together. Each half gives a direction by `method`, and the other half's prompts are projected
    on it: none is judged by a direction that it helped to make, and nothing is measured anew.

    Raises:
        RequestError: an unknown method.
    """
    if method not in METHODS:
        contrast.directions(method)  # says which there are
    return [_of(layer, contrast, method) for layer in range(len(contrast.positive))]


def _of(layer: int, contrast: Contrast, method: str) -> Separation:
    sides = contrast.positive[layer], contrast.negative[layer]
    halves = [tuple(side[start::2] for side in sides) for start in (0, 1)]
    if min(len(side) for half in halves for side in half) < 1:
        return Separation(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteerWarning)  # told of the whole already
        try:
            found = [METHODS[method](up, down).double() for up, down in halves]
        except RequestError:  # a half is too small for the method
            return Separation(layer)
    if not all(one.norm() > 0 for one in found):
        return Separation(layer)
    along = [
        tuple(side.double() @ direction for side in half)
        for direction, half in zip(found, reversed(halves), strict=True)
    ]
    areas = [auc(up, down) for up, down in along]
    gaps = [gap for up, down in along if (gap := cohens_d(up, down)) is not None]
    paired = len(sides[0]) == len(sides[1])
    return Separation(
        layer,
        sum(areas) / 2,
        sum(gaps) / 2 if len(gaps) == 2 else None,
        float(torch.dot(found[0] / found[0].norm(), found[1] / found[1].norm())),
        _agreement(sides[0] - sides[1]) if paired else None,
        sum(float((up > down).double().mean()) for up, down in along) / 2 if paired else None,
    )


def _agreement(differences: Float[Tensor, "pair d_model"]) -> float:
    """Mean cosine of each difference with the mean of all others."""
    each = differences.double()
    others = (each.sum(0) - each) / (len(each) - 1)
    return float(torch.cosine_similarity(each, others, dim=-1).mean())
