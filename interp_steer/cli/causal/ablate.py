"""`interp-steer ablate`: which layers and parts matter, and where a run's steering acts."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.cli.causal.request import Request
from interp_steer.errors import RunError
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_steer.causal.patch import Patching
    from interp_steer.model.model import SteeringModel

SHOWN = 40  # lines on a terminal; the file has all


def ablate(
    run: Annotated[
        Path | None,
        common.arg("Folder of a study's run, for --mediate and --propagate.", show_default=False),
    ] = None,
    prompts: Annotated[Path | None, common.opt("File of prompts: text, JSON or CSV.")] = None,
    component: Annotated[
        list[str] | None,
        common.opt(
            "The part: resid_pre, resid_post, block, attn_out, mlp_out, z (attention heads), "
            "direction or feature. May be repeated."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        common.opt("What takes its place: zero, mean, resample or directional. May be repeated."),
    ] = None,
    span: Annotated[
        str | None,
        common.opt(
            "Layers ablated together: layer (each alone, the default), window (neighbours), "
            "upward (all up to each) or downward (each and all after it)."
        ),
    ] = None,
    width: Annotated[
        int | None, common.opt("Layers in a window of --span window; default 3.")
    ] = None,
    layers: common.Layers = None,
    heads: Annotated[
        str | None, common.opt("Only these heads of component z, such as 0-3.")
    ] = None,
    direction: Annotated[
        str | None, common.opt("Name or file of a direction, for component direction or feature.")
    ] = None,
    score: Annotated[
        list[str] | None,
        common.opt(
            "What is measured: logit_difference, kl_last, kl_all, loss or words. May be repeated."
        ),
    ] = None,
    word: Annotated[
        list[str] | None,
        common.opt(
            "A word that score words looks for. May be repeated. Default: the run's concept."
        ),
    ] = None,
    answer: Annotated[
        int | None, common.opt("Tokens of the answer that score words reads; default 32.")
    ] = None,
    positions: Annotated[
        str | None,
        common.opt("Where --patch works: each (default), all, last, or numbers such as 0,3-5,-1."),
    ] = None,
    patch: Annotated[
        bool, common.opt("Put activations of clean prompts into corrupted prompts.", "--patch")
    ] = False,
    mediate: Annotated[
        bool,
        common.opt(
            "Steer as the run chose to, and give each later part its unsteered output back.",
            "--mediate",
        ),
    ] = False,
    propagate: Annotated[
        bool,
        common.opt("Measure how far the run's chosen steering moves later layers.", "--propagate"),
    ] = False,
    lens: Annotated[
        Path | None,
        common.opt("With --propagate: a Jacobian lens file, read beside the logit lens."),
    ] = None,
    first: Annotated[
        bool, common.opt("Ablate the first position (an attention sink) as well.", "--first")
    ] = False,
    text: common.Text = False,
    batch: common.Batch = None,
    out: Annotated[
        Path | None, common.opt("Write every row to this .csv or .parquet file.")
    ] = None,
    plot: Annotated[
        Path | None,
        common.opt(
            "Draw into this .png or .svg file: effects by layer; with --patch by position and "
            "layer."
        ),
    ] = None,
    model: Annotated[
        str | None, common.opt("'starter', a folder, or the name of a model; default the run's.")
    ] = None,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Find which parts of the model matter, and where steering acts.

    Without a run, parts are taken out, layer by layer: --prompts says on what prompts, --component
    which parts. With --patch, activations of clean prompts are put in instead. With a study's run,
    --mediate and --propagate ask where its steering acts.

    A score is a mean over prompts with a 95 % interval, compared prompt by prompt with the
    unchanged model. A share of an effect is a ratio of two such means.
    """
    request = Request.of(locals())
    if request.kind == "ablation":
        outcome = _ablated(request)
    elif request.kind == "--patch":
        outcome = _patched(request)
    else:
        outcome = _traced(request)
    write(outcome, request.given.get("out"), request.given.get("plot"), "as_json" in request.given)


