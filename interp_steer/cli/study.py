"""`interp-steer study`: plan, run, table, merge; and `interp-steer report`."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from interp_steer.cli import common
from interp_steer.errors import RequestError
from interp_steer.util.console import progress, safe

app = common.group()

File = Annotated[Path, common.arg("YAML file of the study.", show_default=False)]
Folder = Annotated[Path, common.arg("Folder of the run.", show_default=False)]
Model = Annotated[
    str | None,
    common.opt(
        "Another model than the file's: 'starter', a folder, or the name of a model on the "
        "Hugging Face hub."
    ),
]
Dtype = Annotated[
    str | None, common.opt("Another dtype than the file's: float32, bfloat16 or float16.")
]


def _opened(
    file: Path,
    model: str | None,
    dtype: str | None,
    device: str | None,
    date: str | None,
    *,
    fetched: bool = True,
    computes: bool = True,
) -> Any:
    """(study, model, arguments that load the model again) of a file.

    The file is checked before the model loads.

    Args:
        fetched: whether the weights of a model on the hub are fetched.
        computes: whether a folder must hold weights.
    """
    with progress("starting", every=5):
        from interp_steer.model.loading import glance
        from interp_steer.study.file import StudyFile

    declared = StudyFile.read(file).dated(date)
    name = str(declared.model.get("model", "starter"))
    revision = declared.model.get("revision") if model in (None, name) else None
    model = model or name
    needed = computes if os.path.isdir(os.path.expanduser(model)) else fetched
    dtype = dtype or declared.model.get("dtype")
    declared.rehearse(glance(model, revision))
    loaded = common.load(model, dtype, device, revision, weights=needed)
    study = declared.study(loaded)
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
    device: common.Device = None,
    date: common.Date = None,
    timed: Annotated[
        bool,
        common.opt(
            "Run a few rows, to estimate the study's time. Without, the weights of a model on the "
            "hub are not fetched."
        ),
    ] = True,
    as_json: common.Json = False,
) -> None:
    """Show the rows, memory and time that a study needs, without running it."""
    study, loaded, _ = _opened(file, model, dtype, device, date, fetched=timed, computes=False)
    from interp_steer.study.plan import Plan

    needs = Plan.of(study, loaded, timed=timed, device=device)
    if as_json:
        common.print_json(vars(needs))
        return
    print(
        f"{len(study.settings)} settings; {len(study.choose)} prompts to choose on, "
        f"{len(study.prove)} to prove on; {len(study.seeds)} seeds"
    )
    common.table(
        ("stage", "rows", "chunks"),
        [(name, f"{rows:,}", f"{needs.chunks[name]:,}") for name, rows in needs.rows.items()],
    )
    print(f"memory  {needs.memory / 1e9:.2f} GB, of which {needs.weights / 1e9:.2f} GB are weights")
    if needs.seconds is not None:
        print(f"time    about {_minutes(needs.seconds)}")
    for note in needs.notes:
        print(f"note    {note}")


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@app.command()
def run(
    file: File,
    out: Annotated[
        Path | None,
        common.opt("Folder of the run; a run that is there goes on. By default in the cache."),
    ] = None,
    model: Model = None,
    dtype: Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
    threads: Annotated[
        int | None, common.opt("CPU threads; a run keeps those of its first start.")
    ] = None,
    ray: Annotated[bool, common.opt("Run in several processes, with Ray.", "--ray")] = False,
    address: Annotated[
        str | None, common.opt("Ray cluster to run on; default: this machine.")
    ] = None,
    workers: Annotated[int, common.opt("With --ray: how many processes.")] = 1,
    gpus_per_worker: Annotated[
        float | None, common.opt("With --ray: GPUs of each process; default 1 if there are.")
    ] = None,
    shard: Annotated[
        str | None, common.opt("Such as 2/8: this is the second of eight jobs that share the work.")
    ] = None,
    report: Annotated[bool, common.opt("Write report.html into the folder when done.")] = True,
    as_json: common.Json = False,
) -> None:
    """Run a study, or what is missing of it.

    The exit code is 1 if rows failed.
    """
    part = _shard(shard)
    common.writable_folder("--out", out)
    common.at_least_one(workers=workers, threads=threads)
    if not ray and (workers > 1 or address or gpus_per_worker is not None):
        raise RequestError("--workers, --gpus-per-worker and --address need --ray")
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
    findings = done.findings()
    if report:
        from interp_steer.report import report as page

        written = page.write(done)
    if as_json:
        common.print_json(
            {
                "folder": str(folder),
                "rows": len(findings.table),
                "verdict": vars(findings.verdict),
                "claims": json.loads(findings.claims.to_json(orient="records")),
            }
        )
        return
    print(safe(str(findings)))
    print(f"\n{len(findings.table)} rows in {folder}")
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
    folder: Folder, out: Annotated[Path, common.opt("The file to write: .parquet or .csv.")]
) -> None:
    """Write all rows of a run as one table."""
    from interp_steer.report.run import Run

    common.writable("--out", out, (".parquet", ".csv"), new_folders=True)

    done = Run(folder)
    done.save(out)
    print(f"{len(done.table())} rows in {out}")


@app.command()
def merge(
    folder: Folder,
    others: Annotated[
        list[Path], common.arg("Folders or files of the rows to add.", show_default=False)
    ],
) -> None:
    """Add the rows of other machines to a run; each row is kept once."""
    from interp_steer.report.run import ROWS
    from interp_steer.results.rows import merge as together
    from interp_steer.util.locking import running

    def files(path: Path) -> list[Path]:
        there = sorted(path.glob(ROWS)) if path.is_dir() else [path]
        if not there:
            raise RequestError(f"no rows in {path}")
        return there

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
    folder: Folder,
    out: Annotated[
        Path | None, common.opt("The file to write; by default report.html in the folder.")
    ] = None,
) -> None:
    """Write one HTML page about a study's run."""
    from interp_steer.report import report as page
    from interp_steer.report.run import Run

    print(page.write(Run(folder), out))
