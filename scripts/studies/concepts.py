"""What studies over concepts share: the concepts, and what the model itself says about them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from interp_steer import Contrast, Direction, Engine, Row, Sampling, SteeringModel, chat
from interp_steer.stats import intervals

CONCEPTS = ["ocean", "music", "war", "doctor", "winter", "horse", "money", "science", "church",
            "garden", "bread", "king", "school", "rain", "fire", "mother", "car", "gold", "dream",
            "computer"]  # fmt: skip
ASKED = ["Tell me about {}.", "Write two sentences about {}.", "What is interesting about {}?",
         "Describe {} to a child.", "Why does {} matter?",
         "Write a short story about {}."]  # fmt: skip
TOLD = "Mention {} in every answer, whatever the question is about."


def own_answers(
    model: SteeringModel, concepts: Sequence[str], layer: int
) -> tuple[Float[torch.Tensor, "concept question d_model"], list[str]]:
    """Mean activations over the model's answers about every concept, and the answers."""
    chats = [chat(text.format(word)) for word in concepts for text in ASKED]
    rows = [Row(one, (), Sampling(max_new_tokens=32)) for one in chats]
    said = [result.text for result in Engine(model).generate(rows)]
    answered = [(*one, ("assistant", text)) for one, text in zip(chats, said, strict=True)]
    found = Contrast.measure(model, answered, answered[:1]).positive[layer]
    return found.view(len(concepts), len(ASKED), -1), said


def means(
    activations: Float[torch.Tensor, "concept question d_model"], layer: int
) -> list[Direction]:
    """Every concept's mean less that of the others."""
    of_concept = activations.mean(1)
    count = range(len(of_concept))
    others = [of_concept[[i for i in count if i != n]].mean(0) for n in count]
    point = f"blocks.{layer}.hook_resid_post"
    return [Direction.of(of_concept[n] - others[n], point) for n in count]


def told(values: np.ndarray, form: str = ".3f") -> str:
    """A mean with its interval over concepts."""
    one = intervals.mean(values)
    ends = f" [{one.low:{form}}, {one.high:{form}}]" if one.low is not None else ""
    return f"{one.estimate:{form}}{ends}"


def rank_correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Spearman's, with a percentile interval over 2,000 resamples."""
    there = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[there], y[there]
    values = [spearmanr(x[p], y[p]).statistic for p in _resamples(len(x)) if np.ptp(x[p])]
    low, high = np.nanquantile(values, [0.025, 0.975]) if values else (np.nan, np.nan)
    return f"{spearmanr(x, y).statistic:+.2f} [{low:+.2f}, {high:+.2f}]  n {len(x)}"


def auroc(score: np.ndarray, positive: np.ndarray) -> str:
    """How often a positive one has the higher score, with a percentile interval."""
    values = [
        roc_auc_score(positive[p], score[p])
        for p in _resamples(len(score))
        if 0 < positive[p].sum() < len(p)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{roc_auc_score(positive, score):.2f} [{low:.2f}, {high:.2f}]  n {len(score)}"


def _resamples(n: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, n, n) for _ in range(2000)]
