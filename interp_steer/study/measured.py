"""What was run of a chunk, and what metrics read of it: each computed once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row, Score
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import Given
from interp_steer.util.console import Report

LETTERS = 3  # of a word that a token must have, to stand for it

Numbers = list[float | None]


def beginnings(model: SteeringModel, words: Iterable[str]) -> tuple[int, ...]:
    """Tokens with which words begin, in small and with a capital, after a space and without one.

    A token of less than three letters, as " E" of " Eiffel", begins too many other words: a form
    that begins so is left out, unless the token is the whole word.
    """
    found: dict[int, None] = {}
    for word in words:
        plain = word.strip()
        for form in dict.fromkeys((plain, plain.lower(), plain.capitalize())):
            for text in (form, f" {form}"):
                first = model.tokenizer.encode(text, add_special_tokens=False)[:1]
                said = model.decode_token(first[0]).strip() if first else ""
                if said and form.startswith(said) and (len(said) >= LETTERS or said == form):
                    found[first[0]] = None
    return tuple(sorted(found))


def rep3(ids: Sequence[int]) -> float | None:
    """Share of repeated 3-grams of token ids, 0 to 1: 1 - different / all.

    Above 0.2 an answer loops. Missing (None) below 3 tokens. Gibberish can score 0: read it beside
    `surprise`. From "The Eiffel Tower Llama" (Hugging Face, 2025).
    """
    share = distinct(ids, 3)
    return None if share is None else 1 - share


def distinct(ids: Sequence[int], n: int) -> float | None:
    """Different n-grams / all n-grams of token ids, 0 to 1; None where there is none.

    distinct-n, Li et al. 2016 (arXiv 1510.03055), of one answer.
    """
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def surprise(
    engine: Engine,
    results: Sequence[Result],
    report: Report | None = None,
    batch: int | None = None,
) -> Numbers:
    """Mean of -ln p(token) of each answer under the unsteered model, in nats.

    All answer tokens count; None where there are none. A loop has low surprise: read it beside
    `rep3`.
    """
    return surprise_after(engine, [result.row.prompt for result in results], results, report, batch)


def surprise_after(
    engine: Engine,
    prompts: Sequence[Given],
    results: Sequence[Result],
    report: Report | None = None,
    batch: int | None = None,
) -> Numbers:
    """The same after given prompts: a row that was asked in other words is read after the plain
    question, as all others are.
    """
    rows = [Row(prompt) for prompt in prompts]
    answers = [result.token_ids for result in results]
    scores = engine.score(rows, answers, report=report, batch=batch)
    return [mean_loss(score) for score in scores]


@dataclass
class Measured:
    """Rows that were run together, and what metrics ask of them: each computed once, on demand.

    Attributes:
        engine: of the model.
        rows, items: what was run; one kind of item.
        unsteered: token ids of the unsteered answer to the same prompt with the same seed.
        concept: words of the concept.
        batch: rows at once.
    """

    engine: Engine
    rows: Sequence[Row]
    items: Sequence[Item]
    unsteered: Sequence[Sequence[int]] = ()
    concept: Sequence[str] = ()
    batch: int | None = None
    report: Report | None = field(default=None, repr=False)
    _read: dict[tuple[str, ...], list[Score]] = field(default_factory=dict, repr=False)

    @cached_property
    def results(self) -> list[Result]:
        """The generated answers."""
        return self.engine.generate(self.rows, batch=self.batch, report=self.report)

    @cached_property
    def scores(self) -> list[Score]:
        """The rows on the unsteered answer, teacher-forced, with the KL from the unsteered row."""
        asked = [item.prompt for item in self.items]  # in other words, if a row is prompted
        pairs = dict.fromkeys(zip(asked, self._forced, strict=True))
        at = {pair: len(self.rows) + i for i, pair in enumerate(pairs)}
        scores = self.engine.score(
            [*self.rows, *(Row(prompt) for prompt, _ in pairs)],
            [*self._forced, *(ids for _, ids in pairs)],
            reference=[
                *(at[pair] for pair in zip(asked, self._forced, strict=True)),
                *(None for _ in pairs),
            ],
            among=self.words,
            batch=self.batch,
        )
        return scores[: len(self.rows)]

    @cached_property
    def words(self) -> tuple[int, ...]:
        """Tokens that begin a word of the concept."""
        return beginnings(self.engine.model, self.concept)

    @property
    def _forced(self) -> list[tuple[int, ...]]:
        return [tuple(ids) for ids in self.unsteered]

    def logprobs(self, texts: Sequence[str]) -> list[Score]:
        """Each row's reading of a text that follows its prompt directly."""
        asked = tuple(texts)
        if asked not in self._read:
            self._read[asked] = self.engine.score(self.rows, asked, batch=self.batch)
        return self._read[asked]


def mean_loss(score: Score) -> float | None:
    """Mean of -ln p of a continuation's tokens; None where there are none."""
    return -score.logprobs.mean().item() if len(score.logprobs) else None
