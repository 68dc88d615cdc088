"""`interp-steer ablate`: which layers and parts matter, and where a run's steering acts."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interp_steer.cli.ablation_request import Request
from interp_steer.cli.common import Device, Dtype, Json, load
from interp_steer.errors import RunError
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_steer.model.model import SteeringModel

SHOWN = 40  # lines on a terminal; the file has all


def ablate(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run's folder, for --mediate and --propagate.", show_default=False),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text, JSON or CSV file.")] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            help="resid_pre, resid_post, block, attn_out, mlp_out, z, direction, feature; may be "
            "repeated."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="zero, mean, resample or directional; may be repeated."),
    ] = None,
    span: Annotated[
        str | None, typer.Option(help="layer (default), window, upward or downward.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Layers of a window; default 3.")] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 3,7,12-20; default all.")] = None,
    heads: Annotated[str | None, typer.Option(help="Of z, such as 0-3; default all.")] = None,
    direction: Annotated[
        str | None, typer.Option(help="A direction's name or file, for direction and feature.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(help="logit_difference, kl_last, kl_all, loss or words; may be repeated."),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(help="A concept's word, for words; may be repeated. Default the run's."),
    ] = None,
    answer: Annotated[
        int | None, typer.Option(help="Tokens of the answer that words reads; default 32.")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Of --patch: each (default), all, last, or numbers such as 0,3-5,-1."),
    ] = None,
    patch: Annotated[
        bool, typer.Option("--patch", help="Put clean activations into the corrupted prompts.")
    ] = False,
    mediate: Annotated[
        bool,
        typer.Option("--mediate", help="Restore each later part of a run's chosen steering."),
    ] = False,
    propagate: Annotated[
        bool,
        typer.Option("--propagate", help="How far a run's chosen steering moves later layers."),
    ] = False,
    first: Annotated[
        bool, typer.Option("--first", help="Ablate the first position, a sink, as well.")
    ] = False,
    text: Annotated[bool, typer.Option("--text", help="Plain text, no chat template.")] = False,
    batch: Annotated[int | None, typer.Option(help="Rows at once.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .csv or .parquet file for all rows.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="A .png or .svg file: layer profile; of --patch position x layer."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="'starter', a folder, or a hub id; default the run's.")
    ] = None,
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Take parts of the model out, layer by layer, and see what it costs; or patch, or trace.

    Every layer's variant resumes from the same clean pass. Scores are means over prompts with 95 %
    intervals, paired with the unchanged model; shares of an effect are ratios of such means.
    """
    request = Request.of(locals())
    if request.kind == "ablation":
        found = _ablated(request)
    elif request.kind == "--patch":
        found = _patched(request)
    else:
        found = _traced(request)
    _write(found, request)


@dataclass
class _Found:
    """What is printed, written and drawn."""

    table: "pd.DataFrame"
    summary: "pd.DataFrame"
    draw: "Callable[[], Figure]"
    title: str = ""
    notes: Sequence[str] = ()
    largest_first: bool = False

    def save(self, path: Path) -> None:
        from interp_steer.util.files import whole

        with whole(path) as part:
            if path.suffix == ".csv":
                self.table.to_csv(part, index=False)
            else:
                self.table.to_parquet(part, index=False)

    def picture(self, path: Path) -> None:
        from interp_steer.report import marks

        marks.save(self.draw(), path)


def _model(request: Request, name: str, dtype: str | None, revision: str | None) -> "SteeringModel":
    given = request.given
    return load(
        given.get("model", name), given.get("dtype", dtype), given.get("device"),
        None if "model" in given else revision or None,
    )  # fmt: skip


def _ablated(request: Request) -> _Found:
    from interp_steer.causal import ablate as ablation

    given = request.given
    model = _model(request, "starter", None, None)
    items = request.prompts.items(as_chat=model.is_chat and "text" not in given)
    some = {name: given[name] for name in ("span", "width", "first", "answer", "batch")
            if name in given}  # fmt: skip
    with progress("ablating", 1.0) as report:
        made = ablation.ablate(
            model, items, request.many("component", ablation.COMPONENTS_OF_A_BLOCK),
            request.many("method", ["zero"]), vector=request.vector, scores=given.get("score"),
            words=request.many("word"), layers=request.layers, heads=request.heads,
            report=report, **some,
        )  # fmt: skip
    summary = made.summary()

    def draw() -> "Figure":
        from interp_steer.report import plots

        return plots.profile(summary)

    return _Found(made.table, summary, draw)


def _patched(request: Request) -> _Found:
    from interp_steer.causal import patch as patching

    given = request.given
    model = _model(request, "starter", None, None)
    items = request.prompts.items(as_chat=model.is_chat and "text" not in given)
    with progress("patching", 1.0) as report:
        made = patching.patch(
            model, items, request.many("component", ["resid_pre"]), positions=request.positions,
            layers=request.layers, heads=request.heads, batch=given.get("batch"), report=report,
        )  # fmt: skip
    summary = made.summary()

    def draw() -> "Figure":
        from interp_steer.report import maps

        return maps.patching(summary, made.table)

    title = _effect(summary, made.table, "corrupt", "clean", "share of it brought back")
    return _Found(made.table, summary, draw, title, _doubts(made.warning), largest_first=True)


