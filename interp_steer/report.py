"""The report of a run: one HTML page that says what was asked, found, shown and how to repeat it.

Nothing in it is loaded from elsewhere and nothing in it runs: pictures are inside, there is no
script. Whatever models, prompts and names bring along is text, escaped.
"""

import base64
import html
import io
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_steer import plots
from interp_steer.console import safe
from interp_steer.errors import RequestError
from interp_steer.files import explained, whole
from interp_steer.metrics import METRICS
from interp_steer.study import ROLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp_steer.findings import Findings
    from interp_steer.runs import Run

ALPHA = 0.05
SHOWN = 4  # sample texts drawn at random
ENDS = 2  # and as many of the best and of the worst
SEED = 16  # of that draw
COLUMN = 540  # pixels; wider pictures take the whole width
GRID_ROWS = 4000  # of the grid's table; a browser still scrolls so many

PAPERS = {
    "studentised": "the wider of it and Student's t; Efron and Tibshirani 1993, ch. 12",
    "Newcombe": "Newcombe 1998, Statistics in Medicine 17, 2635",
    "Wilson": "Wilson 1927",
}

Record = dict[str, Any]
Cells = Sequence[object]


class Markup(str):
    """Text that is HTML already."""


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
    page = _Page(run, run.findings(level=level), level).html()
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
            made = plots.heat_map(findings.grid, [decides], findings.chosen)
    parts = [f"<p><strong>{_text(findings.verdict.text)}</strong></p>", _claims(findings)]
    if made is not None:
        # PNG: some notebooks show no SVG from a data address
        parts.append(_image(made, f"{decides}: chosen cell and its controls, or the grid", "png"))
    parts += [f"<p><small>{_text(note)}</small></p>" for note in findings.notes]
    return f'<div class="interp-steer">{"".join(parts)}</div>'


