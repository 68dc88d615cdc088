"""Chances: how often an effect as large as the observed one comes about without one.

Every function raises RequestError without values, and for one that is NaN or infinite.
"""

import numpy as np
from jaxtyping import Bool, Float

from interp_steer.stats.interval import Values, check, check_paired

SIGN_FLIPS = 9_999


def exact_p(a: Bool[np.ndarray, " n"], b: Bool[np.ndarray, " n"]) -> float:
    """McNemar's exact test that two paired rates are equal, two-sided (McNemar 1947).

    Raises:
        RequestError: arms of unequal length.
    """
    from scipy.stats import binomtest

    check_paired(a, b)
    only_a, differ = int((a & ~b).sum()), int((a != b).sum())
    return float(binomtest(only_a, differ).pvalue) if differ else 1.0


def permutation_p(a: Values, b: Values, seed: int = 0) -> float:
    """Two-sided sign-flip test of the mean of a - b, paired over prompts (Fisher 1935).

    Exact where at most 12 differences are not zero (zeros have no sign); else over `SIGN_FLIPS`
    random flips, the observed one counted too.

    Raises:
        RequestError: arms of unequal length.
    """
    check_paired(a, b)
    check(a - b)
    apart = (a - b)[a != b]
    # sums in another order round differently
    k, observed = len(apart), float(abs(apart.sum()) - 1e-9 * np.abs(apart).sum())
    if k <= 12:
        signs = 1 - 2 * (np.arange(2**k)[:, None] >> np.arange(k) & 1)
        return float((np.abs(signs @ apart) >= observed).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (SIGN_FLIPS, k), dtype=np.int8)
    return p_null(observed, np.abs(signs @ apart))


def p_null(observed: float, nulls: Float[np.ndarray, " k"]) -> float:
    """How often a control reaches what was observed: (1 + #null >= observed) / (1 + #null).

    One-sided, larger is more (Davison and Hinkley 1997, 4.2).
    """
    check(nulls)
    check(np.array([observed]))
    # equal effects that were summed in another order differ in their last bits
    slack = 1e-9 * max(abs(observed), 1e-9)
    return float(1 + (nulls >= observed - slack).sum()) / (1 + len(nulls))
