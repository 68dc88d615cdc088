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
from interp_steer.report.brief import claims_table
from interp_steer.report.damage import against_damage
from interp_steer.report.findings import Findings, arm_text, setting_text
from interp_steer.report.heat import heat_map
from interp_steer.report.page import (
    Picture,
    Table,
    as_records,
    chance,
    pieces,
    plain,
    render,
    signed,
    span,
)
from interp_steer.report.texts import browser
from interp_steer.results.roles import ROLES, SETTING
from interp_steer.util.files import explained, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class _Report:
    """A report in the making."""

    def __init__(self, run: "Run", findings: Findings, level: float) -> None:
        self.run, self.findings, self.level = run, findings, level
        self.manifest: Mapping[str, Any] = run.manifest
        self.decides = str(self.manifest["choose_by"])

    def html(self) -> str:
        """The whole page."""
        manifest, findings = self.manifest, self.findings
        title = manifest["question"] or f"Steering {manifest['model']} with " + ", ".join(
            manifest["directions"]
        )
        others = [name for name in manifest["metrics"] if name != self.decides]
        mine, other_slopes = self._slopes()
        pictures = {name: made for name in others if (made := self._pictures(name))}
        chosen_from = manifest["prompts"]["choose"] and methods.whole_grid(findings)
        about_samples, samples = self._samples()
        grid_texts = browser(findings)
        if grid_texts and findings.state == "open":  # nothing is held out: these are all its texts
            about_samples = ""
        copy = shlex.quote(str(self.run.folder / "study.yaml"))
        return render(
            "page.html",
            title=title,
            date=manifest["written_at"][:10],
            verdict=findings.verdict.text,
            kind={True: "yes", False: "no", None: "open"}[findings.verdict.steers],
            missing=self._missing(),
            chosen=setting_text(findings.chosen) if findings.chosen else "",
            prompts=self._prompts(),
            decides=self.decides,
            claims=claims_table(findings.claims, self.decides),
            best_layers=", ".join(map(str, findings.best_layers)) if chosen_from else "",
            controls=self._controls([self.decides], "one-sided"),
            asking=self._asking(),
            capability=self._capability(),
            prompting=manifest.get("prompting", {}),
            slopes=mine,
            other_slopes=other_slopes,
            pictures=self._pictures(self.decides, True),
            other_pictures=pictures,
            browser=grid_texts,
            about_samples=about_samples,
            samples=samples,
            careful=methods.careful(findings),
            methods=methods.paragraphs(findings, self.level),
            metrics=methods.metrics(findings),
            setting=methods.setting(self.run.folder, manifest),
            other_controls=self._controls(others, "two-sided") if len(findings.p) else None,
            about_grid=self._about_grid(),
            grid=self._grid(),
            folder=self.run.folder,
            again=f"interp-steer study run {copy} --out NEW",
            modules=", ".join(manifest["modules"]),
            arguments=" ".join(manifest["arguments"]),
        )

    def _missing(self) -> str:
        """Planned rows that are not there, by the part that they play."""
        lost = Counter(one["role"] for one in self.run.plan if one["key"] not in self.run.rows)
        if lost:
            roles = ", ".join(f"{count} {role}" for role, count in lost.items())
            return (
                f"{lost.total()} of {len(self.run.plan)} planned rows are missing ({roles}): "
                "they failed or were not run yet. Run the study in the same folder again: it does "
                "what is missing, and says why a row fails."
            )
        if self.findings.state == "begun":
            return "Only unsteered rows were run so far. Run the study in this folder again."
        if self.findings.state == "waiting":
            return (
                "The grid was run; the chosen setting and its controls were not. Run the study in "
                "this folder again."
            )
        return ""

    # --- tables ---------------------------------------------------------------------------------

    def _prompts(self) -> str:
        """How many held-out prompts the chosen setting was run on."""
        table = self.findings.table
        rows = table[(table["role"] == "chosen") & (table["split"] == "prove")]
        ran, planned = rows["item"].nunique(), self.manifest["prompts"]["prove"]
        return str(planned) if ran == planned else f"{ran} of {planned}"

    def _controls(self, metrics: Sequence[str], sides: str) -> Table | None:
        """Controls against the chosen setting."""
        rows: list[Cells] = []
        for r in as_records(self.findings.claims):
            if r["metric"] in metrics and r["role"] != "chosen":
                ends = ("", signed(r["effect"]), span(r["low"], r["high"]), "")
                named = f"prompt {r['direction']}" if r["role"] == "prompted" else ROLES[r["role"]]
                rows.append((named, r["metric"], *ends))
        for r in as_records(self.findings.p):
            if r["metric"] in metrics:
                reach = f"{signed(r['lowest'])} to {signed(r['highest'])}"
                reach = "none" if pd.isna(r["mean"]) else reach
                ends = (str(int(r["n"])), signed(r["mean"]), reach, f"{r['p']:.3f}")
                rows.append((ROLES[r["control"]], r["metric"], *ends))
        if not rows:
            return None
        return Table(
            ("control", "metric", "n", "effect", "interval, or range", "p"),
            rows,
            caption=f"Controls. p, {sides}: how often null directions do at least as well",
            words=2,
        )

    def _asking(self) -> Table | None:
        """Steering against prompts that ask for it."""
        rows: list[Cells] = [
            (
                r["prompting"], r["metric"], plain(r["steered"]), plain(r["prompted"]),
                signed(r["difference"]), span(r["low"], r["high"]), chance(r["p"]), int(r["n"]),
                r["method"],
            )
            for r in as_records(self.findings.asking)
        ]  # fmt: skip
        heads = ("prompt", "metric", "steered", "prompted", "difference", "interval",
                 "p of no difference", "prompts", "method")  # fmt: skip
        caption = "The chosen setting less prompts that ask for it, paired over held-out prompts"
        return Table(heads, rows, caption=caption, words=2, last_words=True) if rows else None

    def _capability(self) -> Table | None:
        """Accuracy on sets of questions."""
        rows: list[Cells] = [
            (
                r["set"], arm_text(r), plain(r["unsteered"]), plain(r["accuracy"]),
                signed(r["difference"]), span(r["low"], r["high"]), int(r["lost"]),
                int(r["gained"]), chance(r["p"]), int(r["n"]),
            )
            for r in as_records(self.findings.capability)
        ]  # fmt: skip
        heads = ("questions", "setting", "unsteered", "accuracy", "difference", "interval", "lost",
                 "gained", "p of no difference", "n")  # fmt: skip
        caption = "Share of questions answered correctly, paired over questions (McNemar, Newcombe)"
        return Table(heads, rows, caption=caption, words=2) if rows else None

    def _slopes(self) -> tuple[Table | None, Table | None]:
        """Steerability: of the chosen setting's site, and of the others."""
        where = ("direction", "operator", "site", "scope")
        mine: list[Cells] = []
        others: list[Cells] = []
        chosen = self.findings.chosen
        for r in as_records(self.findings.slopes):
            line = (
                *(r[name] for name in where), r["metric"], f"{signed(r['slope'])} per {r['per']}",
                span(r["low"], r["high"]), f"{r['negative']:.0%}",
                span(r["negative_low"], r["negative_high"], ""), int(r["n"]),
            )  # fmt: skip
            is_mine = chosen is not None and all(str(r[n]) == chosen[n] for n in where)
            (mine if is_mine else others).append(line)
        heads = (*where, "metric", "slope", "interval", "negative", "interval", "prompts")
        caption = "Steerability: slope of each prompt, and the share of prompts that turn away"
        made = [Table(heads, rows, caption=caption, words=5) if rows else None
                for rows in (mine, others)]  # fmt: skip
        return made[0], made[1]

    def _about_grid(self) -> str:
        count = len(self.findings.grid)
        return f"The grid: {count} rows" + (f", the first {GRID_ROWS}" * (count > GRID_ROWS))

    def _grid(self) -> Table | None:
        """Every setting x metric."""
        heads = (*SETTING, "metric", "unsteered", "steered", "effect", "interval", "n",
                 "missing", "best", "within limits")  # fmt: skip
        rows = [
            (
                *(r[name] for name in SETTING), r["metric"], plain(r["unsteered"]),
                plain(r["mean"]), signed(r["effect"]), span(r["low"], r["high"]),
                int(r["n"]), int(r["missing"]), "not excluded" if r["best"] else "",
                "yes" if r["passes"] else "no",
            )
            for r in as_records(self.findings.grid)[:GRID_ROWS]
        ]  # fmt: skip
        return Table(heads, rows, words=6) if rows else None

    # --- pictures -------------------------------------------------------------------------------

    def _pictures(self, metric: str, full: bool = False) -> list[Picture]:
        findings, grid, chosen = self.findings, self.findings.grid, self.findings.chosen
        on = f"{self.manifest['prompts']['choose'] or self.manifest['prompts']['prove']} prompts"
        banded = not grid.empty and grid["low"].notna().any()
        bands = "Bands hold for the whole grid at once." if banded else "Points without intervals."
        wanted: list[tuple[str, Callable[[], Figure]]] = [
            (
                f"Effect of every setting on {metric}, on the {on} of the grid.",
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
        sign = findings.measures[metric].sign
        if metric == self.decides:
            wanted.append(
                (
                    f"Effect on {metric} against damage, on the {on} of the grid.",
                    lambda: against_damage(grid, metric, chosen, sign),
                )
            )
        if full or not findings.nulls.empty:
            wanted.append(
                (
                    f"The chosen setting and its controls by {metric}, on the held-out prompts.",
                    lambda: plots.controls(findings.nulls, findings.claims, metric, findings.p),
                )
            )
        drawn = []
        for caption, draw in wanted:
            with suppress(RequestError):  # a small run lacks what some pictures show
                drawn.append(Picture.of(draw(), caption))
        return drawn

    # --- texts ----------------------------------------------------------------------------------

    def _samples(self) -> tuple[str, list[Record]]:
        """(what is shown, the sample texts)."""
        every = self.findings.table
        here = every[every["split"] == "prove"]
        before = {(r["item"], r["seed"]): r for r in as_records(here[here["role"] == "unsteered"])}
        rows = [
            r
            for r in as_records(here[here["role"] == "chosen"])
            if isinstance(r.get("text"), str) and (r["item"], r["seed"]) in before
        ]
        if not rows:
            if self.findings.state != "chosen":
                return "No chosen setting was run, so there are no held-out texts to show.", []
            if every["text"].notna().any():
                return "No answer of the chosen setting stands beside an unsteered one.", []
            return "No text was generated: the metrics read given answers.", []
        draw = random.Random(SEED)
        draw.shuffle(rows)
        count = min(SHOWN, len(rows))
        tags: dict[int, list[str]] = {}
        for i in range(count):
            tags.setdefault(i, []).append("drawn at random" if len(rows) > SHOWN else "")
        sign = self.findings.measures[self.decides].sign
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
        samples = [
            self._sample(rows[i], before[rows[i]["item"], rows[i]["seed"]], names)
            for i, names in tags.items()
        ]
        about = (
            f"{count} of {len(rows)} answers of the chosen setting on the held-out prompts, drawn "
            f"at random (seed {SEED}), then the {ENDS} with the best and the {ENDS} with the worst "
            f"change in {self.decides}, of equal ones at random."
            if len(rows) > count
            else f"All {count} answers of the chosen setting on the held-out prompts."
        )
        about += " Beside each stands the unsteered answer to the same prompt."
        return about + " Words of the concept are marked." * bool(self.manifest["concept"]), samples

    def _sample(self, after: Record, before: Record, tags: Sequence[str]) -> Record:
        values = [
            f"{name} {before[name]:.3g} → {after[name]:.3g}"
            for name in self.manifest["metrics"]
            if pd.notna(after[name]) and pd.notna(before[name])
        ]
        seed = f", seed {after['seed']}" if len(self.manifest["seeds"]) > 1 else ""
        sample: Record = {
            "tags": ", ".join(filter(None, tags)) + seed,
            "prompt": after["prompt"],
            "numbers": "; ".join(values),
        }
        for name, row in (("before", before), ("after", after)):
            text = str(row["text"])
            sample[name] = pieces(text, self.manifest["concept"]) if text.strip() else []
            sample[f"{name}_finish"] = row.get("finish")
        return sample
