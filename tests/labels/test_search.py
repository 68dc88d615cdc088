"""Search: what the query's signs mean, what is said beside the results, and how little it loads."""

import sqlite3

import pytest

from interp_steer.errors import RequestError, RunError
from interp_steer.labels import Store, import_files, naming, search, sync
from interp_steer.labels.label import Source
from interp_steer.labels.rows import Row

LABELS = [
    "references to the Golden Gate Bridge",
    "gate and golden retrievers",
    "bridges in San Francisco",
    "dogs and puppies",
    "expressions of jealousy",
    "cafés in Paris",
    "golden ratio",
]


@pytest.fixture(autouse=True)
def filled() -> None:
    with Store(write=True) as store:
        for layer in (3, 4):
            source = Source("m", f"{layer}-res")
            made = [Row("m", source.name, i, f"{layer}.{i}", text) for i, text in enumerate(LABELS)]
            store.commit(source, "a", "1", made)
            store.finish(source, complete=True)


def found(query: str, **more) -> list[int]:
    return [label.index for label in search(query, layers="3", **more)]


def test_words_phrases_prefixes_and_negation():
    assert set(found("golden gate")) == {0, 1}
    assert found('"golden gate"') == [0]
    assert set(found("gold*")) == {0, 1, 6}
    assert found("golden -gate") == [6]
    assert found('golden -"gate bridge" -ratio') == [1]
    assert set(found("bridge")) == {0, 2}  # the stem is what counts
    assert found("cafe") == [5] == found("CAFÉ")
    assert found("zzzz") == []


def test_any_word_where_no_label_has_all_and_spelling():
    notes: list[str] = []
    assert found("golden puppies", note=notes.append)[0] == 3
    assert notes == ["no label has all of these words; searched for any of them"]
    notes.clear()
    assert set(found("brigde", note=notes.append)) == {0, 2}
    assert found("jelousy") == [4]
    assert notes == ["no label has 'brigde'; searched for 'bridg'"]


def test_ranked_by_relevance_then_place_and_limited():
    labels = search("golden")
    assert len(labels) == 6 and [label.id for label in labels[:2]] == ["m/3-res/6", "m/4-res/6"]
    scores = [label.score for label in labels]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    assert len(search("golden", limit=2)) == 2
    assert labels[0].as_json() == {
        "id": "m/3-res/6", "label": "golden ratio", "layer": 3, "index": 6, "explainer": None,
        "score": scores[0],
    }  # fmt: skip


def test_a_word_of_the_label_counts_more_than_one_of_its_context():
    """Labels as those that ship: `fires on (promotes: tokens): context`."""
    texts = [
        "and, the (promotes: of): a walk in Lyon, and Lyon again",
        "Lyon, Nice, cities, towns, mayors, squares, markets (promotes: Metz): I went to the sea",
        "brackets (promotes: Lyon): a long sentence about nothing in particular, with many words",
        "the (promotes: of): the Lyon squares",
        "Lyon",
    ]
    with Store(write=True) as store:
        rows = [Row("m", "3-res", 100 + i, f"c{i}", text) for i, text in enumerate(texts)]
        store.commit(Source("m", "3-res"), "b", "1", rows)
    assert set(found("lyon")[:3]) == {101, 102, 104} and len(found("lyon")) == 5
    assert found("lyon", limit=3) == found("lyon")[:3]
    assert found("lyon square")[:1] == [101]  # `squares` is a form of the word
    scores = [label.score for label in search("lyon", layers="3")]
    assert scores == sorted(scores, reverse=True)


def test_the_paris_feature_that_ships_is_the_first_for_paris():
    import_files(["starter"])
    assert search("paris", ["starter"])[0].index == 2652


def test_the_order_without_contexts_is_bm25_alone():
    """SQLite's own rank of the same texts; parentheses and brackets make no context."""
    texts = ["golden (promotes) gate", "gate golden golden [gate]", "a golden gate, golden: gate"]
    with Store(write=True) as store:
        rows = [Row("m", "3-res", 100 + i, f"c{i}", text) for i, text in enumerate(texts)]
        store.commit(Source("m", "3-res"), "b", "1", rows)
        path = store.path
    with sqlite3.connect(path) as plain:
        ranked = plain.execute(
            "SELECT e.feature, -rank FROM fts JOIN explanation e ON e.id = fts.rowid "
            "JOIN source s ON s.id = e.source_id "
            "WHERE fts MATCH 'golden AND gate' AND s.name = '3-res' ORDER BY rank"
        ).fetchall()
    shown = [(label.index, label.score) for label in search("golden gate", layers="3")]
    assert shown == [(index, round(score, 6)) for index, score in ranked] and len(shown) == 5


def test_a_feature_comes_once_with_the_label_that_matches_best():
    with Store(write=True) as store:
        store.commit(Source("m", "3-res"), "b", "1", [Row("m", "3-res", 3, "x", "small dogs dogs")])
    assert found("dogs") == [3]


def test_sources_and_layers():
    assert {label.source for label in search("dogs", ["m/4-res"])} == {"4-res"}
    assert {label.layer for label in search("dogs", layers="3-4")} == {3, 4}
    with pytest.raises(RunError, match="labels sync m/5-res"):
        search("dogs", ["m/5-res"])
    with pytest.raises(RequestError, match="nearest: llama_scope_lxr_8x"):
        search("dogs", ["llama_scope_lxr8x"])
    with pytest.raises(RequestError, match="limit 0"):
        search("dogs", limit=0)


def test_says_which_layers_of_a_release_are_not_synced():
    release = "llama_scope_lxr_8x"
    with Store(write=True) as store:
        for layer in (12, 13, 20):
            source = next(s for s in naming.of_release(release) if s.layer == layer)
            store.commit(source, "a", "1", [Row(source.model, source.name, 1, "e", "a dog")])
            store.finish(source, complete=layer != 20)
    for sources in ((), (release,)):
        notes: list[str] = []
        search("dog", sources, note=notes.append)
        assert notes == [
            f"{release}: not known to be whole: layers 20",
            f"{release}: not synced: layers 0-11, 14-19, 21-31",
        ]


def test_the_labels_that_ship_are_known_to_be_whole():
    (found,) = import_files(["starter"])
    assert found.complete_at and found.labelled + found.unlabelled == 6144
    for sources in ((), ("starter",)):
        notes: list[str] = []
        assert search("paris", sources, note=notes.append)
        assert notes == []
    with pytest.raises(RequestError, match=r"run `interp-steer labels import starter`$"):
        sync("starter")
    assert search("paris", note=notes.append) and notes == []


def test_how_to_get_labels_is_said_of_each_source():
    with Store(write=True) as store:
        store.commit(Source("m", "3-res"), "a", "1", [Row("m", "3-res", 1, "e", "a dog")])
    for name, get in (
        ("starter", "`interp-steer labels import starter`"),
        ("llama_scope_lxr_8x", "`interp-steer labels sync llama_scope_lxr_8x`"),
    ):
        with pytest.raises(RunError, match=f"none of these labels here yet; run {get}"):
            search("dog", [name])
