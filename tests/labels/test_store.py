"""The store: the rule, migration, packing, and hostile input."""

import json
import sqlite3
from pathlib import Path

import pytest

from interp_steer.errors import RequestError, RunError
from interp_steer.labels import Store, coverage, pack, search, show
from interp_steer.labels.label import Source, State
from interp_steer.labels.rows import Row, clean, read_lines
from interp_steer.labels.schema import _MAGIC, MIGRATIONS
from interp_steer.labels.store import default_path

SOURCE = Source("m", "3-res")


def row(index: int, text: str, uid: str = "", **more: object) -> Row:
    return Row(SOURCE.model, SOURCE.name, index, uid or f"e{index}", text, **more)  # type: ignore[arg-type]


def test_the_best_label_is_kept_as_files_come_and_go():
    good = {"explainer": "gpt", "type": "np_max-act-logits"}
    with Store(write=True) as store:
        store.commit(SOURCE, "a", "1", [row(1, "other way", "a", explainer="x", type="oai")])
        store.commit(SOURCE, "b", "1", [row(1, "unscored", "b", **good)])
        store.commit(SOURCE, "c", "1", [row(1, "scored", "z", score=0.2, **good)])

        def best() -> list[str]:
            ask = "SELECT text FROM explanation WHERE best = 1"
            return [text for (text,) in store._db.execute(ask)]

        assert best() == ["scored"] == [show("m/3-res/1").labels[0].label]
        store.commit(SOURCE, "c", "2", [])
        assert best() == ["unscored"]
        store.forget(SOURCE, ["b"])
        assert best() == ["other way"]
        assert coverage()[0].labels == 1


def test_the_same_version_of_a_file_is_stored_once():
    with Store(write=True) as store:
        assert store.commit(SOURCE, "a", '"1"', [row(1, "one")])
        assert not store.commit(SOURCE, "a", '"1"', [row(1, "two")])
        assert show("m/3-res/1").labels[0].label == "one"


def test_a_batch_is_stored_whole_or_not_at_all():
    bad = row(2, "two", score=None)
    object.__setattr__(bad, "label", object())  # SQLite cannot store it

    with Store(write=True) as store:
        store.commit(SOURCE, "a", "1", [row(1, "one")])
        with pytest.raises(RunError):
            store.commit(SOURCE, "a", "2", [row(1, "changed"), bad])
        assert show("m/3-res/1").labels[0].label == "one"
        assert store.etags(SOURCE) == {"a": "1"}


def test_an_older_store_is_migrated_when_it_is_opened(tmp_path):
    path = tmp_path / "old.db"
    db = sqlite3.connect(path)
    for statement in MIGRATIONS[0]:
        db.execute(statement)
    db.execute("PRAGMA user_version = 1")
    db.execute(f"PRAGMA application_id = {_MAGIC}")
    db.execute("INSERT INTO source VALUES (1, 'm', '3-res', NULL, NULL, NULL)")
    db.execute("INSERT INTO object VALUES (1, 1, 'a', '1', '2025')")
    db.execute("INSERT INTO explainer VALUES (1, '', '', 3)")
    db.execute("INSERT INTO explanation VALUES (1, 1, 7, 1, 1, 1, NULL, 'e', 'dogs')")
    db.execute("INSERT INTO fts (rowid, text) VALUES (1, 'dogs')")
    db.commit()
    db.close()
    assert [label.id for label in search("dog", store=path)] == ["m/3-res/7"]
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(RequestError, match="update it"):
        Store(path)