@dataclass
class Outcome:
    """What is printed, written and drawn."""

    table: "pd.DataFrame"
    summary: "pd.DataFrame"
    draw: "Callable[[], Figure]"
    title: str = ""
    notes: Sequence[str] = ()
    largest_first: bool = False
    by_layer: bool = False  # on a terminal a row a layer, a column a component

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
    return common.load(
        given.get("model", name), given.get("dtype", dtype), given.get("device"),
        None if "model" in given else revision or None,
    )  # fmt: skip


def _ablated(request: Request) -> Outcome:
    from interp_steer.causal import ablate as ablation

    given = request.given
    model = _model(request, "starter", None, None)
    items = request.prompts.items(as_chat=model.is_chat and "text" not in given)
    some = {name: given[name] for name in ("span", "width", "first", "answer", "batch")
            if name in given}  # fmt: skip
    with progress("ablating", 1.0) as report:
        effects = ablation.ablate(
            model, items, request.many("component", ablation.COMPONENTS_OF_A_BLOCK),
            request.many("method", ["zero"]), vector=request.vector, scores=given.get("score"),
            words=request.many("word"), layers=request.layers, heads=request.heads,
            report=report, **some,
        )  # fmt: skip
    summary = effects.summary()

    def draw() -> "Figure":
        from interp_steer.report import plots

        return plots.profile(summary)

    return Outcome(effects.table, summary, draw, by_layer=True)


def _patched(request: Request) -> Outcome:
    from interp_steer.causal import patch as patching

    given = request.given
    model = _model(request, "starter", None, None)
    items = request.prompts.items(as_chat=model.is_chat and "text" not in given)
    with progress("patching", 1.0) as report:
        effects = patching.patch(
            model, items, request.many("component", ["resid_pre"]), positions=request.positions,
            layers=request.layers, heads=request.heads, batch=given.get("batch"), report=report,
        )  # fmt: skip
    return brought_back(effects)


def brought_back(effects: "Patching") -> Outcome:
    """What is shown of a patching."""
    summary = effects.summary()

    def draw() -> "Figure":
        from interp_steer.report import maps

        return maps.patching(summary, effects.table)

    title = _effect(summary, effects.table, "corrupt", "clean", "share of it brought back")
    return Outcome(
        effects.table, summary, draw, title, _doubts(effects.doubt(summary)), largest_first=True
    )


