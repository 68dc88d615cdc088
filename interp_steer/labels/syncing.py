"""`sync` and `import_files` bring labels into the store, file by file; `pack` takes them away."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from interp_steer.errors import RequestError, RunError, SteerError
from interp_steer.labels import naming
from interp_steer.labels.client import Client
from interp_steer.labels.exports import Batch, Export
from interp_steer.labels.http import Clock, NotFound
from interp_steer.labels.label import Coverage, Feature, Source, parse_id
from interp_steer.labels.registry import STARTER, STARTER_LABELS
from interp_steer.labels.rows import Row, read_lines
from interp_steer.labels.schema import is_store, told
from interp_steer.labels.store import Store
from interp_steer.util.console import progress
from interp_steer.util.files import explained, whole
from interp_steer.util.packed import PIECE


def sync(
    *names: str,
    layers: str | None = None,
    numbers: bool = False,
    store: str | Path | None = None,
    client: Client | None = None,
) -> list[Coverage]:
    """Brings the labels of sources into the store and keeps what arrived, whatever happens.

    A file whose ETag is here already is not fetched again, so a sync that was stopped, or killed,
    goes on where it was; files that the server no longer lists are removed.

    Args:
        names: SAELens releases (`llama_scope_lxr_8x`), `release/sae_id`, or Neuronpedia sources
            (`llama3.1-8b/15-llamascope-res-32k`).
        layers: which layers of them, like `3,7,12-20`; all if None.
        numbers: also fetch each feature's density and maximum activation (much larger files).

    Returns:
        What the store now holds of each source; `missing` says what could not be fetched and why.

    Raises:
        RequestError: a name or a layer is unknown, here or to the server.
        RunError: the store cannot be written.
    """
    if not names:
        raise RequestError("name at least one source to sync")
    sources = naming.chosen(names, layers)
    if ours := [str(source) for source in sources if source.release == STARTER]:
        raise RequestError(
            f"{ours[0]} is not on Neuronpedia: its labels ship with this package, run "
            f"{naming.getting(STARTER)}"
        )
    client = client or Client()
    clock = Clock(client.patience)
    missing: dict[Source, list[str]] = {source: [] for source in sources}
    listed = _list(client, sources, numbers, clock, missing)
    with Store(store, write=True) as to:
        todo: list[tuple[Export, str | None]] = []
        for source, files in listed.items():
            to.add_source(source)
            have = to.etags(source)
            todo += [(f, have.get(f.key)) for f in files if not f.etag or have.get(f.key) != f.etag]
        for file, problem in _fetch(client, to, todo, clock):
            missing[file.source].append(f"{file.key}: {problem}")
        for source, files in listed.items():
            # A list of nothing is more likely a fault than a source whose labels were withdrawn.
            kept = [key for key in to.etags(source) if key.startswith("explanations/")]
            if not files and kept:
                missing[source].append(f"the bucket lists no files, and {len(kept)} are here")
            if files and not missing[source]:
                kinds = {file.key.partition("/")[0] for file in files}
                gone = set(to.etags(source)) - {file.key for file in files}
                to.forget(source, (key for key in gone if key.partition("/")[0] in kinds))
            to.finish(source, complete=bool(files) and not missing[source])
        return [
            replace(to.coverage(source), missing=tuple(sorted(missing[source])))
            for source in sources
        ]


def _list(
    client: Client,
    sources: Sequence[Source],
    numbers: bool,
    clock: Clock,
    missing: dict[Source, list[str]],
) -> dict[Source, list[Export]]:
    """The files of each source; a source that the server does not have is the caller's mistake."""

    def ask(source: Source) -> list[Export]:
        files = client.exports(source, clock=clock)
        return files + (client.exports(source, "features", clock=clock) if numbers else [])

    listed: dict[Source, list[Export]] = {}
    pool = ThreadPoolExecutor(client.workers)
    try:
        for source, answer in [(source, pool.submit(ask, source)) for source in sources]:
            try:
                files = answer.result()
            except RunError as error:
                missing[source].append(str(error))
                continue
            if not files and not source.release:
                raise RequestError(f"Neuronpedia has no labels of {source}{naming.like(source)}")
            listed[source] = files  # of a known SAE: nobody has explained it yet
        return listed
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who interrupts does not wait for a server


def _fetch(
    client: Client, to: Store, todo: Sequence[tuple[Export, str | None]], clock: Clock
) -> Iterator[tuple[Export, str]]:
    """Downloads in parallel and commits each file as it comes; yields what could not be had.

    The files are fetched and read in other threads, and stored in this one. At most two per
    thread are under way, so that memory does not grow when the disk is slow.
    """
    total, done, labels = sum(file.size or 0 for file, _ in todo) / 1e6, 0, 0
    came: dict[tuple[Source, bytes], Export] = {}
    waiting = iter(todo)
    running: dict[Future[Batch | None], Export] = {}
    pool = ThreadPoolExecutor(client.workers)
    try:
        with progress("labels", total or None, unit="MB") as report:
            while True:
                for file, etag in waiting:
                    running[pool.submit(client.download, file, etag, clock=clock)] = file
                    if len(running) >= 2 * client.workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    file = running.pop(future)
                    done += file.size or 0
                    try:
                        batch = future.result()
                    except SteerError as error:
                        yield file, str(error).partition(f"{file.key}: ")[2] or str(error)
                        continue
                    if batch:
                        first = came.setdefault((file.source, batch.digest), file)
                        if batch.rows and first is not file:
                            yield file, f"the server sends the bytes of {first.key} for it"
                            continue
                        to.commit(file.source, file.key, batch.etag or file.etag, batch.rows)
                        clock.good()  # however long the disk took
                        labels += sum(bool(row.label) for row in batch.rows)
                    report(done / 1e6, f"{labels:,} labels")
    finally:
        clock.stop()  # whoever is waiting for another try
        pool.shutdown(wait=False, cancel_futures=True)