class _Page:
    """A report in the making."""

    def __init__(self, run: "Run", findings: "Findings", level: float) -> None:
        self.run, self.found, self.level = run, findings, level
        self.told: Mapping[str, Any] = run.manifest
        self.decides = str(self.told["choose_by"])
        self.spec = _spec(run.folder / "study.yaml")

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
            ("What to be careful about", self._careful()),
            ("Methods", self._methods()),
            ("Setting", self._setting()),
            ("All numbers", self._numbers()),
            ("Run it again", self._again()),
        ]
        main = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in sections)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            # a second lock: even if something slipped through, nothing would load or run
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">"
            f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>"
            f'<header><p class="dim">interp-steer study, {_text(self._date())}</p>'
            f'<h1 dir="auto">{_text(title)}</h1></header>'
            f'<p class="verdict {kind}">{_text(verdict.text)}</p>{self._missing()}{main}'
            "</main></body></html>\n"
        )

    def _date(self) -> str:
        return str(self.told["written_at"]).partition("T")[0]

    def _missing(self) -> str:
        """Planned rows that are not there, by the part that they play."""
        lost: dict[str, int] = {}
        for planned in self.run.plan:
            if planned["key"] not in self.run.rows:
                lost[planned["role"]] = lost.get(planned["role"], 0) + 1
        parts = []
        if lost:
            told = ", ".join(f"{count} {role}" for role, count in lost.items())
            parts.append(
                f"{sum(lost.values())} of {len(self.run.plan)} planned rows are missing ({told}): "
                "they failed or were not run yet. Run the study in the same folder again: it does "
                "what is missing, and says why a row fails."
            )
        elif self.found.chosen is None and not (self.found.table["role"] == "grid").any():
            parts.append("Only unsteered rows were run so far. Run the study in this folder again.")
        return "".join(f'<p class="warn">{_text(text)}</p>' for text in parts)

    # --- results --------------------------------------------------------------------------------

    def _found(self) -> str:
        parts = []
        if self.found.chosen is None:
            parts.append("<p>No cell is claimed, so there is no table of claims.</p>")
        else:
            prompts = self.told["prompts"]["prove"]
            parts.append(
                f"<p>The chosen cell is <code>{_text(_cell(self.found.chosen))}</code>. Its "
                f"effects on {prompts} prompts that had no part in the choice, as differences from "
                "the unsteered answers to the same prompts:</p>"
            )
            parts.append(_claims(self.found))
        if self.found.best_layers and self.told["prompts"]["choose"]:
            layers = ", ".join(map(str, self.found.best_layers))
            parts.append(
                f"<p>Layers not excluded from being the best by {_text(self.decides)}: "
                f"{_text(layers)}.</p>"
            )
        parts.append(self._controls([self.decides], "one-sided"))
        if not self.found.slopes.empty:
            parts.append(self._slopes())
        return "".join(parts)

    def _controls(self, metrics: Sequence[str], sides: str) -> str:
        """Controls against the chosen cell."""
        rows: list[Cells] = []
        for r in plots.as_records(self.found.claims):
            if r["metric"] in metrics and r["role"] != "chosen":
                ends = ("", _signed(r["effect"]), _span(r["low"], r["high"]), "")
                rows.append((ROLES[r["role"]], r["metric"], *ends))
        for r in plots.as_records(self.found.p):
            if r["metric"] in metrics:
                span = f"{_signed(r['lowest'])} to {_signed(r['highest'])}"
                ends = (str(int(r["n"])), _signed(r["mean"]), span, f"{r['p']:.3f}")
                rows.append((ROLES[r["control"]], r["metric"], *ends))
        if not rows:
            return "" if self.found.claims.empty else "<p>No controls were run.</p>"
        return _table(
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
        for r in plots.as_records(self.found.slopes):
            line = (
                *(r[name] for name in where), r["metric"], f"{_signed(r['slope'])} per {r['per']}",
                _span(r["low"], r["high"]), f"{r['negative']:.0%}",
                _span(r["negative_low"], r["negative_high"], ""), int(r["n"]),
            )  # fmt: skip
            chosen = self.found.chosen
            is_mine = chosen is not None and all(str(r[n]) == chosen[n] for n in where)
            (mine if is_mine else others).append(line)
        heads = (*where, "metric", "slope", "interval", "negative", "interval", "prompts")
        caption = "Steerability: slope of each prompt, and the share of prompts that turn away"
        said = _table(heads, mine, caption=caption, words=5) if mine else ""
        if not others:
            return said
        rest = _table(heads, others, caption=caption, words=5)
        return f"{said}<details><summary>Steerability at other sites</summary>{rest}</details>"

    def _pictures(self) -> str:
        parts = [self._pictures_of(self.decides, True)]
        others = [name for name in self.told["metrics"] if name != self.decides]
        more = [f"<h3>{_text(n)}</h3>{made}" for n in others if (made := self._pictures_of(n))]
        if more:
            names = ", ".join(others)
            parts.append(f"<details><summary>{_text(names)}</summary>{''.join(more)}</details>")
        return "".join(parts) or "<p>Nothing to draw yet.</p>"

    def _pictures_of(self, metric: str, full: bool = False) -> str:
        found = self.found
        grid, chosen = found.grid, found.chosen
        on = f"{self.told['prompts']['choose'] or self.told['prompts']['prove']} prompts"
        layers = 0 if grid.empty else grid["layer"].nunique()
        banded = not grid.empty and grid["low"].notna().any()
        bands = "Bands hold for the whole grid at once." if banded else "Points without intervals."
        wanted: list[tuple[str, Callable[[], Figure]]] = [
            (
                f"Effect of every cell on {metric}, on the {on} of the grid.",
                lambda: plots.heat_map(grid, [metric], chosen),
            ),
            (
                f"Effect on {metric} against strength. {bands}",
                lambda: plots.curves(grid, [metric], chosen),
            ),
        ]
        if layers > 2:
            wanted.append(
                (
                    f"Effect on {metric} against the layer. {bands}",
                    lambda: plots.profile(grid, [metric], chosen),
                )
            )
        if full or not self.found.nulls.empty:
            wanted.append(
                (
                    f"The chosen cell and its controls by {metric}, on the prompts that prove.",
                    lambda: plots.controls(found.nulls, found.claims, metric, found.p),
                )
            )
        drawn = []
        for caption, draw in wanted:
            with suppress(RequestError):  # a small run lacks what some pictures show
                made = draw()
                width = round(96 * made.get_figwidth())  # 96 is CSS's inch
                drawn.append(
                    f'<figure class="{"wide" if width > COLUMN else ""}" style="width:{width}px">'
                    f"{_scroll(_image(made, caption), caption)}"
                    f"<figcaption>{_text(caption)}</figcaption></figure>"
                )
        return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""

    # --- texts ----------------------------------------------------------------------------------

    def _samples(self) -> str:
        table = self.found.table
        here = table[table["split"] == "prove"]
        before = {
            (r["item"], r["seed"]): r for r in plots.as_records(here[here["role"] == "unsteered"])
        }
        rows = [
            r
            for r in plots.as_records(here[here["role"] == "chosen"])
            if isinstance(r.get("text"), str) and (r["item"], r["seed"]) in before
        ]
        if not rows:
            if (table["role"] == "chosen").any():
                return "<p>No text was generated: the metrics read given answers.</p>"
            return "<p>No cell was chosen, so there are no texts to show.</p>"
        draw = random.Random(SEED)
        draw.shuffle(rows)
        tags: dict[int, list[str]] = {}
        for i in range(min(SHOWN, len(rows))):
            tags.setdefault(i, []).append("drawn at random" if len(rows) > SHOWN else "")
        sign = 1.0 if METRICS[self.decides].better == "high" else -1.0
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
        marked = " Words of the concept are marked." if self.told["concept"] else ""
        return f"<p>{_text(told + marked)}</p>{''.join(shown)}"

    def _sample(self, after: Record, before: Record, tags: Sequence[str]) -> str:
        values = [
            f"{name} {before[name]:.3g} → {after[name]:.3g}"
            for name in self.told["metrics"]
            if _known(after[name]) and _known(before[name])
        ]
        seed = f", seed {after['seed']}" if len(self.told["seeds"]) > 1 else ""
        said = "".join(
            f'<div><h4>{name}</h4><p class="said" dir="auto">{self._said(row)}</p></div>'
            for name, row in (("unsteered", before), ("steered", after))
        )
        return (
            f'<article><p class="dim">{_text(", ".join(filter(None, tags)) + seed)}</p>'
            f'<h3 class="said" dir="auto">{_text(after["prompt"])}</h3>'
            f'<div class="pair">{said}</div><p class="dim">{_text("; ".join(values))}</p></article>'
        )

    def _said(self, row: Record) -> str:
        text = str(row["text"])
        if not text.strip():
            return '<span class="dim">(nothing)</span>'
        cut = '<span class="dim"> (cut)</span>' if row.get("finish") == "length" else ""
        return _marked(text, self.told["concept"]) + cut

    # --- how ------------------------------------------------------------------------------------

    def _careful(self) -> str:
        notes = list(self.found.notes)
        others = len(self.told["metrics"]) - 1
        if others > 0 and not self.found.claims.empty:
            notes.append(
                f"Only {self.decides} chose and decides. The intervals of other metrics hold each "
                "on its own, not all at once."
            )
        if not self.found.claims.empty and (missing := self.found.claims["missing"].sum()):
            notes.append(
                f"{int(missing)} values are missing. They are left out of means and intervals; the "
                "column “missing as 0” is the lower bound if each had been 0."
            )
        if self.found.verdict.p is not None:
            notes += self._reach()
        if "concept" in self.told["metrics"] or "mention" in self.told["metrics"]:
            words = ", ".join(self.told["concept"])
            notes.append(
                f"Naming a word is not being about it: an answer counts if it holds one of {words} "
                "that its prompt does not. Read the sample texts."
            )
        if self.told["dtype"] != "float32":
            notes.append(
                f"In {self.told['dtype']} another machine, thread count or batch writes other "
                "texts now and then; means hold, single texts may not."
            )
        notes.append("One model, and prompts of one origin: nothing is said about others.")
        return "<ul>" + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>"

    def _reach(self) -> list[str]:
        """What the verdict's p could be at best."""
        nulls = self.found.p[self.found.p["metric"] == self.decides].set_index("control")["n"]
        chance, cells = int(self.told["selected"]), int(self.told["cells"])
        told = []
        if not chance and cells > 1:
            told.append(
                "No random direction went through the choice itself, so p is multiplied by the "
                "number of cells, which is more than is needed."
            )
        times = 1 if chance else cells
        least = min(1.0, times / (1 + (chance or int(nulls.get("random", 0)))))
        if least > ALPHA:
            told.append(
                f"With so few random directions p cannot fall below {least:.3f}: whatever the "
                "effect, nothing could be declared."
            )
        return told

    def _methods(self) -> str:
        about = [
            f"<li><strong>{_text(name)}</strong>: {_text(METRICS[name].about)} "
            f"{'Higher' if METRICS[name].better == 'high' else 'Lower'} is better.</li>"
            for name in self.told["metrics"]
        ]
        paragraphs = (self._choosing(), self._measuring(), self._comparing())
        said = "".join(f"<p>{_text(' '.join(one))}</p>" for one in paragraphs if one)
        return f"{said}<ul>{''.join(about)}</ul>"

    def _choosing(self) -> list[str]:
        """What was chosen by what, on how many prompts, and shown on how many others."""
        told, prompts, cells = self.told, self.told["prompts"], int(self.told["cells"])
        said = []
        if prompts["build"]:
            said.append(
                f"The directions were made from {prompts['build']} prompts that occur nowhere else."
            )
        if cells == 1:
            said.append(
                "There was one cell, fixed beforehand; nothing was chosen. It and its controls "
                f"were run on {prompts['prove']} prompts, from which all claims come."
            )
        elif not prompts["choose"]:
            said.append(
                f"{cells} cells were run on {prompts['prove']} prompts. No prompts were set apart "
                "to choose one, so none is claimed."
            )
        else:
            limits = " and ".join(
                f"mean {name} of {'at least' if METRICS[name].better == 'high' else 'at most'} "
                f"{limit:g}"
                for name, limit in told["limits"].items()
            )
            said.append(
                f"{cells} cells were run on {prompts['choose']} prompts, and of those "
                + (f"with {limits} " if limits else "")
                + f"the one with the best mean effect in {self.decides} was chosen, a missing "
                "value counting as no effect and the first of equal ones winning. That cell, its "
                f"controls and nothing else were run on {prompts['prove']} other prompts, from "
                "which all claims come."
            )
        if prompts["neutral"]:
            said.append(
                f"On {prompts['neutral']} neutral texts it is measured what steering damages."
            )
        return said

    def _measuring(self) -> list[str]:
        """What an effect is, what missing means, which intervals there are."""
        seeds = len(self.told["seeds"])
        said = [
            "An effect is a difference from the unsteered answer to the same prompt with the same "
            "seed. The prompt is the unit"
            + (f"; its {seeds} seeds are averaged first." if seeds > 1 else "."),
            "A value that cannot be had, such as the repetition in an answer of two tokens, is "
            "missing: not zero, and left out of means.",
            self._intervals(),
            "The p of no effect is two-sided and paired over prompts: McNemar's exact test for "
            "rates of one answer a prompt, sign flips for all else; it knows nothing of controls."
            if not self.found.claims.empty and self.found.claims["p"].notna().any()
            else "",
        ]
        if not self.found.grid.empty and self.found.grid["low"].notna().any():
            said.append(
                f"The grid's intervals hold at {self.level:.0%} for all cells of a metric at once "
                "(max-t; Westfall and Young 1993, Romano and Wolf 2005); the set of cells not "
                "excluded from being best holds the best one at that level (Hsu 1984)."
            )
        if not self.found.slopes.empty:
            said.append(
                "Steerability is the least-squares slope of each prompt (Tan et al. 2024, arXiv "
                "2407.12404)."
            )
        return [one for one in said if one]

    def _comparing(self) -> list[str]:
        """What p is, and how the choice among cells is accounted for."""
        if self.found.p.empty:
            return []
        said = [
            "p = (1 + null directions that do at least as well) / (1 + null directions) (Davison "
            f"and Hinkley 1997, 4.2), one-sided by {self.decides}, of |effect| by the others."
        ]
        if self.found.verdict.p is not None:
            said.append(f"The verdict's p accounts for the choice: {self.found.verdict.how}.")
        return said

    def _intervals(self) -> str:
        """Which interval was formed how, as the claims' table has it."""
        named: dict[str, list[str]] = {}
        for r in plots.as_records(self.found.claims):
            if r["role"] == "chosen":
                named.setdefault(str(r["method"]), []).append(str(r["metric"]))
        told = "; ".join(f"{', '.join(names)}: {_cited(how)}" for how, names in named.items())
        return f"Intervals at {self.level:.0%} for effects, by metric: {told}." if told else ""

    def _setting(self) -> str:
        told, spec = self.told, self.spec
        sampling = told["sampling"]
        how = (
            "the most likely token"
            if not sampling["temperature"]
            else f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, "
            f"top-k {sampling['top_k']}"
        )
        machine = told["machine"]
        origins = _origins(self.run.folder / "directions")
        directions = [
            f"{name}@{sha}: {origins[name]}" if origins.get(name) else f"{name}@{sha}"
            for name, sha in told["directions"].items()
        ]
        controls = told["controls"]
        null = ", ".join(f"{controls[n]} {n}" for n in ("random", "features", "shuffled"))
        single = [n.replace("_", " ") for n in ("flip", "wrong_layer") if controls[n]]
        pairs: list[tuple[str, object]] = [
            ("model", told["model"]),
            ("revision", told["revision"] or "none given"),
            ("fingerprint", told["about"]["model"]),
            ("precision, device", f"{told['dtype']}, {told['device']}"),
            ("directions", "; ".join(directions)),
            *((n, spec[n]) for n in ("sites", "coefficients", "operators", "scopes") if n in spec),
            *((n, spec[n]) for n in ("lines", "method", "system") if spec.get(n)),
            ("cells", told["cells"]),
            ("prompts", ", ".join(f"{count} {name}" for name, count in told["prompts"].items())),
            ("concept", told["concept"]),
            ("metrics", [f"{n} (decides)" if n == self.decides else n for n in told["metrics"]]),
            ("limits", [f"{name} {limit:g}" for name, limit in told["limits"].items()]),
            ("controls asked for", f"{null} directions; {', '.join(single) or 'no single ones'}"),
            ("through the choice", f"{told['selected']} random directions"),
            (
                "sampling",
                f"{how}, at most {sampling['max_new_tokens']} tokens, repetition penalty "
                f"{sampling['repetition_penalty']:g}",
            ),
            ("seeds", told["seeds"]),
            ("rows at once", f"{told['chunk']}, {told['threads']} threads"),
            ("versions", ", ".join(f"{n} {v}" for n, v in told["versions"].items())),
            ("machine", ", ".join(str(v) for v in machine.values() if v)),
        ]
        lines = "".join(
            f"<dt>{_text(name)}</dt><dd>{_text(_listed(value))}</dd>"
            for name, value in pairs
            if value not in ([], "", None)
        )
        return f"<dl>{lines}</dl>"

    def _numbers(self) -> str:
        parts = []
        others = [name for name in self.told["metrics"] if name != self.decides]
        if others and not self.found.p.empty:
            parts.append(
                "<details><summary>Controls by the other metrics</summary>"
                f"{self._controls(others, 'two-sided')}</details>"
            )
        grid = plots.as_records(self.found.grid)
        if grid:
            heads = (*plots.SETTING, "metric", "unsteered", "steered", "effect", "interval", "n",
                     "missing", "best", "within limits")  # fmt: skip
            rows = [
                (
                    *(r[name] for name in plots.SETTING), r["metric"], _plain(r["unsteered"]),
                    _plain(r["mean"]), _signed(r["effect"]), _span(r["low"], r["high"]),
                    int(r["n"]), int(r["missing"]), "not excluded" if r["best"] else "",
                    "yes" if r["passes"] else "no",
                )
                for r in grid[:GRID_ROWS]
            ]  # fmt: skip
            cut = f", the first {GRID_ROWS}" if len(grid) > GRID_ROWS else ""
            parts.append(
                f"<details><summary>The grid: {len(grid)} rows{cut}</summary>"
                f"{_table(heads, rows, words=6)}</details>"
            )
        parts.append(
            "<p>Every row with its text: <code>interp-steer study table "
            f"{_text(self.run.folder)} --out table.csv</code></p>"
        )
        return "".join(parts)

    def _again(self) -> str:
        folder = self.run.folder
        modules = self.told["modules"]
        needs = ""
        if modules:
            needs = f"<p>It needs the metrics in {_text(', '.join(modules))}.</p>"
        command = f"interp-steer study run {_quoted(folder / 'study.yaml')} --out NEW"
        return (
            f"<pre><code>{_text(command)}</code></pre>{needs}<p>The folder holds the study, the "
            "directions and the rows. On the same machine with the same versions, threads and rows "
            "at once the answers are the same bit for bit.</p><p>It was started with "
            f"<code>{_text(' '.join(self.told['arguments']))}</code>.</p>"
        )


# --- pieces ---------------------------------------------------------------------------------------


def _claims(found: "Findings") -> str:
    """The chosen cell's effects, a metric a line."""
    if found.claims.empty:
        return ""
    decides = found.manifest["choose_by"]
    records = [r for r in plots.as_records(found.claims) if r["role"] == "chosen"]
    missing = any(r["missing"] for r in records)
    rows = []
    for r in records:
        name = _text(r["metric"])
        if r["metric"] == decides:
            name = f"<strong>{name}</strong> (decides)"
        lost = (int(r["missing"]), _plain(r["mean_missing_zero"])) if missing else ()
        rows.append(
            (
                Markup(name), _signed(r["effect"]), _span(r["low"], r["high"]), _chance(r["p"]),
                _plain(r["unsteered"]), _plain(r["mean"]),
                _span(r["mean_low"], r["mean_high"], ""), int(r["n"]), *lost, r["method"],
            )
        )  # fmt: skip
    lost_heads = ("missing", "missing as 0") if missing else ()
    heads = ("metric", "effect", "interval", "p of no effect", "unsteered", "steered", "interval",
             "prompts", *lost_heads, "method")  # fmt: skip
    return _table(heads, rows, caption="The chosen cell", last_words=True)


def _table(
    heads: Sequence[str],
    rows: Iterable[Cells],
    caption: str = "",
    words: int = 1,
    last_words: bool = False,
) -> str:
    """A table; its first `words` columns are words, the others numbers."""

    def kind(i: int) -> str:
        if i < words or (last_words and i == len(heads) - 1):
            return ' class="w"' if i in (0, len(heads) - 1) else ""
        return ' class="n"'

    head = "".join(f'<th scope="col"{kind(i)}>{_text(name)}</th>' for i, name in enumerate(heads))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{_text(v)}</td>" for i, v in enumerate(row)) + "</tr>"
        for row in rows
    )
    said = f"<caption>{_text(caption)}</caption>" if caption else ""
    table = f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return _scroll(table, caption or "table")


