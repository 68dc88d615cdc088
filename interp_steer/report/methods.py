"""How a run was done, in words: what was chosen, measured and compared how, in what setting, and
what a reader should be careful about.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from interp_steer.errors import RequestError, RunError
from interp_steer.report.findings import ALPHA, Findings
from interp_steer.report.page import as_records
from interp_steer.results.declared import UNKNOWN, Declared
from interp_steer.util.files import read_text
from interp_steer.util.tensor_file import opened, parsed
from interp_steer.util.yaml_text import parse_yaml

PAPERS = {
    "studentised": "the wider of it and Student's t; Efron and Tibshirani 1993, ch. 12",
    "Newcombe": "Newcombe 1998, Statistics in Medicine 17, 2635",
    "Wilson": "Wilson 1927",
}


def careful(found: Findings) -> list[str]:
    """What to be careful about."""
    told, notes = found.manifest, list(found.notes)
    others = len(told["metrics"]) - 1
    if others > 0 and not found.claims.empty:
        what = "decides" if told["cells"] == 1 else "chose and decides"
        notes.append(
            f"Only {told['choose_by']} {what}. The intervals of other metrics hold each "
            "on its own, not all at once."
        )
    if not found.claims.empty and (missing := found.claims["missing"].sum()):
        notes.append(
            f"{int(missing)} values are missing. They are left out of means and intervals; the "
            "column “missing as 0” is the mean if each had been 0."
        )
    if found.verdict.p is not None:
        notes += _reach(found)
    if "concept" in told["metrics"] or "mention" in told["metrics"]:
        words = ", ".join(told["concept"])
        notes.append(
            f"Naming a word is not being about it: an answer counts if it holds one of {words} "
            "that its prompt does not. Read the sample texts."
        )
    if told["dtype"] != "float32":
        notes.append(
            f"In {told['dtype']} another machine, thread count or batch writes other "
            "texts now and then; means hold, single texts may not."
        )
    return [*notes, "One model, and prompts of one origin: nothing is said about others."]


def _reach(found: Findings) -> list[str]:
    """What the verdict's p could be at best."""
    told = found.manifest
    nulls = found.p[found.p["metric"] == told["choose_by"]].set_index("control")["n"]
    chance, cells = int(told["selected"]), int(told["cells"])
    notes = []
    if not chance and cells > 1:
        notes.append(
            "No random direction went through the choice itself, so p is multiplied by the "
            "number of settings, which is more than is needed."
        )
    times = 1 if chance else cells
    least = min(1.0, times / (1 + (chance or int(nulls.get("random", 0)))))
    if least > ALPHA:
        notes.append(
            f"With so few random directions p cannot fall below {least:.3f}: whatever the "
            "effect, nothing could be declared."
        )
    return notes


def paragraphs(found: Findings, level: float) -> list[str]:
    """How it was chosen, measured and compared."""
    parts = (_choosing(found), _measuring(found, level), _comparing(found))
    return [" ".join(sentences) for sentences in parts if sentences]


def metrics(found: Findings) -> list[tuple[str, str]]:
    """(name, what it is) of every metric."""
    better = {"high": "Higher is better.", "low": "Lower is better."}
    return [
        (name, f"{one.about} {better.get(one.better, 'Which way is better is not known.')}")
        for name, one in found.measures.items()
    ]


def _choosing(found: Findings) -> list[str]:
    """What is chosen by what, on how many prompts, and shown on how many others: the design, and
    how far it has come.
    """
    told = found.manifest
    prompts, cells = told["prompts"], int(told["cells"])
    said = []
    if prompts["build"]:
        said.append(
            f"The directions were made from {prompts['build']} prompts that occur nowhere else."
        )
    were, was = ("were", "was") if found.state == "chosen" else ("are to be", "is to be")
    if cells == 1:
        said.append(
            "There is one setting, fixed beforehand; nothing is chosen. It and its controls "
            f"{were} run on {prompts['prove']} held-out prompts, from which all claims come."
        )
    elif not prompts["choose"]:
        said.append(
            f"The grid's {cells} settings are run on {prompts['prove']} prompts. No prompts were "
            "set apart to choose one, so none is claimed."
        )
    else:
        ran = "are to be" if found.state in ("begun", "unfinished") else "were"
        limits = " and ".join(
            f"mean {name} of {_side(found.measures[name])} {limit:g}"
            for name, limit in told["limits"].items()
        )
        said.append(
            f"{cells} settings {ran} run on {prompts['choose']} selection prompts, and of those "
            + (f"with {limits} " if limits else "")
            + f"the one with the best mean effect in {told['choose_by']} {was} chosen, a missing "
            "value counting as no effect. Of equal ones the gentlest wins, then the first. That "
            f"setting, its controls and nothing else {were} run on {prompts['prove']} held-out "
            "prompts, from which all claims come."
        )
        if found.state == "beyond":
            said.append("No setting stayed within the limits, so none was chosen.")
    if prompts["neutral"]:
        said.append(f"On {prompts['neutral']} neutral texts it is measured what steering damages.")
    for name, count in told.get("capability", {}).items():
        said.append(
            f"{count} multiple-choice questions ({name}) were asked as MMLU is (Hendrycks et al. "
            "2021): a choice is its letter, and the likeliest letter is the answer."
        )
    return said


