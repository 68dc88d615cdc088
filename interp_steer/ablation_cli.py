"""`interp-steer ablate`: which layers and parts matter, and where a run's steering acts."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp_steer.console import progress, safe
from interp_steer.errors import RequestError
from interp_steer.options import Device, Dtype, Json, load

if TYPE_CHECKING:
    import pandas as pd

    from interp_steer.model import SteeringModel

SHOWN = 40  # lines on a terminal; the file has all


def ablate(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run's folder, for --mediate and --propagate.", show_default=False),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A .txt, .json or .jsonl file.")] = None,
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
    span: Annotated[str, typer.Option(help="layer, window, upward or downward.")] = "layer",
    width: Annotated[int, typer.Option(help="Layers of a window.")] = 3,
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
        list[str] | None, typer.Option(help="A concept's word, for words; may be repeated.")
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
        Path | None, typer.Option(help="A .png or .svg file: the layer profile.")
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
    intervals, paired with the unchanged model.
    """
    if patch + mediate + propagate > 1:
        raise RequestError("--patch, --mediate and --propagate are three things; give one")
    if (mediate or propagate) != (run is not None):
        raise RequestError("--mediate and --propagate take a run's folder; nothing else does")
    if run is None and prompts is None:
        raise RequestError("nothing to ablate on: give --prompts, or a run with --mediate")
    for path, known in ((out, (".csv", ".parquet")), (plot, (".png", ".svg"))):
        if path and path.suffix not in known:
            raise RequestError(f"{path.name}: expected a {' or '.join(known)} file")
    numbers = {"layers": _numbers("--layers", layers), "heads": _numbers("--heads", heads)}
    if mediate or propagate:
        assert run is not None
        found, summary = _traced(run, mediate, component, model, dtype, device, batch)
    else:
        loaded = load(model or "starter", dtype, device)
        from interp_steer.prompt_file import read_items

        assert prompts is not None
        items = read_items(prompts, as_chat=loaded.is_chat and not text)
        with progress("ablating", 1.0) as report:
            shared: dict[str, Any] = {**numbers, "batch": batch, "report": report}
            if patch:
                from interp_steer.tracing import patch as patched

                made: Any = patched(loaded, items, component or ["resid_pre"], **shared)
            else:
                from interp_steer.ablation import ablate as ablated

                vector = _vector(direction)
                made = ablated(
                    loaded, items, component or ["attn_out", "mlp_out"], method or ["zero"],
                    span=span, width=width, vector=vector, scores=score, words=word or [],
                    first=first, **shared,
                )  # fmt: skip
        found, summary = made.table, made.summary()
    _write(found, summary, out, plot, as_json)


def _traced(
    folder: Path,
    mediate: bool,
    component: list[str] | None,
    name: str | None,
    dtype: str | None,
    device: str | None,
    batch: int | None,
) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """The chosen steering of a run on the prompts that prove: rows, and their summary."""
    from interp_steer.cell import SETTING
    from interp_steer.runs import Run
    from interp_steer.study_file import StudyFile

    done = Run(folder)
    chosen = done.findings().chosen
    if chosen is None:
        raise RequestError(f"{folder} has no chosen cell: its study chose none, or is not done")
    read = StudyFile.read(folder / "study.yaml")
    loaded: SteeringModel = load(
        name or str(read.model["model"]), dtype or read.model["dtype"], device
    )
    from interp_steer import tracing

    study = read.study(loaded).bound(loaded)
    setting = tuple(chosen[part] for part in SETTING)
    steer = study.cell(setting, study.scale(loaded)).steer  # type: ignore[arg-type]
    items = list(study.prove)
    if not mediate:
        with progress("tracing", len(items)) as report:
            found = tracing.propagation(loaded, items, steer, report=report)
        summary = found.summary("last_relative")
        risen = found.risen[found.risen["rank"] <= 3].groupby("layer")["token"].apply(" ".join)
        return found.table, summary.assign(rises=summary["layer"].map(risen))
    pairs = all(item.positive is not None for item in items)
    score = "logit_difference" if pairs else "words" if study.concept else "kl_last"
    with progress("restoring each part", 1.0) as report:
        made = tracing.mediation(
            loaded, items, steer, score, words=list(study.concept),
            components=component or ["attn_out", "mlp_out"], batch=batch, report=report,
        )  # fmt: skip
    return made.table, made.summary()


def _vector(name: str | None) -> Any:
    if name is None:
        return None
    from interp_steer.direction import Directions
    from interp_steer.errors import nearest

    known = Directions([])
    try:
        return known[name]
    except KeyError:
        raise RequestError(f"no direction {name!r}{nearest(name, known)}") from None


def _numbers(option: str, text: str | None) -> list[int] | None:
    """`3,7,12-20` as numbers."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        bounds = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        low, high = map(int, (bounds[1], bounds[2] or bounds[1])) if bounds else (1, 0)
        if high < low:
            raise RequestError(f"{option} is {text!r}, expected such as 3,7,12-20")
        found += range(low, high + 1)
    return found


def _write(
    found: "pd.DataFrame",
    summary: "pd.DataFrame",
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from interp_steer.files import whole

    if out:
        with whole(out) as part:
            if out.suffix == ".csv":
                found.to_csv(part, index=False)
            else:
                found.to_parquet(part, index=False)
    if plot:
        from interp_steer import plots

        plots.save(plots.profile(summary), plot)
    if as_json:
        print(json.dumps(json.loads(summary.to_json(orient="records")), indent=1))
        return
    dull = [c for c in summary if summary[c].isna().all()]
    # what is the same in every line says nothing
    dull += [c for c in ("missing", "interval") if summary[c].nunique() == 1]
    shown = summary.drop(columns=dull)
    print(safe(shown.head(SHOWN).round(4).to_string(index=False)))
    if len(shown) > SHOWN:
        print(f"... and {len(shown) - SHOWN} more; --out FILE.csv has every row, --json this table")
    for path in filter(None, (out, plot)):
        print(f"wrote {path}")
