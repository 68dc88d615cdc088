"""`interp-steer study`: plan, run, table, merge; and `interp-steer report`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp_steer.cli.common import Date, Device, Json, load
from interp_steer.errors import RequestError
from interp_steer.util.console import safe

if TYPE_CHECKING:
    from interp_steer.study.study import Study

app = typer.Typer(
    help="Declared grids of steered rows, with controls, intervals and resume.",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(help="The study, a YAML file.", show_default=False)]
Model = Annotated[
    str | None, typer.Option(help="In place of the file's: 'starter', a folder, or a hub id.")
]
Dtype = Annotated[str | None, typer.Option(help="In place of the file's.")]


def _opened(
    file: Path, model: str | None, dtype: str | None, device: str | None, date: str | None
) -> Any:
    """(study, model, what loads the model again) of a file; typos are told before a model loads."""
    from interp_steer.study.file import StudyFile

    read = StudyFile.read(file).dated(date)
    name = str(read.model.get("model", "starter"))
    revision = read.model.get("revision") if model in (None, name) else None
    loaded = load(model or name, dtype or read.model.get("dtype"), device, revision)
    study = read.study(loaded)
    again = {
        "name": loaded.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": device,
        "date": loaded.date,
        "revision": loaded.revision or None,  # the commit itself: a branch may move meanwhile
    }
    return study, loaded, again


@app.command()
def plan(
    file: File,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    date: Date = None,
    timed: Annotated[bool, typer.Option(help="Time two short runs, for the expected time.")] = True,
    as_json: Json = False,
) -> None:
    """Rows, chunks, memory and expected time, before anything runs."""
    study, loaded, _ = _opened(file, model, dtype, device, date)
    from interp_steer.study.plan import Plan

    made = Plan.of(study, loaded, timed=timed)
    if as_json:
        print(json.dumps(vars(made), indent=1))
        return
    _show(study, made)


def _show(study: "Study", made: Any) -> None:
    print(f"{len(study.settings)} cells, {len(study.choose)} prompts choose, ", end="")
    print(f"{len(study.prove)} prove, {len(study.seeds)} seeds")
    print(f"{'stage':<10}  {'rows':>8}  {'chunks':>6}")
    for name, rows in made.rows.items():
        print(f"{name:<10}  {rows:>8,}  {made.chunks[name]:>6,}")
    print(f"memory  {made.memory / 1e9:.2f} GB, of which {made.weights / 1e9:.2f} GB are weights")
    if made.seconds is not None:
        print(f"time    about {_minutes(made.seconds)}")
    for note in made.notes:
        print(f"note    {note}")


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@app.command()
def run(
    file: File,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; goes on there. Default in the cache.")
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    date: Date = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; pinned by a run's first start.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run on Ray actors.")] = False,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default here.")] = None,
    workers: Annotated[int, typer.Option(help="Ray actors.")] = 1,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="GPUs of each actor; default 1 where there are any.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: only every n-th chunk, for a job array.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html when done.")] = True,
    as_json: Json = False,
) -> None:
    """Run a study, or what is missing of it; exit 1 if rows failed."""
    part = _shard(shard)
    if workers < 1:
        raise RequestError(f"--workers is {workers}, expected at least 1")
    if not ray and (workers > 1 or address or gpus_per_worker is not None):
        raise RequestError("--workers, --gpus-per-worker and --address need --ray")
    if threads is not None and threads < 1:
        raise RequestError(f"--threads is {threads}, expected at least 1")
    study, loaded, again = _opened(file, model, dtype, device, date)
    import torch

    from interp_steer.util.files import cache_dir

    if threads:
        torch.set_num_threads(threads)
    mapper = None
    if ray:
        from interp_steer.study.on_ray import gpus_each, on_ray

        here = torch.cuda.device_count() if address is None else None
        gpus = gpus_each(gpus_per_worker, workers, device, loaded.device.type, here)
        mapper = on_ray(again, workers=workers, gpus=gpus, address=address)
    folder = out or cache_dir("runs") / file.stem
    done = study.run(loaded, folder, mapper=mapper, shard=part, arguments=sys.argv)
    found = done.findings()
    if report:
        from interp_steer.report import report as page

        written = page.write(done)
    if as_json:
        told = {"folder": str(folder), "rows": len(found.table), "verdict": vars(found.verdict)}
        told["claims"] = json.loads(found.claims.to_json(orient="records"))
        print(json.dumps(told, indent=1))
        return
    print(safe(str(found)))
    print(f"\n{len(found.table)} rows in {folder}")
    if report:
        print(f"report {written}")


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise RequestError(f"--shard is {text!r}, expected i/n with i from 1 to n, such as 2/8")
    return int(i), int(n)


@app.command()
def table(
    folder: Annotated[Path, typer.Argument(help="Of a run.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A .parquet or .csv file.")],
) -> None:
    """Write a run's rows as one table."""
    from interp_steer.report.run import Run

    done = Run(folder)
    done.save(out)
    print(f"{len(done.table())} rows in {out}")


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Of the run to add to.", show_default=False)],
    others: Annotated[list[Path], typer.Argument(help="Folders or row files.", show_default=False)],
) -> None:
    """Add other machines' rows to a run; each row once."""
    from interp_steer.report.run import ROWS
    from interp_steer.results.rows import merge as together
    from interp_steer.util.locking import running

    def files(path: Path) -> list[Path]:
        found = sorted(path.glob(ROWS)) if path.is_dir() else [path]
        if not found:
            raise RequestError(f"no rows in {path}")
        return found

    if not folder.is_dir():
        raise RequestError(f"no rows in {folder}: it is no folder")
    files(folder)
    with running(folder):
        own = files(folder)
        added = [file for path in others for file in files(path)]
        merged = together([*own, *added], folder / "rows.jsonl")
        for file in own:  # shards whose rows are in the one file now
            if file.name != "rows.jsonl":
                file.unlink()
    print(f"{len(merged)} rows in {merged.path}")


def report(
    folder: Annotated[Path, typer.Argument(help="Of a run.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the folder.")] = None,
) -> None:
    """Write one self-contained HTML page about a run."""
    from interp_steer.report import report as page
    from interp_steer.report.run import Run

    print(page.write(Run(folder), out))
