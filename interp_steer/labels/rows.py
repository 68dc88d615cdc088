"""Rows of Neuronpedia's export files and API answers, read into one shape.

Export files come in three dialects (a database dump, a batch explainer's output, a converter's
output). They differ in what they leave out, not in the names of what they give, so one reader
serves them all, and the API's objects too.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from interp_steer.labels.label import NAME, NUMBER, Feature, Label, Source, State, preference
from interp_steer.util.packed import lines

_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_PAIRS = {'"': '"', "'": "'", "“": "”", "‘": "’", "`": "`"}
MOST = 2**19  # rows of one file; an export's have about 1,000


def clean(text: object) -> str:
    """A description as a label: one line, without control characters, wrapping quotes or margins.

    Exported descriptions carry all of these. HTML and text that runs right to left stay as they
    are: what is unsafe on a terminal is stripped where it is printed.
    """
    if not isinstance(text, str):
        return ""
    # A lone surrogate is legal in JSON and cannot be stored as UTF-8.
    line = text.encode("utf-8", "replace").decode("utf-8")
    line = " ".join(_CONTROL.sub(" ", line).split())
    while len(line) > 1 and _PAIRS.get(line[0]) == line[-1] and line[0] not in line[1:-1]:
        line = line[1:-1].strip()
    return line


@dataclass(frozen=True, slots=True)
class Row:
    """One line of an export file: a feature, perhaps with an explanation, perhaps with numbers."""

    model: str
    source: str
    index: int
    uid: str = ""
    label: str = ""
    explainer: str | None = None
    type: str | None = None
    score: float | None = None
    density: float | None = None
    max_activation: float | None = None


def read_row(data: object) -> Row:
    """Reads an explanation or feature row of any dialect; embeddings and texts' ids are dropped.

    Raises:
        ValueError: the row does not say which feature it is about.
    """
    if not isinstance(data, Mapping):
        raise ValueError("not an object")
    model, source, index = data.get("modelId"), data.get("layer"), data.get("index")
    if not (isinstance(model, str) and NAME.fullmatch(model)):
        raise ValueError(f"modelId is {model!r:.60}")
    if not (isinstance(source, str) and NAME.fullmatch(source)):
        raise ValueError(f"layer is {source!r:.60}")
    if isinstance(index, bool) or not NUMBER.fullmatch(str(index)):
        raise ValueError(f"index is {index!r:.60}")
    return Row(
        model,
        source,
        int(str(index)),
        clean(data.get("id"))[:64],
        clean(data.get("description")),
        _named(data.get("explanationModelName")),
        _named(data.get("typeName")),
        _score(data),
        _number(data.get("frac_nonzero")),
        _number(data.get("maxActApprox")),
    )


def read_feature(data: Mapping[str, Any]) -> list[Row]:
    """Reads an API feature: one row with its numbers, then one for each of its explanations.

    Raises:
        ValueError: it does not say which feature it is.
    """
    head = read_row({**data, "description": None, "id": None})
    place = {"modelId": head.model, "layer": head.source, "index": head.index}
    said = data.get("explanations")
    said = [each for each in said if isinstance(each, Mapping)] if isinstance(said, list) else []
    return [head, *(read_row({**each, **place}) for each in said)]


def _named(value: object) -> str | None:
    """A name, or None where the dialect writes "unknown" or nothing."""
    text = clean(value)[:200]
    return None if text in ("", "unknown") else text


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if value == value else None  # JSON as Python reads it may hold NaN


def _score(data: Mapping[str, Any]) -> float | None:
    """The explanation's own score: `scoreV2`, else the best of `scores`."""
    if (score := _number(data.get("scoreV2"))) is not None:
        return score
    scores = data.get("scores")
    rows = scores if isinstance(scores, list) else []
    values = [_number(row.get("value")) for row in rows if isinstance(row, Mapping)]
    return max((value for value in values if value is not None), default=None)


def read_lines(data: Iterable[bytes]) -> list[Row]:
    """Reads a whole export file from its pieces, gzipped or not: every line, or none.

    Raises:
        ValueError: the file is damaged; the message names the line.
    """
    rows: list[Row] = []
    for number, line in enumerate(lines(data), 1):
        if not line.strip():
            continue
        if len(rows) == MOST:
            raise ValueError(f"it has more than {MOST:,} rows: split it into several files")
        try:
            rows.append(read_row(json.loads(line)))
        except (ValueError, RecursionError) as error:
            what = str(error) if type(error) is ValueError else "not JSON"
            raise ValueError(f"line {number} is unreadable: {what}") from error
    return rows


def to_feature(source: Source, index: int, rows: list[Row]) -> Feature:
    """The rows of one feature as a `Feature`, its labels best first by the rule of `preference`."""
    numbers = next(((r.density, r.max_activation) for r in rows if not r.label), (None, None))
    said = sorted(
        (row for row in rows if row.label),
        key=lambda r: (preference(r.explainer, r.type), r.score is None, -(r.score or 0), r.uid),
    )
    labels = tuple(
        Label(
            source.model, source.name, index, row.label, row.explainer, row.type, row.score,
            *numbers, source.release, source.sae_id, row.uid,
        )
        for row in said
    )  # fmt: skip
    return Feature(source, index, State.LABELLED if labels else State.UNLABELLED, labels, *numbers)
