"""The label store: one SQLite file with a full-text index, written one export file at a time.

Every file of labels is one transaction, so a killed sync leaves whole files and nothing else, and
readers (the journal is a write-ahead log) never wait for a sync. One row is one explanation.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from interp_steer.errors import RunError
from interp_steer.labels.label import CONTEXT, Coverage, Feature, Label, Source, State, preference
from interp_steer.labels.rows import Row
from interp_steer.labels.schema import TOKENS, connect, told
from interp_steer.util.files import cache_dir, explained

# The stated rule (see `label.preference`); the object's key settles copies of one explanation.
_CHOOSE_BEST = """
UPDATE explanation SET best = (id = (
    SELECT e.id FROM explanation e
    JOIN explainer x ON x.id = e.explainer_id JOIN object o ON o.id = e.object_id
    WHERE e.source_id = explanation.source_id AND e.feature = explanation.feature
    ORDER BY x.rank, e.score IS NULL, e.score DESC, e.uid, e.text, o.key LIMIT 1))
WHERE source_id = ?1 AND feature IN (SELECT value FROM json_each(?2))"""

_LABEL = """
SELECT s.model, s.name, e.feature, e.text, x.name, x.type, e.score, f.density, f.max_activation,
    s.release, s.sae_id, e.uid, e.id
