"""How well layers tell the sides of a contrast apart, beside scikit-learn and NumPy."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from interp_steer.errors import RequestError
from interp_steer.steering.contrast import METHODS, Contrast
from interp_steer.steering.separation import auc, cohens_d, separation

RNG = np.random.default_rng(3)


def numbers(*shape: int) -> torch.Tensor:
    return torch.tensor(RNG.normal(size=shape), dtype=torch.float32)


def pooled(up: np.ndarray, down: np.ndarray) -> float:
    """Cohen's d from the sums of squares around each side's mean."""
    squares = ((up - up.mean()) ** 2).sum() + ((down - down.mean()) ** 2).sum()
    return (up.mean() - down.mean()) / np.sqrt(squares / (len(up) + len(down) - 2))


def test_auc_is_that_of_scikit_learn():
    up, down = (numbers(9) + 0.5).round(decimals=1), numbers(7).round(decimals=1)  # with ties
    truth = [1] * 9 + [0] * 7
    assert auc(up, down) == pytest.approx(roc_auc_score(truth, torch.cat([up, down]).numpy()))
    assert auc(torch.ones(2), torch.ones(3)) == 0.5


def test_d_is_in_pooled_standard_deviations():
    up, down = numbers(9) * 2 + 1, numbers(5)
    assert cohens_d(up, down) == pytest.approx(pooled(up.numpy(), down.numpy()), rel=1e-5)
    # by hand: means 3 and 1, both variances 2
    assert cohens_d(torch.tensor([2.0, 4.0]), torch.tensor([0.0, 2.0])) == pytest.approx(2**0.5)
    assert cohens_d(torch.ones(1), torch.zeros(5)) is None
    assert cohens_d(torch.ones(3), torch.zeros(3)) is None


@pytest.mark.parametrize(("method", "n"), [*((m, 10) for m in METHODS), ("mean-difference", 7)])
def test_each_half_is_judged_by_the_other(method, n):
    """Against NumPy, layer by layer, also with sides of different length."""
    contrast = Contrast(numbers(3, 10, 12) + 0.4, numbers(3, n, 12))
    found = separation(contrast, method)
    assert [one.layer for one in found] == [0, 1, 2]
    for layer, one in enumerate(found):
        up, down = contrast.positive[layer].numpy(), contrast.negative[layer].numpy()
        vectors = [up[s::2].mean(0) - down[s::2].mean(0) for s in (0, 1)]
        if method != "mean-difference":
            vectors = [
                METHODS[method](
                    contrast.positive[layer, s::2], contrast.negative[layer, s::2]
                ).numpy()
                for s in (0, 1)
            ]
        areas, gaps = [], []
        for vector, other in zip(vectors, (1, 0), strict=True):
            a, b = up[other::2] @ vector, down[other::2] @ vector
            areas.append(roc_auc_score([1] * len(a) + [0] * len(b), np.concatenate([a, b])))
            gaps.append(pooled(a, b))
        lengths = [np.linalg.norm(v) for v in vectors]
        assert one.halves == pytest.approx(vectors[0] @ vectors[1] / np.prod(lengths), abs=1e-5)
        if n == 10:  # in pairs
            gaps_of = up - down
            alike = []
            for i, gap in enumerate(gaps_of):
                rest = np.delete(gaps_of, i, 0).mean(0)
                alike.append(gap @ rest / np.linalg.norm(gap) / np.linalg.norm(rest))
            assert one.pairs == pytest.approx(np.mean(alike), abs=1e-5)
            right = [(gaps_of[o::2] @ v > 0).mean() for v, o in zip(vectors, (1, 0), strict=True)]
            assert one.right == pytest.approx(np.mean(right))
        else:
            assert one.pairs is one.right is None
        assert one.auc == pytest.approx(np.mean(areas)) and one.d == pytest.approx(
            np.mean(gaps), rel=1e-4
        )


def test_noise_is_not_called_separate_and_a_concept_is():
    """The second layer holds a concept and the first none, though a fit tells any 60 apart."""
    up, down = numbers(2, 30, 40), numbers(2, 30, 40)
    up[1, :, 0] += 6
    noise, concept = separation(Contrast(up, down))
    assert abs(noise.auc - 0.5) < 0.3 and abs(noise.d) < 1 and abs(noise.halves) < 0.6
    assert concept.auc > 0.95 and concept.d > 3 and concept.halves > 0.6


def test_too_few_prompts_tell_nothing():
    lone = separation(Contrast(numbers(1, 1, 4), numbers(1, 5, 4)))[0]
    assert lone.auc is lone.d is lone.halves is None
    few = separation(Contrast(numbers(1, 2, 4), numbers(1, 2, 4)))[0]
    assert few.d is None and few.auc is not None and few.halves is not None
    small = Contrast(numbers(1, 4, 4), numbers(1, 4, 4))
    assert separation(small, "principal-component")[0].auc is None  # needs three of each kind
    with pytest.raises(RequestError, match="nearest: mean-difference"):
        separation(small, "mean-diff")


def test_a_layer_where_nothing_differs_tells_nothing():
    same = numbers(1, 4, 6)
    assert separation(Contrast(same, same.clone()))[0].auc is None
