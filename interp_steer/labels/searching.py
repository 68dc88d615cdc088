"""`search`: which features are about something. `show` and `coverage`: what the store knows."""

import difflib
import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from interp_steer.errors import RequestError, RunError
from interp_steer.labels import naming, registry
from interp_steer.labels.label import Coverage, Feature, Label, Labels, Source, parse_id
from interp_steer.labels.store import Store

Mode = Literal["keyword", "semantic", "hybrid"]
Note = Callable[[str], None]
Item = TypeVar("Item", bound=Hashable)

_ITEM = re.compile(r'(?P<no>-?)(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"]+))(?P<more>\*?)')
# Left out where any word will do: they would bring up half the store. (Not where all must match.)
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by for from in is it of on or that the this to with "
        "about reference references related terms words",
    )
)
_RRF = 60  # reciprocal rank fusion's constant, from its paper (Cormack et al., 2009)


@dataclass(frozen=True, slots=True)
class Query:
    """What a user typed, as FTS5 text: each word quoted, so that no character is an operator."""

    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    words: tuple[str, ...]  # the wanted ones that are plain words, and may be misspelt

    @classmethod
    def parse(cls, text: str) -> "Query":
        """Reads words, "phrases", prefix* and -negation.

        Raises:
            RequestError: there is nothing to look for in it.
        """
        wanted, unwanted, words = [], [], []
        for item in _ITEM.finditer(text.replace("\0", " ")):
            bare = item["phrase"] if item["phrase"] is not None else item["word"]
            prefix = bool(item["more"]) or (item["word"] is not None and bare.endswith("*"))
            if not any(sign.isalnum() for sign in bare):
                continue  # FTS5 sees no word in it either
            quoted = _quote(bare) + ("*" if prefix else "")
            if item["no"]:
                unwanted.append(quoted)
            else:
                wanted.append(quoted)
                if item["word"] and not prefix and bare.isalpha():
                    words.append(bare)
        if not wanted:
            raise RequestError(f"query {text!r:.80}: expected at least one word to look for")
        return cls(tuple(wanted), tuple(unwanted), tuple(words))

    def all(self) -> str:
        """Labels with every word."""
        return self._without(" AND ".join(self.wanted))

    def any(self) -> str:
        """Labels with some word that says something."""
        telling = [w for w in self.wanted if w.strip('"*').lower() not in _COMMON]
        return self._without(" OR ".join(telling or self.wanted))

    def _without(self, found: str) -> str:
        return f"({found})" + "".join(f" NOT {word}" for word in self.unwanted)


