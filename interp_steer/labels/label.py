"""A `Label`: one explanation of one feature, with its address; and the rule that picks the best."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from interp_steer.errors import RequestError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")  # covers every id of SAELens's registry
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # the server matches text: "010" is not feature 10

# The labels that ship are `fires on (promotes: tokens): a text where it fires most`. That text is
# one place of many: a word there says less of the feature than a word before it. Neuronpedia's
# labels have no context.
CONTEXT, CLOSED = " (promotes: ", "): "
IN_CONTEXT = 0.1  # what a word of the context counts; chosen before anything was measured

_MARKED = re.compile("\x01([^\x02]*)\x02")


class State(StrEnum):
    """What is known of a feature's label."""

    LABELLED = "labelled"
    UNLABELLED = "fetched without label"
    UNKNOWN = "never fetched"


@dataclass(frozen=True, slots=True)
class Source:
    """A set of features on Neuronpedia, `model/name`, and its SAE in SAELens where known."""

    model: str
    name: str
    release: str | None = None
    sae_id: str | None = None

    def __str__(self) -> str:
        return f"{self.model}/{self.name}"

    @property
    def layer(self) -> int | None:
        """The layer, by Neuronpedia's convention the number that a source's name starts with."""
        head = self.name.partition("-")[0]
        return int(head) if NUMBER.fullmatch(head) else None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Reads `model/source`.

        Raises:
            RequestError: not two names of letters, digits and `. _ + -` (so never a path).
        """
        model, slash, name = text.partition("/")
        if not (slash and NAME.fullmatch(model) and NAME.fullmatch(name)):
            raise RequestError(
                f"{text!r} is not a source: expected model/source, "
                "like llama3.1-8b/15-llamascope-res-32k"
            )
        return cls(model, name)


@dataclass(frozen=True, slots=True)
class Label:
    """One explanation of one feature. What a `Direction` needs to find its SAE is in here.

    `score` says how well the label answers a search (higher is better; the scale depends on the
    kind of search), `label_score` how well the explanation itself was scored on Neuronpedia.
    """

    model: str
    source: str
    index: int
    label: str
    explainer: str | None = None
    type: str | None = None
    label_score: float | None = None
    density: float | None = None  # the share of tokens on which the feature is active
    max_activation: float | None = None
    release: str | None = None  # SAELens's names of the autoencoder
    sae_id: str | None = None
    uid: str = ""  # Neuronpedia's id of the explanation
    score: float | None = None

    @property
    def id(self) -> str:
        """`model/source/index`, the feature's address on Neuronpedia."""
        return f"{self.model}/{self.source}/{self.index}"

    @property
    def layer(self) -> int | None:
        """The layer of the source."""
        return Source(self.model, self.source).layer

    def as_json(self) -> dict[str, Any]:
        """The shape that `labels search --json` prints."""
        return {
            "id": self.id,
            "label": self.label,
            "layer": self.layer,
            "index": self.index,
            "explainer": self.explainer,
            "score": self.score,
        }


class Labels(list[Label]):
    """Labels that a search found, best first; a table in a notebook."""

    def _repr_html_(self) -> str:
        from interp_steer.util.html import table

        return table([one.as_json() for one in self])


@dataclass(frozen=True, slots=True)
class Feature:
    """Everything known of one feature: its state, its labels (best first), where they came from."""

    source: Source
    index: int
    state: State
    labels: tuple[Label, ...] = ()
    density: float | None = None
    max_activation: float | None = None
    origins: tuple[tuple[str, str | None, str], ...] = ()  # (file, ETag, date fetched)

    @property
    def id(self) -> str:
        """`model/source/index`."""
        return f"{self.source}/{self.index}"


def parse_id(text: str) -> tuple[Source, int]:
    """Reads a feature's id, `model/source/index`, or its address on Neuronpedia.

    Raises:
        RequestError: it is neither.
    """
    path = re.sub(r"^https?://[^/]+/", "", text.strip()).strip("/")
    head, _, index = path.rpartition("/")
    if head.count("/") != 1 or not NUMBER.fullmatch(index):
        raise RequestError(
            f"{text!r} is not a feature: expected model/source/index, "
            "like llama3.1-8b/15-llamascope-res-32k/10"
        )
    return Source.parse(head), int(index)


def preference(explainer: str | None, type_name: str | None) -> int:
    """The first key of the rule that picks a feature's best label; smaller is better.

    The whole rule: (1) by type: `np_max-act-logits`, which Neuronpedia's own pages prefer, then
    its other `np_` types, then any other, then labels that do not say how they were made; (2) a
    scored label before an unscored one, higher scores first; (3) the smaller explanation id.
    """
    if type_name is None and explainer is None:
        return 3
    if type_name == "np_max-act-logits":
        return 0
    return 1 if (type_name or "").startswith("np_") else 2


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the store holds of one source."""

    source: Source
    complete_at: str | None  # None: never synced to the end
    batches: int = 0
    labels: int = 0  # explanations; a feature may have several
    labelled: int = 0  # features with a label
    unlabelled: int = 0  # features known to have none
    explainers: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # set by a sync: what could not be fetched, and why


# --- the context of a label -----------------------------------------------------------------------


def named(text: str) -> str:
    """A label without its context: what the feature fires on, and what it promotes."""
    head, opened, rest = text.partition(CONTEXT)
    promoted, closed, _ = rest.partition(CLOSED)
    return f"{head}{opened}{promoted})" if closed else text


def in_label(marked: str) -> float:
    """The weight of a hit: 1 with all its words in the label itself, `IN_CONTEXT` with none there.

    Args:
        marked: the whole text, with what was found between the signs 1 and 2.
    """
    found, label = (_MARKED.findall(part.casefold()) for part in (marked, named(marked)))
    words = list(dict.fromkeys(found))
    here = [word for word in words if any(_one_word(word, other) for other in label)]
    share = len(here) / len(words) if words else 1.0
    return share + (1.0 - share) * IN_CONTEXT


def _one_word(a: str, b: str) -> bool:
    """Whether two words that were found are forms of one, as `war` and `wars`, `city` and `cities`.

    The index compares stems, and marks what the text has.
    """
    short = min(len(a), len(b))
    same = max(short - 1, min(short, 3))
    return a[:same] == b[:same]