def _scroll(inner: str, name: str) -> str:
    """What may be wider than the page scrolls by itself, from the keyboard too."""
    label = _text(name)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{inner}</div>'


def _image(figure: "Figure", alt: str, kind: str = "svg") -> str:
    """A figure inside the page. As an image, so that ids of several SVGs do not meet."""
    written = io.BytesIO()
    dated: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 144}
    figure.savefig(written, format=kind, **dated)
    data = base64.b64encode(written.getvalue()).decode()
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    # below three quarters of its size the small print would be too small: then it scrolls
    width = round(96 * figure.get_figwidth())
    style = f"width:{width}px;max-width:100%;min-width:{round(0.75 * width)}px"
    return f'<img alt="{_text(alt)}" style="{style}" src="data:{mime};base64,{data}">'


def _text(value: object) -> str:
    """Anything as HTML text: escaped, control and direction-changing characters made visible."""
    if isinstance(value, Markup):
        return value
    encodable = str(value).encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair
    return html.escape(safe(encodable))


def _marked(text: str, words: Sequence[str]) -> str:
    """Text with whole words of the concept marked."""
    if not any(words):
        return _text(text)
    found = re.split(rf"(?i)\b({'|'.join(map(re.escape, filter(None, words)))})\b", text)
    return "".join(f"<mark>{_text(t)}</mark>" if i % 2 else _text(t) for i, t in enumerate(found))


