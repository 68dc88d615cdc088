"""Ratings of answers: what a judge is asked, how its answer is read, and how three become one.

Each answer is rated 0, 1 or 2 for concept, instruction and fluency, one question each, as AxBench
does (Wu et al. 2025, arXiv 2501.17148). The score of an answer is the harmonic mean of the three, 0
if any is 0; means are taken over answers. What cannot be read is missing. It is never 0: trouble
with a judge would look like bad steering.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from interp_steer.errors import RequestError
from interp_steer.util.files import read_text

KINDS = ("concept", "instruction", "fluency")
SCALE = (0, 1, 2)
LONGEST = 4000  # characters of an answer that a judge sees
RUBRICS = Path(__file__).parents[1] / "data" / "rubrics"
_NEEDED = {"concept": ("{concept}", "{answer}"), "instruction": ("{question}", "{answer}"),
           "fluency": ("{answer}",)}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """An answer to be rated.

    Attributes:
        question: what the user asked.
        answer: the text.
        concept: what the answers should be about, in words.
    """

    question: str
    answer: str
    concept: str


@dataclass(frozen=True)
class Rubrics:
    """What a judge is told, by kind of rating: `{concept}`, `{question}` and `{answer}` are filled
    in.
    """

    texts: dict[str, str]

    @classmethod
    def read(cls, folder: str | Path = RUBRICS) -> "Rubrics":
        """Reads concept.txt, instruction.txt and fluency.txt of a folder.

        Raises:
            RequestError: a file is not there, or lacks a place that has to be filled in.
        """
        texts = {}
        for kind in KINDS:
            path = Path(folder) / f"{kind}.txt"
            if not path.is_file():
                raise RequestError(
                    f"no rubric {path}; a folder of rubrics has {', '.join(KINDS)}.txt"
                )
            texts[kind] = read_text(path)
            for place in _NEEDED[kind]:
                if place not in texts[kind]:
                    raise RequestError(f"{path} has no {place}, where the judge would read it")
        return cls(texts)

    def put(self, kind: str, one: Asked) -> str:
        """What the judge is told of an answer. The marks that fence it are taken out of it."""
        parts = {"question": one.question, "answer": one.answer, "concept": one.concept}
        fenced = {
            name: re.sub(r"<<<|>>>", "", text)[:LONGEST].strip() for name, text in parts.items()
        }
        # one pass: what an answer says in braces is not filled in
        return re.sub(r"\{(question|answer|concept)\}", lambda m: fenced[m[1]], self.texts[kind])


def harmonic(ratings: "tuple[float, float, float]") -> float:
    """Harmonic mean, 0 if any rating is 0: of whole ratings one of 0, 1, 1.2, 1.5, 2."""
    return 0.0 if min(ratings) <= 0 else 3 / sum(1 / one for one in ratings)


def parsed(said: str, scale: tuple[int, ...] = SCALE) -> int | None:
    """The rating in a judge's answer; None where it gives none, or several, or one off the scale.

    What a model thinks before `</think>` is left out. Then, in this order: a JSON object with
    `rating`, also fenced; `Rating: k` and its forms with brackets or stars, all alike; the whole
    answer, if it is one number. A number elsewhere is none: "450 degrees" is no 4.
    """
    text = said.rpartition("</think>")[2].strip()
    if text.startswith(("{", "```")):
        body = re.sub(r"^```\w*\s*|\s*```$", "", text)
        try:
            told = json.loads(body)
        except ValueError:
            told = None
        if isinstance(told, dict) and "rating" in told:
            value = told["rating"]
            whole = isinstance(value, (int, float)) and not isinstance(value, bool)
            return int(value) if whole and value in scale else None
    number = r"[\[*\s\"']*([-+]?\d+(?:\.\d+)?)[\]*\s\"']*"
    found = re.findall(rf"rating\W*?:{number}(?![\d/%])", text, re.IGNORECASE)
    if not found:
        alone = re.fullmatch(rf"{number}\.?", text)
        found = [alone[1]] if alone else []
    values = {float(one) for one in found}
    if len(values) != 1:
        return None
    value = values.pop()
    return int(value) if value in scale else None