def _quote(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def search(
    query: str,
    sources: Sequence[str] = (),
    *,
    layers: str | None = None,
    limit: int = 20,
    mode: Mode = "keyword",
    store: str | Path | None = None,
    note: Note = lambda _: None,
) -> Labels:
    """The features whose labels answer a query, best first, each once; nothing leaves the machine.

    Keyword search wants every word (`"a phrase"`, `prefix*`, `-not this`); where no label has them
    all it takes any, and a word that no label has is taken for a misspelling of the nearest that
    some have. It ranks by BM25; where a context follows a label, as in those that ship, a word
    that only the context has counts a tenth. Semantic search ranks by cosine similarity to the
    query's meaning (needs the extra `semantic`), and leaves contexts out. Hybrid fuses the two
    rankings; labels with only some of the words are left to the semantic one, which knows better
    which of the words matter.

    Args:
        sources: releases or `model/source`; everything in the store if empty.
        layers: which layers, like `3,7,12-20`.
        note: is told what the reader of the results should know: missing layers, changed words.

    Raises:
        RequestError: a source or layer is unknown, or the query has no word.
        RunError: nothing of the sources has been synced.
    """
    if limit < 1:
        raise RequestError(f"limit {limit}: expected 1 or more")
    with Store(store) as here:
        numbers = _scope(here, sources, layers, note)
        rankings: list[list[Label]] = []
        pool = limit if mode == "keyword" else max(limit, 100)
        if mode in ("keyword", "hybrid"):
            try:
                rankings.append(_keyword(here, query, numbers, pool, note, mode == "keyword"))
            except RequestError:
                if mode == "keyword":
                    raise  # by meaning, signs alone may still mean something
        if mode in ("semantic", "hybrid"):
            from interp_steer.labels.semantic import nearest

            rankings.append(nearest(here, query, numbers, pool))
    return Labels((rankings[0] if len(rankings) == 1 else _fuse(rankings))[:limit])


def show(feature: str, *, store: str | Path | None = None) -> Feature:
    """Everything the store knows of one feature: `model/source/index`, or its address.

    Raises:
        RequestError: that is not a feature's id.
    """
    source, index = parse_id(feature)
    with Store(store) as here:
        return here.feature(source, index)


def coverage(
    names: Sequence[str] = (), *, layers: str | None = None, store: str | Path | None = None
) -> list[Coverage]:
    """What the store holds of some sources, or of all that it has.

    Raises:
        RequestError: a source or layer is unknown.
    """
    with Store(store) as here:
        wanted = naming.chosen(list(names), layers) if names else _ordered(here.sources())
        return [here.coverage(source) for source in wanted]


def _scope(here: Store, names: Sequence[str], layers: str | None, note: Note) -> list[int] | None:
    """The numbers of the sources to search (None: all), after telling what is not synced."""
    known = {str(source): (source, *state) for source, state in here.sources().items()}
    if not known:
        raise RunError(
            f"{here.path}: no labels here yet; run `interp-steer labels import starter` for those "
            "that ship, or `interp-steer labels sync SOURCE`"
        )
    if names:
        wanted = naming.chosen(list(names), layers)
    else:
        wanted = [source for source, *_ in known.values()]
        if layers:
            chosen = naming.parse_layers(layers) or set()
            wanted = [source for source in wanted if source.layer in chosen]
            if gone := chosen - {source.layer for source in wanted}:
                note(f"not synced: layers {_ranges(gone)}")
    present = [source for source in wanted if str(source) in known]
    if not present:
        what = " ".join(names or ["SOURCE"]) + (f" --layers {layers}" if layers else "")
        raise RunError(f"none of these labels here yet; run {naming.getting(what)}")
    # Of a release that is here in part, the reader must know what was not looked at.
    siblings = {str(source): source for source in wanted}
    if not names and not layers:
        for release in {source.release for source in present if source.release}:
            if release in registry.sources():
                siblings |= {str(source): source for source in naming.of_release(release)}
    absent: dict[tuple[str, str], list[int]] = {}
    for text, source in siblings.items():
        if source.layer is not None and not (text in known and known[text][2]):
            state = "not known to be whole" if text in known else "not synced"
            absent.setdefault((source.release or source.model, state), []).append(source.layer)
    for (group, state), lost in sorted(absent.items()):
        note(f"{group}: {state}: layers {_ranges(lost)}")
    return [known[str(source)][1] for source in present] if names or layers else None


def _keyword(
    here: Store, query: str, numbers: list[int] | None, limit: int, note: Note, loose: bool
) -> list[Label]:
    """The keyword ranking; `loose`: where no label has every word, those that have any."""
    asked = Query.parse(query)
    # Several explanations of one feature may match; a few more rows leave enough features.
    rows = 2 * limit + 20
    hits = here.match(asked.all(), numbers, rows)
    if not hits:
        if changed := _respelt(here, asked):
            for word, instead in changed.items():
                note(f"no label has {word!r}; searched for {instead!r}")
            swap = {_quote(word): _quote(instead) for word, instead in changed.items()}
            asked = replace(asked, wanted=tuple(swap.get(w, w) for w in asked.wanted))
            hits = here.match(asked.all(), numbers, rows)
        if not hits and loose and len(asked.wanted) > 1:
            hits = here.match(asked.any(), numbers, rows)
            if hits:
                note("no label has all of these words; searched for any of them")
    found: dict[str, Label] = {}
    for label, score in hits:
        found.setdefault(label.id, replace(label, score=round(score, 6)))
    return list(found.values())[:limit]


def _respelt(here: Store, asked: Query) -> dict[str, str]:
    """For each word that no label has, the most similar one with the same first letter."""
    changed = {}
    for word in asked.words:
        if len(word) < 4 or here.match(_quote(word), None, 1):
            continue
        stem = here.stem(word)
        terms = here.stems(stem[0], len(stem) - 2, len(stem) + 2)
        if close := difflib.get_close_matches(stem, terms, n=3, cutoff=0.75):
            changed[word] = close[0]
    return changed


def fused(rankings: Iterable[Iterable[Item]]) -> dict[Item, float]:
    """Reciprocal rank fusion: ranks are comparable where scores are not.

    Cormack et al. 2009: an item's score is the sum over rankings of 1 / (60 + its rank).
    """
    scores: dict[Item, float] = {}
    for ranking in rankings:
        for place, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (_RRF + place)
    return scores


def _fuse(rankings: list[list[Label]]) -> list[Label]:
    scores = fused([label.id for label in ranking] for ranking in rankings)
    first: dict[str, Label] = {}
    for label in itertools.chain(*rankings):
        first.setdefault(label.id, label)
    order = sorted(first.values(), key=lambda label: (-scores[label.id], label.id))
    return [replace(label, score=round(scores[label.id], 6)) for label in order]


def _ordered(sources: dict[Source, tuple[int, bool]]) -> list[Source]:
    return sorted(sources, key=lambda s: (s.model, s.name.partition("-")[2], s.layer or 0))


def _ranges(numbers: Iterable[int]) -> str:
    """`1, 2, 3, 7` as `1-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
