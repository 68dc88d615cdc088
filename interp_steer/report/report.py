"""The report of a run: one HTML page that says what was asked, found, shown and how to repeat it.

Whatever models, prompts and names bring along is text, escaped.
"""

import random
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.errors import RequestError
from interp_steer.report import methods, plots
from interp_steer.report.heat import heat_map
from interp_steer.report.page import (
    Markup,
    chance,
    document,
    escaped,
    figure,
    folded,
    image,
    marked,
    plain,
    signed,
    span,
    table,
)
from interp_steer.report.plots import as_records
from interp_steer.results.roles import ROLES, SETTING
from interp_steer.util.files import explained, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp_steer.report.findings import Findings
    from interp_steer.report.run import Run

SHOWN = 4  # sample texts drawn at random
ENDS = 2  # and as many of the best and of the worst
SEED = 16  # of that draw
GRID_ROWS = 4000  # of the grid's table; a browser still scrolls so many

Record = dict[str, Any]
Cells = Sequence[object]


def write(run: "Run", path: str | Path | None = None, level: float = 0.95) -> Path:
    """Writes the report of a run, whole or not at all.

    Args:
        run: finished or not; what is missing is named.
        path: of the page; default `report.html` in the run's folder.
        level: of the intervals.

    Raises:
        RequestError: the run has no rows yet.
        RunError: the page cannot be written.
    """
    path = Path(path) if path is not None else run.folder / "report.html"
    page = _Report(run, run.findings(level=level), level).html()
    with explained(path):
        if path.is_file() and path.read_bytes() == page.encode():
            return path
    with whole(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def body(findings: "Findings") -> str:
    """The short form for a notebook: the verdict, the claims, one picture."""
    decides = findings.manifest["choose_by"]
    made: Figure | None = None
    with suppress(RequestError):
        made = plots.controls(findings.nulls, findings.claims, decides, findings.p)
    if made is None or findings.nulls.empty:
        with suppress(RequestError):
            made = heat_map(findings.grid, [decides], findings.chosen)
    parts = [f"<p><strong>{escaped(findings.verdict.text)}</strong></p>", _claims(findings)]
    if made is not None:
        # PNG: some notebooks show no SVG from a data address
        parts.append(image(made, f"{decides}: chosen cell and its controls, or the grid", "png"))
    parts += [f"<p><small>{escaped(note)}</small></p>" for note in findings.notes]
    return f'<div class="interp-steer">{"".join(parts)}</div>'


class _Report:
    """A report in the making."""

    def __init__(self, run: "Run", findings: "Findings", level: float) -> None:
        self.run, self.found, self.level = run, findings, level
        self.told: Mapping[str, Any] = run.manifest
        self.decides = str(self.told["choose_by"])

    def html(self) -> str:
        """The whole page."""
        title = self.told["question"] or f"Steering {self.told['model']} with " + ", ".join(
            self.told["directions"]
        )
        verdict = self.found.verdict
        kind = {True: "yes", False: "no", None: "open"}[verdict.steers]
        sections = [
            ("What was found", self._found()),
            ("Pictures", self._pictures()),
            ("Sample texts", self._samples()),
            ("What to be careful about", methods.careful(self.found)),
            ("Methods", methods.methods(self.found, self.level)),
            ("Setting", methods.setting(self.run.folder, self.told)),
            ("All numbers", self._numbers()),
            ("Run it again", self._again()),
        ]
        main = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections)
        date = escaped(self.told["written_at"][:10])
        return document(
            title,
            f'<header><p class="dim">interp-steer study, {date}</p>'
            f'<h1 dir="auto">{escaped(title)}</h1></header>'
            f'<p class="verdict {kind}">{escaped(verdict.text)}</p>{self._missing()}{main}',
        )

    def _missing(self) -> str:
        """Planned rows that are not there, by the part that they play."""
        lost = Counter(one["role"] for one in self.run.plan if one["key"] not in self.run.rows)
        if lost:
            told = ", ".join(f"{count} {role}" for role, count in lost.items())
            said = (
                f"{lost.total()} of {len(self.run.plan)} planned rows are missing ({told}): "
                "they failed or were not run yet. Run the study in the same folder again: it does "
                "what is missing, and says why a row fails."
            )
        elif self.found.state == "begun":
            said = "Only unsteered rows were run so far. Run the study in this folder again."
        elif self.found.state == "waiting":
            said = (
                "The grid was run; the chosen cell and its controls were not. Run the study in "
                "this folder again."
            )
        else:
            return ""
        return f'<p class="warn">{escaped(said)}</p>'

    # --- results --------------------------------------------------------------------------------

    def _found(self) -> str:
        parts = []
        if self.found.chosen is None:
            parts.append("<p>No cell is claimed, so there is no table of claims.</p>")
        else:
            table = self.found.table
            mine = table[(table["role"] == "chosen") & (table["split"] == "prove")]
            ran, planned = mine["item"].nunique(), self.told["prompts"]["prove"]
            prompts = planned if ran == planned else f"{ran} of {planned}"
            parts.append(
                f"<p>The chosen cell is <code>{escaped(_cell(self.found.chosen))}</code>. Its "
                f"effects on {prompts} prompts that had no part in the choice, as differences from "
                "the unsteered answers to the same prompts:</p>"
            )
            parts.append(_claims(self.found))
        chosen_from = self.told["prompts"]["choose"] and methods.whole_grid(self.found)
        if self.found.best_layers and chosen_from:
            layers = ", ".join(map(str, self.found.best_layers))
            parts.append(
                f"<p>Layers not excluded from being the best by {escaped(self.decides)}: "
                f"{escaped(layers)}.</p>"
            )
        parts.append(self._controls([self.decides], "one-sided"))
        if not self.found.slopes.empty:
            parts.append(self._slopes())
        return "".join(parts)

    def _controls(self, metrics: Sequence[str], sides: str) -> str:
        """Controls against the chosen cell."""
        rows: list[Cells] = []
        for r in as_records(self.found.claims):
            if r["metric"] in metrics and r["role"] != "chosen":
                ends = ("", signed(r["effect"]), span(r["low"], r["high"]), "")
                rows.append((ROLES[r["role"]], r["metric"], *ends))
        for r in as_records(self.found.p):
            if r["metric"] in metrics:
                reach = f"{signed(r['lowest'])} to {signed(r['highest'])}"
                reach = "none" if pd.isna(r["mean"]) else reach
                ends = (str(int(r["n"])), signed(r["mean"]), reach, f"{r['p']:.3f}")
                rows.append((ROLES[r["control"]], r["metric"], *ends))
        if not rows:
            return "" if self.found.claims.empty else "<p>No controls were run.</p>"
        return table(
            ("control", "metric", "n", "effect", "interval, or range", "p"),
            rows,
            caption=f"Controls. p, {sides}: how often null directions do at least as well",
            words=2,
        )

    def _slopes(self) -> str:
        """Steerability: of the chosen cell's site in view, of the others folded away."""
        where = ("direction", "operator", "site", "scope")
        mine: list[Cells] = []
        others: list[Cells] = []
        for r in as_records(self.found.slopes):
            line = (
                *(r[name] for name in where), r["metric"], f"{signed(r['slope'])} per {r['per']}",
                span(r["low"], r["high"]), f"{r['negative']:.0%}",
                span(r["negative_low"], r["negative_high"], ""), int(r["n"]),
            )  # fmt: skip
            chosen = self.found.chosen
            is_mine = chosen is not None and all(str(r[n]) == chosen[n] for n in where)
            (mine if is_mine else others).append(line)
        heads = (*where, "metric", "slope", "interval", "negative", "interval", "prompts")
        caption = "Steerability: slope of each prompt, and the share of prompts that turn away"
        said = table(heads, mine, caption=caption, words=5) if mine else ""
        if not others:
            return said
        rest = table(heads, others, caption=caption, words=5)
        return said + folded("Steerability at other sites", rest)

    def _pictures(self) -> str:
        parts = [self._pictures_of(self.decides, True)]
        others = [name for name in self.told["metrics"] if name != self.decides]
        more = [f"<h3>{escaped(n)}</h3>{made}" for n in others if (made := self._pictures_of(n))]
        if more:
            parts.append(folded(", ".join(others), "".join(more)))
        return "".join(parts) or "<p>Nothing to draw yet.</p>"

    def _pictures_of(self, metric: str, full: bool = False) -> str:
        found, grid, chosen = self.found, self.found.grid, self.found.chosen
        on = f"{self.told['prompts']['choose'] or self.told['prompts']['prove']} prompts"
        banded = not grid.empty and grid["low"].notna().any()
        bands = "Bands hold for the whole grid at once." if banded else "Points without intervals."
        wanted: list[tuple[str, Callable[[], Figure]]] = [
            (
                f"Effect of every cell on {metric}, on the {on} of the grid.",
                lambda: heat_map(grid, [metric], chosen),
            ),
            (
                f"Effect on {metric} against strength. {bands}",
                lambda: plots.curves(grid, [metric], chosen),
            ),
        ]
        if not grid.empty and grid["layer"].nunique() > 2:
            caption = f"Effect on {metric} against the layer. {bands}"
            wanted.append((caption, lambda: plots.profile(grid, [metric], chosen)))
        if full or not found.nulls.empty:
            caption = f"The chosen cell and its controls by {metric}, on the prompts that prove."
            wanted.append(
                (caption, lambda: plots.controls(found.nulls, found.claims, metric, found.p))
            )
        drawn = []
        for caption, draw in wanted:
            with suppress(RequestError):  # a small run lacks what some pictures show
                drawn.append(figure(draw(), caption))
        return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""

    # --- texts ----------------------------------------------------------------------------------

    def _samples(self) -> str:
        every = self.found.table
        here = every[every["split"] == "prove"]
        before = {(r["item"], r["seed"]): r for r in as_records(here[here["role"] == "unsteered"])}
        rows = [
            r
            for r in as_records(here[here["role"] == "chosen"])
            if isinstance(r.get("text"), str) and (r["item"], r["seed"]) in before
        ]
        if not rows:
            if self.found.state != "chosen":
                return "<p>No chosen cell was run, so there are no texts to show.</p>"
            if every["text"].notna().any():
                return "<p>No answer of the chosen cell stands beside an unsteered one.</p>"
            return "<p>No text was generated: the metrics read given answers.</p>"
        draw = random.Random(SEED)
        draw.shuffle(rows)
        tags: dict[int, list[str]] = {}
        for i in range(min(SHOWN, len(rows))):
            tags.setdefault(i, []).append("drawn at random" if len(rows) > SHOWN else "")
        sign = self.found.measures[self.decides].sign
        moved = {
            i: sign * (r[self.decides] - before[r["item"], r["seed"]][self.decides])
            for i, r in enumerate(rows)
        }
        # sorted is stable and the rows are shuffled: of equal ones chance decides
        ranked = sorted((i for i in moved if moved[i] == moved[i]), key=lambda i: -moved[i])
        for i in ranked[:ENDS]:
            tags.setdefault(i, []).append(f"best by {self.decides}")
        for i in ranked[ENDS:][-ENDS:]:
            tags.setdefault(i, []).append(f"worst by {self.decides}")
        shown = [
            self._sample(rows[i], before[rows[i]["item"], rows[i]["seed"]], said)
            for i, said in tags.items()
        ]
        count = min(SHOWN, len(rows))
        told = (
            f"{count} of {len(rows)} answers of the chosen cell on the prompts that prove, drawn "
            f"at random (seed {SEED}), then the {ENDS} with the best and the {ENDS} with the worst "
            f"change in {self.decides}, of equal ones at random."
            if len(rows) > count
            else f"All {count} answers of the chosen cell on the prompts that prove."
        )
        told += " Beside each stands the unsteered answer to the same prompt."
        told += " Words of the concept are marked." if self.told["concept"] else ""
        return f"<p>{escaped(told)}</p>{''.join(shown)}"

    def _sample(self, after: Record, before: Record, tags: Sequence[str]) -> str:
        values = [
            f"{name} {before[name]:.3g} → {after[name]:.3g}"
            for name in self.told["metrics"]
            if pd.notna(after[name]) and pd.notna(before[name])
        ]
        seed = f", seed {after['seed']}" if len(self.told["seeds"]) > 1 else ""
        said = "".join(
            f'<div><h4>{name}</h4><p class="said" dir="auto">{self._said(row)}</p></div>'
            for name, row in (("unsteered", before), ("steered", after))
        )
        return (
            f'<article><p class="dim">{escaped(", ".join(filter(None, tags)) + seed)}</p>'
            f'<h3 class="said" dir="auto">{escaped(after["prompt"])}</h3>'
            f'<div class="pair">{said}</div><p class="dim">{escaped("; ".join(values))}</p>'
            "</article>"
        )

    def _said(self, row: Record) -> str:
        text = str(row["text"])
        if not text.strip():
            return '<span class="dim">(nothing)</span>'
        cut = '<span class="dim"> (cut)</span>' if row.get("finish") == "length" else ""
        return marked(text, self.told["concept"]) + cut

    def _numbers(self) -> str:
        parts = []
        others = [name for name in self.told["metrics"] if name != self.decides]
        if others and not self.found.p.empty:
            parts.append(
                folded("Controls by the other metrics", self._controls(others, "two-sided"))
            )
        grid = as_records(self.found.grid)
        if grid:
            heads = (*SETTING, "metric", "unsteered", "steered", "effect", "interval", "n",
                     "missing", "best", "within limits")  # fmt: skip
            rows = [
                (
                    *(r[name] for name in SETTING), r["metric"], plain(r["unsteered"]),
                    plain(r["mean"]), signed(r["effect"]), span(r["low"], r["high"]),
                    int(r["n"]), int(r["missing"]), "not excluded" if r["best"] else "",
                    "yes" if r["passes"] else "no",
                )
                for r in grid[:GRID_ROWS]
            ]  # fmt: skip
            cut = f", the first {GRID_ROWS}" if len(grid) > GRID_ROWS else ""
            parts.append(folded(f"The grid: {len(grid)} rows{cut}", table(heads, rows, words=6)))
        parts.append(
            "<p>Every row with its text: <code>interp-steer study table "
            f"{escaped(self.run.folder)} --out table.csv</code></p>"
        )
        return "".join(parts)

    def _again(self) -> str:
        folder = self.run.folder
        modules = escaped(", ".join(self.told["modules"]))
        needs = f"<p>It needs the metrics in {modules}.</p>" if modules else ""
        command = f"interp-steer study run {shlex.quote(str(folder / 'study.yaml'))} --out NEW"
        return (
            f"<pre><code>{escaped(command)}</code></pre>{needs}<p>The folder holds the study, the "
            "directions and the rows. On the same machine with the same versions, threads and rows "
            "at once the answers are the same bit for bit.</p><p>It was started with "
            f"<code>{escaped(' '.join(self.told['arguments']))}</code>.</p>"
        )