def _known(value: Any) -> bool:
    return value is not None and not math.isnan(value)


def _plain(value: Any) -> str:
    """Three decimals; more where there would be nothing but zeros."""
    if not _known(value):
        return "missing"
    text = f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"
    return text.replace("-", "−")


def _signed(value: Any) -> str:
    if not _known(value):
        return "missing"
    return ("+" if value > 0 else "") + _plain(value)


def _chance(p: Any) -> str:
    if not _known(p):
        return "none"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _span(low: Any, high: Any, sign: str = "+") -> str:
    if not (_known(low) and _known(high)):
        return "none"
    ends = (_signed(low), _signed(high)) if sign else (_plain(low), _plain(high))
    return f"[{ends[0]}, {ends[1]}]"


def _cell(chosen: Mapping[str, str] | None) -> str:
    if chosen is None:
        return "none"
    if not chosen["operator"]:
        return chosen["direction"]
    level = f", {chosen['level']}" if chosen["level"] else ""
    scope = f" on {chosen['scope']}" if chosen["scope"] not in ("", "all") else ""
    return f"{chosen['operator']}({chosen['direction']}{level}) at {chosen['site']}{scope}"


def _cited(method: str) -> str:
    """How an interval was formed, with the paper."""
    if method.startswith("fewer"):
        return f"none ({method})"
    papers = [paper for name, paper in PAPERS.items() if name in method]
    return f"{method} ({papers[0]})" if papers else method


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))


