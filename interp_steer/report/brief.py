"""The short form of findings, for a notebook: the verdict, the claims, one picture."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import pandas as pd
from markupsafe import Markup

from interp_steer.errors import RequestError
from interp_steer.report import plots
from interp_steer.report.heat import heat_map
from interp_steer.report.page import (
    Picture,
    Table,
    as_records,
    chance,
    escaped,
    plain,
    render,
    signed,
    span,
)


def brief(
    verdict: str,
    decides: str,
    grid: pd.DataFrame,
    claims: pd.DataFrame,
    nulls: pd.DataFrame,
    p: pd.DataFrame,
    chosen: Mapping[str, str] | None,
    notes: Sequence[str],
) -> str:
    """As HTML; the tables are those of `Findings`."""
    drawn, alt = None, f"{decides}: chosen setting and its controls, or the grid"
    with suppress(RequestError):
        drawn = plots.controls(nulls, claims, decides, p)
    if drawn is None or nulls.empty:
        with suppress(RequestError):
            drawn = heat_map(grid, [decides], chosen)
    # PNG: some notebooks show no SVG from a data address
    picture = None if drawn is None else Picture.of(drawn, alt, "png")
    table = claims_table(claims, decides)
    return render("brief.html", verdict=verdict, claims=table, picture=picture, notes=notes)


def claims_table(claims: pd.DataFrame, decides: str) -> Table | None:
    """The chosen setting's effects, a metric a line."""
    records = [r for r in as_records(claims) if r["role"] == "chosen"]
    if not records:
        return None
    missing = any(r["missing"] for r in records)
    rows = []
    for r in records:
        name = escaped(r["metric"])
        if r["metric"] == decides:
            name = Markup("<strong>{}</strong> (decides)").format(name)
        lost = (int(r["missing"]), plain(r["mean_missing_zero"])) if missing else ()
        rows.append(
            (
                name, signed(r["effect"]), span(r["low"], r["high"]), chance(r["p"]),
                plain(r["unsteered"]), plain(r["mean"]),
                span(r["mean_low"], r["mean_high"], ""), int(r["n"]), *lost, r["method"],
            )
        )  # fmt: skip
    lost_heads = ("missing", "missing as 0") if missing else ()
    heads = ("metric", "effect", "interval", "p of no effect", "unsteered", "steered", "interval",
             "prompts", *lost_heads, "method")  # fmt: skip
    return Table(heads, rows, caption="The chosen setting", last_words=True)
