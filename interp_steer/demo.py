"""The demo: the starter model talks about the Eiffel Tower beside its unsteered self.

Three sets of texts play three parts, and no prompt plays two: sentences build the direction,
`choose` prompts pick layer and dose from a grid run as one batch, `show` prompts are only shown.
"""

import itertools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from interp_steer.console import progress, safe
from interp_steer.contrast import Contrast, read_prompts
from interp_steer.engine import Engine
from interp_steer.files import whole
from interp_steer.intervention import Intervention, steer
from interp_steer.metrics import names, rep3, surprise
from interp_steer.model import SteeringModel
from interp_steer.plots import dose_response
from interp_steer.prompt import Prompt, chat
from interp_steer.row import Result, Row, Sampling, record
from interp_steer.scale import Scale

TEXTS = Path(__file__).with_name("demo_data")
WORDS = ("Eiffel", "Paris", "France")
LAYERS = (11, 13, 15, 17)
DOSES = (0.4, 0.5, 0.6, 0.7)
# The prompt alone is steered: the answer is then written by an unsteered model that has read a
# steered prompt. With scope "all" the doses that work are about half as large, and the answers less
# likely as text.
SCOPE = "prompt"
# Greedy, with the article's repetition penalty: without it a model of this size loops.
TRIED = Sampling(temperature=0, repetition_penalty=1.1, max_new_tokens=64)
SHOWN = Sampling(temperature=0, repetition_penalty=1.1, max_new_tokens=96)


@dataclass(frozen=True)
class Judged:
    """An answer and what the measures say of it."""

    result: Result
    concept: list[str]
    rep3: float | None
    surprise: float | None

    @property
    def works(self) -> bool:
        """Names the concept in 40 tokens or more, does not loop, stays likely as text."""
        return (
            len(self.result.token_ids) >= 40
            and bool(self.concept)
            and self.rep3 is not None
            and self.rep3 < 0.2
            and self.surprise is not None
            and self.surprise < 2.0
        )


def run(model: SteeringModel, out: Path) -> None:
    """Builds, chooses, shows; writes `demo.png` and `demo.json` into the folder `out`."""
    engine = Engine(model)
    positive, negative, for_choosing, for_showing = (
        read_prompts(TEXTS / f"{part}.txt") for part in ("positive", "negative", "choose", "show")
    )
    choose, show = ([chat(str(q)) for q in part] for part in (for_choosing, for_showing))
    eiffel = Contrast.measure(model, positive, negative).directions(name="eiffel")
    scale = Scale.of(model, [model.encode(p) for p in choose])

    grid = list(itertools.product(LAYERS, DOSES))
    cells = [
        steer("add", eiffel, coefficient=f"{dose} dose", at=layer, on=SCOPE).resolve(scale)
        for layer, dose in grid
    ]
    what = f"trying {len(grid)} settings on {len(choose)} prompts"
    unsteered, *tried = _judged(engine, choose, [(), *cells], TRIED, what)
    table = pd.DataFrame(
        {"layer": layer, "dose": dose, **_averages(judged)}
        for (layer, dose), judged in zip(grid, tried, strict=True)
    )
    # most answers that work; then most that name the concept; then the gentlest
    best = table.sort_values(["works", "concept", "dose"], ascending=[False, False, True]).iloc[0]
    layer, dose = int(best["layer"]), float(best["dose"])
    plot = dose_response(
        table,
        {
            "concept": "answers that name the concept",
            "rep3": "rep3 (repeated 3-grams)",
            "surprise": "surprise (nats a token)",
        },
        _averages(unsteered),
        (layer, dose),
        out / "demo.png",
    )

    chosen = cells[grid.index((layer, dose))]
    plain, steered = _judged(
        engine, show, [(), chosen], SHOWN, f"answering {len(show)} new prompts"
    )
    for number, (before, after) in enumerate(zip(plain, steered, strict=True), start=1):
        print(f"\n{number}. {_question(before)}")
        print(_shown("unsteered", before))
        print(_shown("steered", after))
    strength = chosen[0].value
    label = f"block {layer}, a {strength:.1f}, dose {dose}"
    print(f"\nchosen on other prompts: {chosen[0]}, dose {dose} of |x| {strength / dose:.1f}\n")
    print(f"{'':<34}{'tokens':>7}{'rep3':>7}{'surprise':>10}  concept words")
    for before, after in zip(plain, steered, strict=True):
        print(_question(before)[:60])
        print(_measured("unsteered", before))
        print(_measured(label, after))
    works = sum(a.works and not b.concept for b, a in zip(plain, steered, strict=True))
    print(
        f"\n{works} of {len(show)} prompts: 40 tokens or more, names {', '.join(WORDS[:-1])} or "
        f"{WORDS[-1]} where the unsteered answer does not, rep3 below 0.2, surprise below 2.0"
    )
    records = [record(j.result, scale) for pair in zip(plain, steered, strict=True) for j in pair]
    with whole(out / "demo.json") as part:
        part.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"plot and records: {plot}, {out / 'demo.json'}")


def _judged(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: Sequence[tuple[Intervention, ...]],
    sampling: Sampling,
    what: str,
) -> list[list[Judged]]:
    """Every prompt under every setting as one batch; a list of answers for each setting."""
    rows = [Row(p, setting, sampling) for setting in settings for p in prompts]
    with progress(what, len(rows)) as report:
        results = engine.generate(rows, report=report)
    with progress("reading the answers through the unsteered model", len(rows)) as report:
        surprises = surprise(engine, results, report)
    judged = [
        Judged(result, names(result.text, WORDS), rep3(result.token_ids), nats)
        for result, nats in zip(results, surprises, strict=True)
    ]
    return [judged[i : i + len(prompts)] for i in range(0, len(judged), len(prompts))]


def _averages(judged: Sequence[Judged]) -> dict[str, float]:
    """What a setting did, over its prompts."""

    def mean(values: Sequence[float | None]) -> float:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else float("nan")

    return {
        "works": mean([j.works for j in judged]),
        "concept": mean([bool(j.concept) for j in judged]),
        "rep3": mean([j.rep3 for j in judged]),
        "surprise": mean([j.surprise for j in judged]),
    }


def _question(judged: Judged) -> str:
    return safe(judged.result.row.prompt[-1][1])


def _measured(label: str, judged: Judged) -> str:
    tokens, words = len(judged.result.token_ids), ", ".join(judged.concept) or "-"
    return f"  {label:<32}{tokens:>7}{judged.rep3 or 0:>7.2f}{judged.surprise or 0:>10.2f}  {words}"


def _shown(label: str, judged: Judged) -> str:
    text = " ".join(safe(judged.result.text).split())
    return textwrap.fill(
        text, 96, initial_indent=f"   {label:>9} | ", subsequent_indent=" " * 12 + " | "
    )