def _spec(path: Path) -> Mapping[str, Any]:
    """The study's declaration; nothing where the file was taken away."""
    import yaml

    if not path.is_file():
        return {}
    with explained(path), suppress(yaml.YAMLError, UnicodeDecodeError):
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        return read if isinstance(read, dict) else {}
    return {}


def _origins(folder: Path) -> dict[str, str]:
    """Where each saved direction came from, in a line, from its file's metadata."""
    import json

    from safetensors import SafetensorError, safe_open

    told = {}
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError):
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
            if "members" in about:
                source = json.loads(about["members"])[0]["source"]
            else:
                source = json.loads(about["source"])
            keep = ("release", "sae_id", "index", "label", "method", "prompts", "position", "model")
            told[path.stem] = ", ".join(f"{k} {source[k]}" for k in keep if source.get(k))
    return told


STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1f; --paper: #fdfdfc; --dim: #5d646c;
  --line: #d9dce0; --soft: #f1f2f4; --yes: #1f6f43; --no: #9a3412; --open: #6b5b1e;
  --mark: #ffe58a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #16181b; --dim: #9aa2ab;
  --line: #353a40; --soft: #212429; --yes: #6fcf97; --no: #f2a074; --open: #d8c36a;
  --mark: #6b5410; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: .2rem 0 1.2rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
