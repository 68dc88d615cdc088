"""Resampling of whole prompts: the studentised bootstrap, and draws of multivariate t."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float

from interp_steer.stats.interval import Cells

# The sample's variance counts as half a prompt in each resample's: without it t explodes where few
# prompts differ, and the bands of skewed values are wider than they need to be.
PRIOR = 0.5
RESAMPLES = 10_000


@lru_cache(maxsize=8)
def resamples(n: int, seed: int, count: int) -> Float[np.ndarray, "n resamples"]:
    """How often each of n prompts is in each resample; fewer resamples above 400 prompts."""
    count = min(count, max(2_000, 4_000_000 // n))
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), count)
    return np.ascontiguousarray(drawn.T, dtype=float)


@lru_cache(maxsize=8)
def multivariate(n: int, seed: int, count: int) -> Float[np.ndarray, "n draws"]:
    """Weights that turn standardised values of n prompts into draws of multivariate t / sqrt(n)."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, count)) / np.sqrt(n * draw.chisquare(n - 1, count))


def studentised(
    values: Cells, weights: Float[np.ndarray, "n resamples"]
) -> Float[np.ndarray, "cells resamples"]:
    """(Mean of each resample - mean) / standard deviation of the resample, for each cell."""
    n = len(values)
    apart, variance = values - values.mean(0), values.var(0, ddof=1)[:, None]
    shift = sums(apart, weights) / n
    own = (sums(apart**2, weights) / n - shift**2) * (n / (n - 1))
    # a resample of equal values has no variance of its own: the sample's stands in
    own = np.where(own > 1e-9 * variance, own, variance)
    return np.asarray(shift / np.sqrt(((n - 1) * own + PRIOR * variance) / (n - 1 + PRIOR)))


def sums(
    values: Cells, weights: Float[np.ndarray, "n resamples"]
) -> Float[np.ndarray, "cells resamples"]:
    # not @: on matrices this small its threads cost 10 times more than they save on a busy machine
    return np.asarray(np.einsum("nc,nr->cr", values, weights))