def fetch(
    *ids: str, store: str | Path | None = None, client: Client | None = None
) -> list[Feature]:
    """Asks Neuronpedia's API for single features and stores what it says of each.

    For labels that are newer than the export, and for each feature's density and maximum.

    Raises:
        RequestError: an id is not one, or Neuronpedia does not have the feature.
    """
    asked = [parse_id(text) for text in ids]
    asked = [(naming.resolve(str(source))[0], index) for source, index in asked]
    found = (client or Client()).features(asked)
    for source, index in asked:
        if (source, index) not in found:
            raise NotFound(f"Neuronpedia has no feature {source}/{index}")
    with Store(store, write=True) as to:
        for (source, index), feature in found.items():
            row = Row(
                source.model,
                source.name,
                index,
                density=feature.density,
                max_activation=feature.max_activation,
            )
            said = [
                replace(
                    row,
                    uid=each.uid,
                    label=each.label,
                    explainer=each.explainer,
                    type=each.type,
                    score=each.label_score,
                )
                for each in feature.labels
            ]
            to.commit(source, f"api/{index}", None, [row, *said])
        return [to.feature(source, index) for source, index in asked]


def import_files(paths: Iterable[str | Path], *, store: str | Path | None = None) -> list[Coverage]:
    """Brings files of labels that are on disk into the store: export files, gzipped or not.

    A file's rows say which source they belong to. A file of the same name replaces what that
    file gave before; each file is stored whole or not at all. "starter" stands for the files of the
    starter SAE, which ship with this package.

    Raises:
        RequestError: a file does not exist.
        RunError: a file cannot be read, is damaged, or has no rows.
    """
    touched: dict[str, Source] = {}
    listed: list[Path] = []
    ships = False
    for given in map(Path, paths):
        starters = str(given) == STARTER and not given.exists()
        listed += STARTER_LABELS if starters else [given]
        ships = ships or starters
    with Store(store, write=True) as to:
        for path in listed:
            if not path.is_file():
                raise RequestError(f"{path}: no such file")
            try:
                with explained(path), path.open("rb") as file:
                    rows = read_lines(iter(lambda: file.read(PIECE), b""))
            except ValueError as error:
                raise RunError(f"{path}: {error}") from error
            if not rows:
                raise RunError(f"{path}: it has no rows")
            # A folder of an export has batch-0 twice, as explanations and as features.
            kind = (
                f"{path.parent.name}/" if path.parent.name in ("explanations", "features") else ""
            )
            key = f"import/{kind}{path.name}"
            split: dict[Source, list[Row]] = {}
            for row in rows:
                split.setdefault(Source(row.model, row.source), []).append(row)
            for plain, part in split.items():
                source = naming.resolve(str(plain))[0]
                to.commit(source, key, None, part)
                touched[str(source)] = source
        if ships:  # all that there are of it
            to.finish(naming.of_release(STARTER)[0], complete=True)
        return [to.coverage(source) for source in touched.values()]


def pack(
    out: str | Path,
    sources: Sequence[Source] = (),
    *,
    store: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Writes a store, or some sources of it, as one file that a colleague opens with `--store`.

    Args:
        force: write over a file that is no label store too.

    Raises:
        RequestError: a source is not in the store, or the file is there and is no label store, or
            is the store itself.
        RunError: there is no store yet, or the file cannot be written or is in use.
    """
    out = Path(out).expanduser()
    with Store(store) as full:
        if out.exists():
            _check_replaceable(out, full.path, force)
        here = {str(source): number for source, (number, _) in full.sources().items()}
        for source in sources:
            if str(source) not in here:
                raise RequestError(f"{source} is not in {full.path}")
        away = [here[name] for name in here if sources and name not in map(str, sources)]
        with whole(out) as part, told(full.path):
            part.unlink()  # SQLite wants to make the file itself
            full._db.execute("VACUUM INTO ?", (str(part),))
            db = sqlite3.connect(part, isolation_level=None)
            try:
                for table in ("explanation", "feature", "object") if away else ():
                    db.execute(
                        f"DELETE FROM {table} WHERE source_id IN (SELECT value FROM json_each(?))",
                        (json.dumps(away),),
                    )
                if away:
                    db.execute(
                        "DELETE FROM source WHERE id IN (SELECT value FROM json_each(?))",
                        (json.dumps(away),),
                    )
                    db.execute("INSERT INTO fts (fts) VALUES ('rebuild')")
                    db.execute("VACUUM")
            finally:
                db.close()
    return out


def _check_replaceable(out: Path, store: Path, force: bool) -> None:
    """Whether a file that is there may be written over."""
    if out.samefile(store):
        raise RequestError(f"{out} is the store that is to be packed: name another file")
    if not force and not is_store(out):
        raise RequestError(
            f"{out} is there and is no label store: name another file, or pass --force (force=True)"
        )
    log = out.with_name(f"{out.name}-wal")
    if log.is_file() and log.stat().st_size:  # SQLite would take it for the new file's
        raise RunError(f"{out} is in use: {log.name} holds changes of it")
