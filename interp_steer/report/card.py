"""The page of a card: does a direction steer, how strongly, at what damage?"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.report import marks, plots
from interp_steer.report.findings import Findings
from interp_steer.report.marks import RED, TEXT
from interp_steer.report.page import Picture, Table, pieces, plain, render, signed
from interp_steer.util.files import explained, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EFFECT = "concept_logprob"
Told = Mapping[str, Any]


def write(told: Told, findings: Findings | None, path: str | Path) -> Path:
    """A card as a page.

    Args:
        told: `Card.as_json()`.
        findings: of the card; None where nothing is declared.

    Raises:
        RunError: the page cannot be written.
    """
    path = Path(path)
    with explained(path), whole(path) as part:
        part.write_text(render("card.html", **_parts(told, findings)), encoding="utf-8")
    return path


def brief(told: Told, findings: Findings | None) -> str:
    """A card in a notebook."""
    return render("card_brief.html", **_parts(told, findings, "png"))


def _parts(told: Told, findings: Findings | None, kind: str = "svg") -> dict[str, Any]:
    """What the templates show."""
    steers = told["verdict"]["steers"] if told["verdict"] else None
    pictures = []
    if told["curve"]:
        alt = "Dose curve on held-out prompts, beside random directions (grey)"
        pictures.append(Picture.of(curve(told), alt, kind))
    if findings is not None and len(findings.nulls) and len(findings.claims):
        drawn = plots.controls(findings.nulls, findings.claims, EFFECT, findings.p)
        alt = "Effect at the operating point, beside random directions that chose their own dose"
        pictures.append(Picture.of(drawn, alt, kind))
    return {
        "title": told["title"],
        "told": told,
        "verdict": told["verdict"]["text"] if told["verdict"] else UNSAID,
        "kind": {True: "yes", False: "no", None: "open"}[steers],
        "about": _about(told),
        "contexts": told["contexts"],
        "doses": _doses(told),
        "pictures": pictures,
        "said": _said(told),
        "texts": [
            {
                "prompt": one["prompt"],
                "answers": [
                    (name, pieces(text, told["words"]))
                    for name, text in one.items()
                    if name != "prompt"
                ],
            }
            for one in told["texts"]
        ],
        "notes": findings.notes if findings is not None else (),
    }


UNSAID = (
    "Nothing is declared, as it is not said what the direction should bring about: give words "
    "(--concept)."
)


def _about(told: Told) -> Table:
    """What the direction is."""
    fit, scores, source = told["fit"], told["screened"], told["source"]
    rows: list[tuple[object, object]] = [
        *([("label", told["label"])] if told["label"] else []),
        ("direction", told["direction"]),
        ("hook point", told["hook_point"]),
        ("model", told["model"]),
        ("words", ", ".join(told["words"]) or "none"),
        ("promotes", " ".join(token.strip() for token in scores["promoted"][:12])),
        ("output score", f"{scores['output_score']:.3f}; from 0.01 on a feature may steer"),
    ]
    if fit:
        variance = f"{fit['explained_variance']:.3f}"
        rows.append(("SAE fit", f"explained variance {variance}, L0 {fit['l0']:.0f}"))
    rows += [(name, value) for name, value in source.items() if name != "label"]
    return Table(("", ""), rows, words=2)


def _doses(told: Told) -> Table | None:
    """The dose curve as numbers."""
    rows = pd.DataFrame(told["curve"])
    if rows.empty:
        return None
    mine = rows["who"] == "this"
    others = rows[~mine].groupby("dose")[["effect", "kl"]].mean()
    lines = [
        (
            f"{r['dose']:g}" + (" (operating point)" if r["dose"] == told["dose"] else ""),
            signed(r["effect"]), plain(r["kl"]),
            signed(others.loc[r["dose"], "effect"]), plain(others.loc[r["dose"], "kl"]),
        )
        for r in rows[mine].to_dict("records")
    ]  # fmt: skip
    heads = ("dose", "effect, nats", "KL, nats a token", "random: effect", "random: KL")
    return Table(heads, lines, caption="Doses on held-out prompts")


def _said(told: Told) -> Table | None:
    """What each arm says."""
    if not told["said"]:
        return None
    heads = [name for name in told["said"][0] if name != "arm"]
    rows = [(r["arm"], *(plain(r[head]) for head in heads)) for r in told["said"]]
    return Table(("", *heads), rows, caption="Answers to the held-out prompts, means")


def curve(told: Told) -> "Figure":
    """Effect and damage against dose; random directions in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    rows = pd.DataFrame(told["curve"])
    for axis, name, label in zip(
        figure.subplots(1, 2),
        ("effect", "kl"),
        ("words' ln p, less unsteered", "KL, nats a token"),
        strict=True,
    ):
        for who, some in rows.groupby("who", sort=False):
            own = who == "this"
            look = {"color": RED, "lw": 2, "zorder": 3} if own else {"color": "0.65", "lw": 1}
            x, y = [0, *some["dose"]], [0, *some[name]]
            axis.plot(x, y, marker="o", ms=4 if own else 2.5, **look)
        if told["dose"] is not None:
            axis.axvline(told["dose"], color="0.35", ls=(0, (6, 3)), lw=1)
        axis.set_xlabel("dose, share of the median residual norm", fontsize=TEXT)
        axis.set_ylabel(label, fontsize=TEXT)
        marks.bare(axis)
    return marks.literal(figure)