def _traced(request: Request) -> _Found:
    """The chosen steering of a run on the prompts that prove."""
    from interp_steer.report.chosen import check_model, setting_of
    from interp_steer.report.run import Run
    from interp_steer.study.file import StudyFile

    folder = Path(request.given["run"])
    run = Run(folder)
    setting = setting_of(run)
    read = StudyFile.read(folder / "study.yaml").without_metrics()
    of = {**run.manifest, **read.model}
    model = _model(request, str(of["model"]), of.get("dtype"), of.get("revision"))
    if not {"model", "dtype"} & set(request.given):
        check_model(run, model.name, model.fingerprint)
    from interp_steer.causal import trace as tracing
    from interp_steer.report import maps

    study = read.study(model).bound(model)
    cell = study.cell(setting, study.scale(model), "chosen")
    items = list(study.prove)
    if request.kind == "--propagate":
        with progress("tracing", len(items)) as report:
            batch = {"batch": request.given["batch"]} if "batch" in request.given else {}
            moved = tracing.propagation(model, items, cell.steer, report=report, **batch)
        summary = moved.summary("last_relative")
        risen = moved.risen[moved.risen["rank"] <= 3].groupby("layer")["token"].apply(" ".join)
        summary = summary.assign(rises=summary["layer"].map(risen))
        title = f"{cell}\nlast_relative: {maps.MOVED['last_relative']}"
        return _Found(moved.table, summary, lambda: maps.propagation(summary), title)
    words = request.many("word", study.concept)
    pairs = all(item.positive is not None and item.negative is not None for item in items)
    default = "logit_difference" if pairs else "words" if words else "kl_last"
    score = request.many("score", [default])[0]
    some = {name: request.given[name] for name in ("answer", "batch") if name in request.given}
    with progress("restoring each part", 1.0) as report:
        made = tracing.mediation(
            model, items, cell.steer, score, words=words, heads=request.heads,
            components=request.many("component", ["attn_out", "mlp_out"]), report=report, **some,
        )  # fmt: skip
    summary = made.summary()
    title = _effect(summary, made.table, "unsteered", "steered", "share of it that goes")
    return _Found(
        made.table, summary, lambda: maps.mediation(summary), f"{cell}\n{title}",
        _doubts(made.warning),
    )  # fmt: skip


def _doubts(warning: str | None) -> list[str]:
    return [f"warning: {warning}"] if warning else []


def _effect(
    summary: "pd.DataFrame", table: "pd.DataFrame", before: str, after: str, estimate: str
) -> str:
    """What the shares are of: the score, before and after, and the effect with its interval."""
    items = table.drop_duplicates("item")
    row = max(summary.to_dict("records"), key=lambda one: int(one["n"]))
    low, high = row["effect_low"], row["effect_high"]
    span = f" [{low:+.3g}, {high:+.3g}]" if low == low else ""
    return (
        f"{row['score']}: {before} {items[before].mean():.3f} -> "
        f"{after} {items[after].mean():.3f}, effect {row['effect']:+.3g}{span} on {row['n']} "
        f"prompts; estimate: {estimate}"
    )


def _write(found: _Found, request: Request) -> None:
    """Writes the rows, draws, and prints; whichever fails takes nothing from the others."""
    out, plot, summary = request.given.get("out"), request.given.get("plot"), found.summary
    failures: list[Exception] = []
    wrote: list[Path] = []
    for path, write in ((out, found.save), (plot, found.picture)):
        try:
            if path:
                write(path)
                wrote.append(path)
        except Exception as error:  # whatever it is, the numbers are there
            failures.append(error)
    notes = list(found.notes)
    if "as_json" in request.given:
        print(json.dumps(json.loads(summary.to_json(orient="records")), indent=1))
    else:
        _show(found, notes)
        for path in wrote:
            print(f"wrote {path}")
    for note in notes:
        print(safe(note), file=sys.stderr)
    if failures:
        lost = next(path for path in (out, plot) if path and path not in wrote)
        why = failures[0]
        raise RunError(f"the table is complete, but {lost} could not be made: {why}") from why


def _show(found: _Found, notes: list[str]) -> None:
    """The table without columns that say nothing, and why it has no intervals, if so."""
    if found.title:
        print(safe(found.title))
    shown, more = found.summary.head(SHOWN), len(found.summary) - SHOWN
    if more > 0 and found.largest_first:
        order = found.summary["estimate"].abs().sort_values(ascending=False, kind="stable").index
        shown = found.summary.loc[order].head(SHOWN)
    dull = [c for c in shown if shown[c].isna().all()]
    # what is the same in every line says nothing; the effect stands above
    dull += [c for c in ("missing", "interval") if c in shown and shown[c].nunique() == 1]
    dull += [c for c in ("effect", "effect_low", "effect_high") if c in shown]
    if "low" in dull and "interval" in dull:
        notes.append(f"no intervals: {shown['interval'].iloc[0]}")
    elif "low" in shown and shown["low"].notna().all():  # how each was formed is in --json
        dull.append("interval")
    shown = shown.drop(columns=dict.fromkeys(dull))
    print(safe(shown.to_string(index=False, float_format="{:.4g}".format)))
    if more > 0:
        print(f"... and {more} more; --out FILE.csv has every row, --json this table")