def _traced(request: Request) -> Outcome:
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
        from interp_steer.steering.lens import JacobianLens

        path = request.given.get("lens")
        lens = JacobianLens.load(path, model) if path else None
        with progress("tracing", len(items)) as report:
            batch = {"batch": request.given["batch"]} if "batch" in request.given else {}
            moved = tracing.propagation(model, items, cell.steer, lens=lens, report=report, **batch)
        summary = moved.summary("last_relative")
        best = moved.risen[moved.risen["rank"] <= 3]
        for by, part in best.groupby("read", sort=False):
            risen = part.groupby("layer")["token"].apply(" ".join)
            name = "rises" if by == "logit lens" else "jacobian_rises"
            summary = summary.assign(**{name: summary["layer"].map(risen)})
        title = f"{cell}\nlast_relative: {maps.MOVED['last_relative']}"
        return Outcome(moved.table, summary, lambda: maps.propagation(summary), title)
    words = request.many("word", study.concept)
    pairs = all(item.positive is not None and item.negative is not None for item in items)
    default = "logit_difference" if pairs else "words" if words else "kl_last"
    score = request.many("score", [default])[0]
    some = {name: request.given[name] for name in ("answer", "batch") if name in request.given}
    with progress("restoring each part", 1.0) as report:
        effects = tracing.mediation(
            model, items, cell.steer, score, words=words, heads=request.heads,
            components=request.many("component", ["attn_out", "mlp_out"]), report=report, **some,
        )  # fmt: skip
    summary = effects.summary()
    title = _effect(summary, effects.table, "unsteered", "steered", "share of it that goes")
    return Outcome(
        effects.table, summary, lambda: maps.mediation(summary), f"{cell}\n{title}",
        _doubts(effects.doubt(summary)),
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


def write(outcome: Outcome, out: Path | None, plot: Path | None, as_json: bool) -> None:
    """Writes the rows, draws, and prints; whichever fails takes nothing from the others."""
    summary = outcome.summary
    failures: list[Exception] = []
    wrote: list[Path] = []
    for path, write in ((out, outcome.save), (plot, outcome.picture)):
        try:
            if path:
                write(path)
                wrote.append(path)
        except Exception as error:  # whatever it is, the numbers are there
            failures.append(error)
    notes = list(outcome.notes)
    if as_json:
        common.print_json(json.loads(summary.to_json(orient="records")))
    else:
        _show(outcome, notes)
        for path in wrote:
            print(f"wrote {path}")
    for note in notes:
        print(safe(note), file=sys.stderr)
    if failures:
        lost = next(path for path in (out, plot) if path and path not in wrote)
        why = failures[0]
        raise RunError(f"the table is complete, but {lost} could not be made: {why}") from why


def layer_table(summary: "pd.DataFrame") -> tuple[list[str], list[list[str]]]:
    """Heads and rows of one score: a row a layer (or head), a column a component and method."""
    columns: dict[str, None] = {}
    rows: dict[str, dict[str, str]] = {}
    one_method = summary["method"].nunique() == 1
    for r in summary.to_dict("records"):
        head = "" if r.get("head") is None or r["head"] != r["head"] else f"h{r['head']}"
        column = str(r["component"]) if one_method else f"{r['component']} {r['method']}"
        value = "" if r["estimate"] != r["estimate"] else f"{r['estimate']:+.3f}"
        if r["low"] is not None and r["low"] == r["low"]:
            value += f" [{r['low']:+.2f}, {r['high']:+.2f}]"
        columns[column] = None
        rows.setdefault(f"{r['span']}{head}", {})[column] = value
    return ["layer", *columns], [[at, *(v.get(c, "") for c in columns)] for at, v in rows.items()]


def _show(outcome: Outcome, notes: list[str]) -> None:
    """The table without columns that say nothing, and why it has no intervals, if so."""
    if outcome.title:
        print(safe(outcome.title))
    if outcome.by_layer and sys.stdout.isatty():
        for score, some in outcome.summary.groupby("score", sort=False):
            print(f"\n{score}: change, in nats")
            common.table(*layer_table(some))
        if outcome.summary["low"].isna().all():
            notes.append(f"no intervals: {outcome.summary['interval'].iloc[0]}")
        return
    shown, more = outcome.summary.head(SHOWN), len(outcome.summary) - SHOWN
    if more > 0 and outcome.largest_first:
        order = outcome.summary["estimate"].abs().sort_values(ascending=False, kind="stable").index
        shown = outcome.summary.loc[order].head(SHOWN)
    dull = [c for c in shown if shown[c].isna().all()]
    # what is the same in every line says nothing; the effect stands above
    dull += [c for c in ("missing", "interval") if c in shown and shown[c].nunique() == 1]
    dull += [c for c in ("effect", "effect_low", "effect_high") if c in shown]
    if "low" in dull and "interval" in dull:
        notes.append(f"no intervals: {shown['interval'].iloc[0]}")
    elif "low" in shown and shown["low"].notna().all():  # how each was formed is in --json
        dull.append("interval")
    shown = shown.drop(columns=dict.fromkeys(dull)).astype(object)
    common.table([*map(str, shown)], shown.where(shown.notna(), None).values.tolist())
    if more > 0:
        print(f"... and {more} more; --out FILE.csv has every row, --json this table")