def _side(one: Declared) -> str:
    if one.better == UNKNOWN:
        return "no worse than"
    return "at least" if one.better == "high" else "at most"


def _measuring(found: Findings, level: float) -> list[str]:
    """What an effect is, what missing means, which intervals there are."""
    seeds = len(found.manifest["seeds"])
    said = [
        "An effect is a difference from the unsteered answer to the same prompt with the same "
        "seed. The prompt is the unit"
        + (f"; its {seeds} seeds are averaged first." if seeds > 1 else "."),
        "A value that cannot be had, such as the repetition in an answer of two tokens, is "
        "missing: not zero, and left out of means.",
        _intervals(found, level),
        "The p of no effect is two-sided and paired over prompts: McNemar's exact test for "
        "rates of one answer a prompt, sign flips for all else; it knows nothing of controls."
        if not found.claims.empty and found.claims["p"].notna().any()
        else "",
    ]
    if not found.grid.empty and found.grid["low"].notna().any():
        ran = "" if whole_grid(found) else " that were run so far"
        said.append(
            f"The grid's intervals hold at {level:.0%} for all settings of a metric{ran} at once "
            "(max-t; Westfall and Young 1993, Romano and Wolf 2005); the set of settings not "
            "excluded from being best holds the best of them at that level (Hsu 1984)."
        )
    if not found.slopes.empty:
        said.append(
            "Steerability is the least-squares slope of each prompt (Tan et al. 2024, arXiv "
            "2407.12404)."
        )
    return [one for one in said if one]


def whole_grid(found: Findings) -> bool:
    """Whether every cell has been run on some prompt."""
    return not found.grid.empty and found.grid["cell"].nunique() == int(found.manifest["cells"])


def _comparing(found: Findings) -> list[str]:
    """What p is, and how the choice among cells is accounted for."""
    if found.p.empty:
        return []
    said = [
        "p = (1 + null directions that do at least as well) / (1 + null directions that were run; "
        "one without a value counts as without effect) (Davison "
        f"and Hinkley 1997, 4.2), one-sided by {found.manifest['choose_by']}, of |effect| by the "
        "others."
    ]
    if found.verdict.p is not None:
        said.append(f"The verdict's p accounts for the choice: {found.verdict.how}.")
    return said


def _intervals(found: Findings, level: float) -> str:
    """Which interval was formed how, as the claims' table has it."""
    named: dict[str, list[str]] = {}
    for r in as_records(found.claims):
        if r["role"] == "chosen":
            named.setdefault(str(r["method"]), []).append(str(r["metric"]))
    told = "; ".join(f"{', '.join(names)}: {_cited(how)}" for how, names in named.items())
    return f"Intervals at {level:.0%} for effects, by metric: {told}." if told else ""


def setting(folder: Path, told: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What was run on what: names and values."""
    spec = _spec(folder / "study.yaml")
    sampling = told["sampling"]
    how = (
        "the most likely token"
        if not sampling["temperature"]
        else f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, "
        f"top-k {sampling['top_k']}"
    )
    machine = told["machine"]
    origins = _origins(folder / "directions")
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
        *((n, spec[n]) for n in ("lines", "method") if spec.get(n)),
        *((n, repr(spec[n])) for n in ("system",) if spec.get(n) is not None),
        *((f"prompt {name}", text) for name, text in told.get("prompting", {}).items()),
        ("settings", told["cells"]),
        ("prompts", ", ".join(f"{count} {name}" for name, count in told["prompts"].items())),
        ("concept", told["concept"]),
        ("metrics", [f"{n} (decides)" if n == told["choose_by"] else n for n in told["metrics"]]),
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
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in pairs
        if value not in ([], "", None)
    ]


def _cited(method: str) -> str:
    """How an interval was formed, with the paper."""
    if method.startswith("fewer"):
        return f"none ({method})"
    papers = [paper for name, paper in PAPERS.items() if name in method]
    return f"{method} ({papers[0]})" if papers else method


def _spec(path: Path) -> Mapping[str, Any]:
    """The study's declaration as far as it is text and numbers; nothing where the file was taken
    away or damaged.
    """
    if path.is_file():
        with suppress(RequestError):
            read = parse_yaml(read_text(path), path)
            told = read.items() if isinstance(read, dict) else ()
            return {name: value for name, value in told if _is_flat(value)}
    return {}


def _is_flat(value: object) -> bool:
    """Whether a value is text or a number, or a list of such: a bomb of aliases is none."""
    some = value if isinstance(value, list) else [value]
    return all(isinstance(one, (str, int, float)) for one in some)


def _origins(folder: Path) -> dict[str, str]:
    """Where each saved direction came from, in a line, from its file's metadata."""
    told = {}
    for path in sorted(folder.glob("*.safetensors")):
        with (
            suppress(RunError, IndexError),
            opened(path, "np") as file,
        ):  # what is damaged says nothing
            about = file.metadata() or {}
            of_set = "members" in about
            source = parsed(about, "members")[0]["source"] if of_set else parsed(about, "source")
            keep = ("release", "sae_id", "index", "label", "method", "prompts", "position", "model")
            told[path.stem] = ", ".join(f"{k} {source[k]}" for k in keep if source.get(k))
    return told
