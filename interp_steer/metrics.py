"""Functions from what was generated to a number a row."""

import re
from collections.abc import Sequence

from interp_steer.console import Report
from interp_steer.engine import Engine
from interp_steer.row import Result, Row


def rep3(ids: Sequence[int]) -> float | None:
    """Share of repeated 3-grams of token ids, 0 to 1: 1 - different / all.

    Above 0.2 an answer loops. Missing (None) below 3 tokens. Gibberish can score 0: read it beside
    `surprise`. From "The Eiffel Tower Llama" (Hugging Face, 2025).
    """
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def surprise(
    engine: Engine, results: Sequence[Result], report: Report | None = None
) -> list[float | None]:
    """Mean of -ln p(token) of each answer under the unsteered model, in nats.

    All answer tokens count; None where there are none. A loop has low surprise: read it beside
    `rep3`.
    """
    rows = [Row(result.row.prompt) for result in results]
    scores = engine.score(rows, [result.token_ids for result in results], report=report)
    return [-s.logprobs.mean().item() if len(s.logprobs) else None for s in scores]


def names(text: str, words: Sequence[str]) -> list[str]:
    """Which of the words occur in a text as whole words, whatever their case."""
    return [w for w in words if re.search(rf"\b{re.escape(w)}\b", text, re.IGNORECASE)]