def _claims(found: "Findings") -> str:
    """The chosen cell's effects, a metric a line."""
    if found.claims.empty:
        return ""
    decides = found.manifest["choose_by"]
    records = [r for r in as_records(found.claims) if r["role"] == "chosen"]
    missing = any(r["missing"] for r in records)
    rows = []
    for r in records:
        name = escaped(r["metric"])
        if r["metric"] == decides:
            name = f"<strong>{name}</strong> (decides)"
        lost = (int(r["missing"]), plain(r["mean_missing_zero"])) if missing else ()
        rows.append(
            (
                Markup(name), signed(r["effect"]), span(r["low"], r["high"]), chance(r["p"]),
                plain(r["unsteered"]), plain(r["mean"]),
                span(r["mean_low"], r["mean_high"], ""), int(r["n"]), *lost, r["method"],
            )
        )  # fmt: skip
    lost_heads = ("missing", "missing as 0") if missing else ()
    heads = ("metric", "effect", "interval", "p of no effect", "unsteered", "steered", "interval",
             "prompts", *lost_heads, "method")  # fmt: skip
    return table(heads, rows, caption="The chosen cell", last_words=True)


def _cell(chosen: Mapping[str, str]) -> str:
    if not chosen["operator"]:
        return chosen["direction"]
    level = f", {chosen['level']}" if chosen["level"] else ""
    scope = f" on {chosen['scope']}" if chosen["scope"] not in ("", "all") else ""
    return f"{chosen['operator']}({chosen['direction']}{level}) at {chosen['site']}{scope}"