h4 { font-size: .8rem; margin: 0 0 .2rem; color: var(--dim); font-weight: 600; }
p, ul, dl { margin: .6rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.dim { color: var(--dim); font-size: .85rem; margin: .2rem 0; }
.verdict { font-size: 1.1rem; padding: .8rem 1rem; background: var(--soft);
  border-left: 5px solid var(--open); border-radius: 3px; }
.verdict.yes { border-color: var(--yes); }
.verdict.no { border-color: var(--no); }
.warn { padding: .6rem 1rem; border: 1px solid var(--no); border-radius: 3px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .8rem 0;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); padding-bottom: .3rem; }
th, td { padding: .32rem .6rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
th { color: var(--dim); font-weight: 600; white-space: normal; vertical-align: bottom; }
.n { text-align: right; }
td.w { white-space: normal; min-width: 7.5rem; max-width: 26rem; }
.figures { columns: 28rem auto; column-gap: 1.6rem; }
figure { margin: 0; padding: .4rem 0 1rem; max-width: 100%; break-inside: avoid; }
figure.wide { column-span: all; }
figcaption { font-size: .85rem; color: var(--dim); margin-top: .3rem; }
img { display: block; background: #fff; border-radius: 4px; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
article { border: 1px solid var(--line); border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
article h3 { margin: .2rem 0 .6rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  gap: .6rem 1.6rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin-top: 0; }
mark { background: var(--mark); color: inherit; border-radius: 2px; padding: 0 .1em; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1.2rem; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; }
code { overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: 4px; overflow-x: auto; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .6rem; }
  h1 { font-size: 1.4rem; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --dim: #444;
  --line: #bbb; --soft: #f4f4f4; --mark: #e8e8e8; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  .figures { columns: 17rem auto; }
  figure, article, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  th, td { white-space: normal; padding: .2rem .4rem; } img { min-width: 0 !important; } }
"""
