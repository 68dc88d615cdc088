"""The store's tables, how an older store becomes a newer one, and how the file is opened."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interp_steer.errors import RequestError, RunError
from interp_steer.labels.label import in_label
from interp_steer.util.files import explained

_MAGIC = 0x6C61626C  # SQLite's application_id of our stores: "labl"

# Words are cut to their stems and lose their accents, in labels and in queries.
TOKENS = "porter unicode61 remove_diacritics 2"

# Step N takes a store from version N to N + 1; version 0 is an empty file. Never edit a step that
# has been released: add one.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE source (
            id INTEGER PRIMARY KEY, model TEXT NOT NULL, name TEXT NOT NULL,
            release TEXT, sae_id TEXT,   -- SAELens's names, where known
            complete_at TEXT,            -- when every file that the server listed was here
            UNIQUE (model, name))""",
        """CREATE TABLE object (           -- a file that rows came from
            id INTEGER PRIMARY KEY, source_id INTEGER NOT NULL, key TEXT NOT NULL,
            etag TEXT, fetched_at TEXT NOT NULL, UNIQUE (source_id, key))""",
        """CREATE TABLE explainer (        -- '' for unknown: NULLs would not be unique
            id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL,
            rank INTEGER NOT NULL, UNIQUE (name, type))""",
        """CREATE TABLE explanation (
            id INTEGER PRIMARY KEY, source_id INTEGER NOT NULL, feature INTEGER NOT NULL,
            best INTEGER NOT NULL,       -- 1 for the label that the rule picks for the feature
            object_id INTEGER NOT NULL, explainer_id INTEGER NOT NULL,
            score REAL, uid TEXT NOT NULL, text TEXT NOT NULL)""",
        "CREATE INDEX by_feature ON explanation (source_id, feature, best, explainer_id)",
        "CREATE INDEX by_object ON explanation (object_id)",
        f"""CREATE VIRTUAL TABLE fts USING fts5 (
            text, content = 'explanation', content_rowid = 'id', tokenize = '{TOKENS}')""",
    ),
    (
        """CREATE TABLE feature (          -- features that were fetched, labelled or not
            source_id INTEGER NOT NULL, feature INTEGER NOT NULL, object_id INTEGER NOT NULL,
            density REAL, max_activation REAL, PRIMARY KEY (source_id, feature)) WITHOUT ROWID""",
    ),
)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns SQLite's refusals into one clear line."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            raise RequestError(f"{path} is not a label store") from error
        raise RunError(f"{path}: {error}") from error


def is_store(path: Path) -> bool:
    """Whether a file is one of our stores, by its header, without opening it as a database."""
    with explained(path), path.open("rb") as file:
        head = file.read(100)
    return head.startswith(b"SQLite format 3\0") and head[68:72] == _MAGIC.to_bytes(4, "big")


def connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """Opens a store at this version; a writer makes it if it is missing.

    Raises:
        RequestError: the file is not a label store, or was made by a newer version.
    """
    mode = "rwc" if write else "ro"
    if not write and not os.access(path.parent, os.W_OK):
        mode = "ro&immutable=1"  # a log cannot be shared here, so there is no writer either
    uri = path.absolute().as_uri() + f"?mode={mode}"
    # The sync commits from the thread that asked for it, so connections stay in one thread.
    db = sqlite3.connect(uri, uri=True, timeout=60, isolation_level=None)
    try:
        if _version(db, path, write) < len(MIGRATIONS):
            if write:
                _upgrade(db, path)
            else:  # opened to read: bring it to this version once, then go on reading
                connect(path, write=True).close()
        if write:
            _write_ahead(db)
        db.create_function("in_label", 1, in_label, deterministic=True)
    except BaseException:
        db.close()
        raise
    return db


def _version(db: sqlite3.Connection, path: Path, write: bool) -> int:
    def pragma(name: str) -> int:
        return int(db.execute(f"PRAGMA {name}").fetchone()[0])

    tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if pragma("application_id") != _MAGIC and (tables or not write):
        raise RequestError(f"{path} is not a label store")
    if (number := pragma("user_version")) > len(MIGRATIONS):
        raise RequestError(
            f"{path} is a label store of version {number}; this interp-steer reads up to version "
            f"{len(MIGRATIONS)}: update it"
        )
    return number


def _upgrade(db: sqlite3.Connection, path: Path) -> None:
    """Takes the missing steps in one transaction: all of them, or none."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in MIGRATIONS[_version(db, path, True) :]:  # another process may have been here
            for statement in step:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {_MAGIC}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    except BaseException:
        db.rollback()
        raise
    db.commit()


def _write_ahead(db: sqlite3.Connection) -> None:
    """Lets readers go on during a sync, and a commit cost no wait for the disk.

    Safe against a killed process; a power cut may cost the last files, never the store.
    """
    for attempt in range(50):  # SQLite does not wait for other writers before it changes journals
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            if attempt == 49:
                raise
            time.sleep(0.1)
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA cache_size = -65536")