FROM explanation e JOIN source s ON s.id = e.source_id JOIN explainer x ON x.id = e.explainer_id
LEFT JOIN feature f ON f.source_id = e.source_id AND f.feature = e.feature """


def default_path() -> Path:
    """Where the store is unless another is named: `labels/labels.db` in the cache."""
    return cache_dir("labels") / "labels.db"


# A file that gave nothing may be one that came empty: earlier versions took it for whole, so that
# its ETag is not to be trusted.
_ETAG = """
CASE WHEN EXISTS (SELECT 1 FROM explanation WHERE object_id = object.id)
    OR id IN (SELECT object_id FROM feature WHERE source_id = ?1) THEN etag END"""


class Store:
    """An open store. Reading never creates or changes a file, but for a migration.

    Raises:
        RequestError: the file is not a label store, or was made by a newer version.
        RunError: there is no such file yet, or the disk or another process is in the way.
    """

    def __init__(self, path: str | Path | None = None, *, write: bool = False) -> None:
        self.path = Path(path).expanduser() if path else default_path()
        if not write and not self.path.is_file():
            raise RunError(
                f"{self.path}: no labels here yet; get some with `interp-steer labels import "
                "starter` or `interp-steer labels sync SOURCE`"
            )
        if write:
            with explained(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
        with told(self.path):
            self._db = connect(self.path, write=write)

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the last writer folds the write-ahead log into it."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with told(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    # -- writing ---------------------------------------------------------------------------------

    def add_source(self, source: Source) -> int:
        """The source's number here, given on first sight; records its SAE where known."""
        with told(self.path):
            self._db.execute(
                "INSERT INTO source (model, name, release, sae_id) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET release = coalesce(excluded.release, release), "
                "sae_id = coalesce(excluded.sae_id, sae_id)",
                (source.model, source.name, source.release, source.sae_id),
            )
        number = self._number(source)
        assert number is not None
        return number

    def commit(self, source: Source, key: str, etag: str | None, rows: Iterable[Row]) -> bool:
        """Stores one file's rows in place of what that file gave before: all of it, or nothing.

        Returns:
            False if another process has stored the same version of the file meanwhile.
        """
        kept: dict[tuple[int, str], Row] = {}
        seen: list[Row] = []
        for row in rows:  # one file may say one thing twice: the last wins
            if row.label:
                kept[row.index, row.uid or row.label] = row
            if not row.label or row.density is not None or row.max_activation is not None:
                seen.append(row)
        with self._transaction() as db:
            number = self.add_source(source)
            old = db.execute(
                f"SELECT id, {_ETAG} FROM object WHERE source_id = ?1 AND key = ?2", (number, key)
            ).fetchone()
            if old and etag and old[1] == etag:
                return False
            touched = {row.index for row in kept.values()}
            if old:
                touched |= self._drop(old[0])
            place = db.execute(
                "INSERT INTO object (source_id, key, etag, fetched_at) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET etag = excluded.etag, fetched_at = excluded.fetched_at "
                "RETURNING id",
                (number, key, etag, datetime.now(UTC).isoformat(timespec="seconds")),
            ).fetchone()[0]
            explainers = {(row.explainer, row.type) for row in kept.values()}
            by = {pair: self._explainer(*pair) for pair in explainers}
            db.executemany(
                "INSERT INTO explanation "
                "(source_id, feature, best, object_id, explainer_id, score, uid, text) "
                "VALUES (?, ?, 1, ?, ?, ?, ?, ?)",
                (
                    (number, r.index, place, by[r.explainer, r.type], r.score, r.uid, r.label)
                    for r in kept.values()
                ),
            )
            db.execute(
                "INSERT INTO fts (rowid, text) "
                "SELECT id, text FROM explanation WHERE object_id = ?",
                (place,),
            )
            db.executemany(
                "INSERT INTO feature (source_id, feature, object_id, density, max_activation) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET object_id = excluded.object_id, "
                "density = coalesce(excluded.density, density), "
                "max_activation = coalesce(excluded.max_activation, max_activation)",
                ((number, r.index, place, r.density, r.max_activation) for r in seen),
            )
            self._choose(number, touched)
        return True

    def forget(self, source: Source, keys: Iterable[str]) -> None:
        """Removes files that the server no longer lists, with their rows."""
        with self._transaction() as db:
            number = self.add_source(source)
            for key in keys:
                place = db.execute(
                    "SELECT id FROM object WHERE source_id = ? AND key = ?", (number, key)
                ).fetchone()
                if place:
                    self._choose(number, self._drop(place[0]))
                    db.execute("DELETE FROM object WHERE id = ?", place)

    def finish(self, source: Source, *, complete: bool) -> None:
        """Records whether every file that the server lists for the source is here."""
        now = datetime.now(UTC).isoformat(timespec="seconds") if complete else None
        with self._transaction() as db:
            number = self.add_source(source)
            db.execute("UPDATE source SET complete_at = ? WHERE id = ?", (now, number))

    def _drop(self, place: int) -> set[int]:
        """Removes a file's explanations; the features they were about."""
        features = self._db.execute(
            "SELECT DISTINCT feature FROM explanation WHERE object_id = ?", (place,)
        ).fetchall()
        # The index keeps no copy of the text: it must be told what to take out, before it is gone.
        self._db.execute(
            "INSERT INTO fts (fts, rowid, text) "
            "SELECT 'delete', id, text FROM explanation WHERE object_id = ?",
            (place,),
        )
        self._db.execute("DELETE FROM explanation WHERE object_id = ?", (place,))
        return {feature for (feature,) in features}

    def _choose(self, number: int, features: Iterable[int]) -> None:
        """Applies the rule to the features that have more than one explanation, or had."""
        several = self._db.execute(
            "SELECT feature FROM explanation WHERE source_id = ?1 "
            "AND feature IN (SELECT value FROM json_each(?2)) "
            "GROUP BY feature HAVING count(*) > 1 OR min(best) = 0",
            (number, json.dumps(sorted(features))),
        ).fetchall()
        if several:
            self._db.execute(_CHOOSE_BEST, (number, json.dumps([f for (f,) in several])))

    def _explainer(self, name: str | None, type_name: str | None) -> int:
        row = self._db.execute(
            "INSERT INTO explainer (name, type, rank) VALUES (?, ?, ?) "
            "ON CONFLICT DO UPDATE SET rank = excluded.rank RETURNING id",
            (name or "", type_name or "", preference(name, type_name)),
        ).fetchone()
        return int(row[0])

    # -- reading ---------------------------------------------------------------------------------

    def _number(self, source: Source) -> int | None:
        row = self._db.execute(
            "SELECT id FROM source WHERE model = ? AND name = ?", (source.model, source.name)
        ).fetchone()
        return int(row[0]) if row else None

    def sources(self) -> dict[Source, tuple[int, bool]]:
        """Every source that was ever written to: its number, and whether its export is whole."""
        with told(self.path):
            rows = self._db.execute(
                "SELECT model, name, release, sae_id, id, complete_at IS NOT NULL FROM source"
            )
            return {Source(*row[:4]): (row[4], bool(row[5])) for row in rows}

    def etags(self, source: Source) -> dict[str, str | None]:
        """The files that are here, with their ETags; None for one that gave nothing."""
        with told(self.path):
            rows = self._db.execute(
                f"SELECT key, {_ETAG} FROM object WHERE source_id = ?1", (self._number(source),)
            )
            return dict(rows.fetchall())

    def coverage(self, source: Source) -> Coverage:
        """What is here of a source."""
        with told(self.path):
            number = self._number(source)
            ask = self._db.execute
            if number is None:
                return Coverage(source, None)
            model, name, release, sae_id, complete_at = ask(
                "SELECT model, name, release, sae_id, complete_at FROM source WHERE id = ?",
                (number,),
            ).fetchone()
            labels, labelled, top = ask(
                "SELECT count(*), coalesce(sum(best), 0), max(feature) FROM explanation "
                "WHERE source_id = ?",
                (number,),
            ).fetchone()
            explainers = ask(
                "SELECT name, type FROM explainer WHERE id IN "
                "(SELECT explainer_id FROM explanation WHERE source_id = ?) ORDER BY name, type",
                (number,),
            ).fetchall()
            batches = ask("SELECT count(*) FROM object WHERE source_id = ?", (number,)).fetchone()
            seen, high = ask(
                "SELECT count(*), max(feature) FROM feature WHERE source_id = ?1 AND NOT EXISTS "
                "(SELECT 1 FROM explanation e WHERE e.source_id = ?1 "
                "AND e.feature = feature.feature)",
                (number,),
            ).fetchone()
        if complete_at:  # the export was read to its end: a gap below the top is a known gap
            seen = max(-1 if top is None else top, -1 if high is None else high) + 1 - labelled
        return Coverage(
            Source(model, name, release, sae_id),
            complete_at,
            batches[0],
            labels,
            labelled,
            seen,
            tuple(" ".join(filter(None, pair)) or "unknown" for pair in explainers),
        )

    def feature(self, source: Source, index: int) -> Feature:
        """Everything known of a feature, its labels by the rule, best first.

        Without a label, a feature counts as fetched if it was asked for by itself, or if the
        source's export is here to the end and has labels of features beyond it.
        """
        with told(self.path):
            number = self._number(source)
            here = (number, index)
            labels = self._labels(
                "WHERE e.source_id = ? AND e.feature = ? "
                "ORDER BY e.best DESC, x.rank, e.score IS NULL, e.score DESC, e.uid",
                here,
            )
            origins = self._db.execute(
                "SELECT key, etag, fetched_at FROM object WHERE id IN (SELECT object_id FROM "
                "explanation WHERE source_id = ?1 AND feature = ?2 UNION SELECT object_id FROM "
                "feature WHERE source_id = ?1 AND feature = ?2) ORDER BY key",
                here,
            ).fetchall()
            numbers = self._db.execute(
                "SELECT density, max_activation FROM feature WHERE source_id = ? AND feature = ?",
                here,
            ).fetchone()
            covered = self._db.execute(
                "SELECT 1 FROM source s WHERE id = ?1 AND complete_at IS NOT NULL AND ?2 < "
                "(SELECT max(feature) FROM explanation e WHERE e.source_id = s.id)",
                here,
            ).fetchone()
        state = State.LABELLED if labels else State.UNLABELLED
        if not (labels or numbers or covered):
            state = State.UNKNOWN
        known = next((s for s in self.sources() if str(s) == str(source)), source)
        # A copy of an explanation in two files is one label.
        unique = {label.uid or label.label: label for label in reversed(labels)}
        density, highest = numbers or (None, None)
        ordered = tuple(reversed(unique.values()))
        return Feature(known, index, state, ordered, density, highest, tuple(origins))

    def best(self, source: Source) -> dict[int, Label]:
        """The best label of every labelled feature of a source."""
        with told(self.path):
            found = self._labels("WHERE e.source_id = ? AND e.best", (self._number(source),))
            return {label.index: label for label in found}

    def match(
        self, query: str, numbers: Sequence[int] | None, limit: int
    ) -> list[tuple[Label, float]]:
        """The explanations that answer an FTS5 query, best first, of some sources or of all.

        By BM25, weighed by `label.in_label` where a context follows the label. Equal ranks come in
        the order of model, source and index: which file came first must not decide what is quoted.
        """
        chosen = "" if numbers is None else "AND e.source_id IN (SELECT value FROM json_each(?2))"
        found = f"""
            SELECT e.id, rank * CASE WHEN instr(e.text, '{CONTEXT}')
                THEN in_label(highlight(fts, 0, char(1), char(2))) ELSE 1.0 END AS weighed
            FROM fts JOIN explanation e ON e.id = fts.rowid
            JOIN source s ON s.id = e.source_id WHERE fts MATCH ?1 {chosen}
            ORDER BY weighed, s.model, s.name, e.feature, e.best DESC, e.uid LIMIT ?3"""
        with told(self.path):
            hits = self._db.execute(found, (query, json.dumps(numbers), limit)).fetchall()
            labels = self.by_rowid([rowid for rowid, _ in hits])
        return [(labels[rowid], -weighed) for rowid, weighed in hits]

    def by_rowid(self, rowids: Sequence[int]) -> dict[int, Label]:
        """The labels of given rows."""
        with told(self.path):
            rows = self._db.execute(
                _LABEL + "WHERE e.id IN (SELECT value FROM json_each(?))", (json.dumps(rowids),)
            ).fetchall()
        return {row[12]: _label(row) for row in rows}

    def _labels(self, where: str, values: Sequence[object]) -> list[Label]:
        return [_label(row) for row in self._db.execute(_LABEL + where, values)]

    def texts(self, number: int) -> list[tuple[int, str]]:
        """Every explanation of a source in a stable order, as (row, text)."""
        with told(self.path):
            return self._db.execute(
                "SELECT id, text FROM explanation WHERE source_id = ? ORDER BY feature, uid, text",
                (number,),
            ).fetchall()

    def stem(self, word: str) -> str:
        """A word as the index has it."""
        with told(self.path):
            self._db.execute(
                "CREATE VIRTUAL TABLE IF NOT EXISTS temp.stemmer "
                f"USING fts5 (text, tokenize = '{TOKENS}')"
            )
            self._db.execute(
                "CREATE VIRTUAL TABLE IF NOT EXISTS temp.stems "
                "USING fts5vocab ('temp', 'stemmer', 'row')"
            )
            self._db.execute("DELETE FROM temp.stemmer")
            self._db.execute("INSERT INTO temp.stemmer VALUES (?)", (word,))
            row = self._db.execute("SELECT term FROM temp.stems").fetchone()
            return str(row[0]) if row else word

    def stems(self, start: str, shortest: int, longest: int) -> dict[str, int]:
        """The index's words that begin with `start`, with the number of labels of each."""
        with told(self.path):
            self._db.execute(
                "CREATE VIRTUAL TABLE IF NOT EXISTS temp.vocabulary "
                "USING fts5vocab ('main', 'fts', 'row')"
            )
            found = self._db.execute(
                "SELECT term, doc FROM temp.vocabulary WHERE term >= ?1 "
                "AND term < ?1 || char(1114111) AND length(term) BETWEEN ?2 AND ?3",
                (start, shortest, longest),
            )
            return dict(found.fetchall())


def _label(row: Sequence[object]) -> Label:
    model, name, feature, text, explainer, kind, *rest = row
    return Label(model, name, feature, text, explainer or None, kind or None, *rest[:6])  # type: ignore[arg-type]