def test_what_is_not_a_store_is_refused_and_left_alone(tmp_path):
    with pytest.raises(RunError, match="labels sync"):
        Store(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()
    text = tmp_path / "text.db"
    text.write_text("hello, I am no database at all" * 100)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE t (x)")
    for path in (text, foreign):
        before = path.read_bytes()
        for write in (False, True):
            with pytest.raises(RequestError, match="not a label store"):
                Store(path, write=write)
        assert path.read_bytes() == before


def test_pack_writes_over_a_store_of_ours_alone(tmp_path):
    with Store(write=True) as store:
        store.commit(SOURCE, "a", None, [row(1, "one")])
    notes = tmp_path / "notes.txt"
    other = tmp_path / "other.db"
    sqlite3.connect(other).execute("CREATE TABLE t (x)").connection.close()
    for path in (notes, other):
        path.touch()
        before = path.read_bytes()
        with pytest.raises(RequestError, match=r"is there and is no label store: .*--force"):
            pack(path)
        assert path.read_bytes() == before
    assert pack(tmp_path / "pack.db") == pack(tmp_path / "pack.db")  # a pack of ours
    with Store(pack(notes, force=True)) as packed:
        assert packed.coverage(SOURCE).labels == 1
    with pytest.raises(RequestError, match="is the store that is to be packed"):
        pack(default_path(), force=True)
    with Store(notes, write=True) as busy:
        busy.commit(SOURCE, "b", None, [row(2, "two")])
        with pytest.raises(RunError, match=r"notes\.txt is in use: "):
            pack(notes)
    with Store(notes) as packed:
        assert packed.coverage(SOURCE).labels == 2


def test_a_packed_store_opens_elsewhere(tmp_path):
    with Store(write=True) as store:
        store.commit(SOURCE, "a", "1", [row(1, "one dog")])
        store.commit(Source("m", "4-res"), "a", "1", [Row("m", "4-res", 1, "f", "two dogs")])
        store.finish(SOURCE, complete=True)
    whole = pack(tmp_path / "all.db")
    some = pack(tmp_path / "some.db", [SOURCE])
    assert len(search("dogs", store=whole)) == 2
    assert [label.id for label in search("dogs", store=some)] == ["m/3-res/1"]
    assert [each.source.name for each in coverage(store=some)] == ["3-res"]
    assert coverage(store=some)[0].complete_at
    some.chmod(0o444)
    folder = tmp_path / "readonly"
    folder.mkdir()
    some.rename(folder / "some.db")
    folder.chmod(0o555)
    assert search("dogs", store=folder / "some.db")
    assert list(folder.iterdir()) == [folder / "some.db"]  # reading leaves nothing behind
    with pytest.raises(RequestError, match="is not in"):
        pack(tmp_path / "x.db", [Source("m", "5-res")])
    assert not (tmp_path / "x.db").exists()


HOSTILE = [
    "<script>alert(1)</script> & <b>bold</b>",
    "red \x1b[31malert\x1b[0m \x9b2J bell\x07",
    "nul\0inside",
    "\u202eevil\u202c עברית \u2066x\u2069",
    "long " * 20_000,
    "lone \ud800 surrogate",
    '" OR 1=1; DROP TABLE explanation; --',
    "[bold red]markup[/]",
]


def test_hostile_labels_are_stored_and_found(cache: Path):
    data = "\n".join(
        json.dumps({"modelId": "m", "layer": "3-res", "index": i, "description": text})
        for i, text in enumerate(HOSTILE)
    )
    with Store(write=True) as store:
        store.commit(SOURCE, "a", "1", read_lines([data.encode()]))
    assert coverage()[0].labels == len(HOSTILE)
    for query, index in (("alert bold", 0), ("inside", 2), ("עברית", 3), ("long", 4),
                         ("surrogate", 5), ("drop table", 6), ("markup", 7)):  # fmt: skip
        assert [label.index for label in search(query)] == [index], query
    assert len(show("m/3-res/4").labels[0].label) == 99_999
    assert {p.name.partition("-")[0] for p in cache.rglob("*") if p.is_file()} == {
        "labels.db",
        "sae",  # the registry of sae-lens
    }


@pytest.mark.parametrize(
    "query",
    ['"', '"""', "a AND", "NOT x", "NEAR(a b)", "text:a", "a*b", "(", ")", "^a", "{a}", "a+b",
     "-", "--", "-a b", "*", "a\0b", "'; --", "col : x", "a OR OR b", '"a" * "', "日本語", "é",
     "\x1b[31m", "x" * 10_000, "a " * 2_000, '-"', "\\", "%_", "\ud800 a"],
)  # fmt: skip
def test_hostile_queries_are_only_words(query):
    with Store(write=True) as store:
        store.commit(SOURCE, "a", "1", [row(1, "a b or not near text")])
    try:
        search(query)
    except RequestError as error:
        assert "at least one word" in str(error)


def test_labels_are_cleaned():
    assert clean(' \n"dogs and\n puppies"\u0000 ') == "dogs and puppies"
    assert clean("“quoted”") == "quoted"
    assert clean('"one" and "two"') == '"one" and "two"'
    assert clean('"') == '"' and clean("''") == "" and clean(None) == "" and clean(5) == ""


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"1", b"null", b'"x"', b"\xff\xfe", 
     b'{"modelId": "../x", "layer": "1", "index": 1}',
     b'{"modelId": "m", "layer": "a/b", "index": 1}', b'{"modelId": "m", "layer": "1"}',
     b'{"modelId": "m", "layer": "1", "index": true}',
     b'{"modelId": "m", "layer": "1", "index": -1}',
     b'{"modelId": "m", "layer": "1", "index": 1.0}',
     b'{"modelId": "m", "layer": "1", "index": 99999999999999999999}', b"[" * 100_000],
)  # fmt: skip
def test_an_unreadable_line_is_named(line):
    with pytest.raises(ValueError, match="line 2"):
        read_lines([b"\n", line])


def test_a_feature_that_was_never_fetched_is_not_without_label():
    with Store(write=True) as store:
        store.commit(SOURCE, "a", "1", [row(5, "five")])
        assert store.feature(SOURCE, 3).state is State.UNKNOWN
        store.finish(SOURCE, complete=True)
        assert store.feature(SOURCE, 3).state is State.UNLABELLED
