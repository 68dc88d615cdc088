"""The demo: the starter model talks about the Eiffel Tower beside its unsteered self.

It is steered by a contrastive direction, and by a feature of the starter SAE found by its label.
Three sets of texts play three parts, and no prompt plays two: sentences build the direction,
`choose` prompts pick feature, layer and dose from a grid run as one batch, `show` prompts are only
shown.
"""

import itertools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row, Sampling, record
from interp_steer.features.feature import feature
from interp_steer.features.screen import screen
from interp_steer.labels import import_files, search
from interp_steer.labels.registry import STARTER
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.file import read_prompts
from interp_steer.prompts.prompt import Prompt, chat
from interp_steer.report.plots import dose_response
from interp_steer.results.words import names
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import steer
from interp_steer.steering.intervention import Intervention, Vector
from interp_steer.steering.scale import Scale
from interp_steer.study.metrics import rep3, surprise
from interp_steer.util.console import progress, safe
from interp_steer.util.files import whole

TEXTS = Path(__file__).parents[1] / "data" / "demo_texts"
WORDS = ("Eiffel", "Paris", "France")
KINDS = ("contrast", "add", "clamp")
LAYERS = (11, 13, 15)
DOSES = (0.5, 0.6, 0.7)
FEATURES = 2  # the best-screened of those whose labels name a concept word
FEATURE_DOSES = (0.4, 0.5, 0.6)
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


@dataclass(frozen=True)
class Setting:
    """One way to steer: what (contrast, or a feature added or clamped), where and how strongly."""

    kind: str
    line: str
    dose: float
    steer: tuple[Intervention, ...]


def run(model: SteeringModel, out: Path) -> None:
    """Builds, chooses, shows; writes `demo.png` and `demo.json` into the folder `out`."""
    engine = Engine(model)
    positive, negative, for_choosing, for_showing = (
        read_prompts(TEXTS / f"{part}.txt") for part in ("positive", "negative", "choose", "show")
    )
    choose, show = ([chat(str(q)) for q in part] for part in (for_choosing, for_showing))
    eiffel = Contrast.measure(model, positive, negative).directions(name="eiffel")
    features = _features(model)
    scale = Scale.of(model, [model.encode(p) for p in choose])

    settings = [
        Setting(
            "contrast", f"contrast, block {layer}", dose, _steer("add", eiffel, dose, layer, scale)
        )
        for layer, dose in itertools.product(LAYERS, DOSES)
    ]
    settings += [
        Setting(
            operator,
            f"{row.name}, {operator}",
            dose,
            _steer(operator, row, dose, row.site.layer, scale),
        )
        for row, operator, dose in itertools.product(features, ("add", "clamp"), FEATURE_DOSES)
    ]
    what = f"trying {len(settings)} settings on {len(choose)} prompts"
    unsteered, *tried = _judged(engine, choose, [(), *(s.steer for s in settings)], TRIED, what)
    table = pd.DataFrame(
        {"kind": one.kind, "line": one.line, "dose": one.dose, **_averages(judged)}
        for one, judged in zip(settings, tried, strict=True)
    )
    # of each kind: most answers that work; then most that name the concept; then the gentlest
    ranked = table.sort_values(["works", "concept", "dose"], ascending=[False, False, True])
    best = ranked.groupby("kind", sort=False).head(1).index
    chosen = sorted((settings[i] for i in best), key=lambda one: KINDS.index(one.kind))
    plot = dose_response(
        table,
        {
            "concept": "answers that name the concept",
            "rep3": "rep3 (repeated 3-grams)",
            "surprise": "surprise (nats a token)",
        },
        _averages(unsteered),
        [(one.line, one.dose) for one in chosen],
        out / "demo.png",
    )

    what = f"answering {len(show)} new prompts"
    plain, *steered = _judged(engine, show, [(), *(one.steer for one in chosen)], SHOWN, what)
    for number, before in enumerate(plain):
        print(f"\n{number + 1}. {_question(before)}")
        print(_shown("unsteered", before))
        for one, answers in zip(chosen, steered, strict=True):
            print(_shown(one.kind, answers[number]))
    print("\nchosen on other prompts:")
    for one in chosen:
        print(f"  {one.kind:<9} {one.steer[0]}, dose {one.dose}")
    print(f"\n{'':<34}{'tokens':>7}{'rep3':>7}{'surprise':>10}  concept words")
    for number, before in enumerate(plain):
        print(_question(before)[:60])
        print(_measured("unsteered", before))
        for one, answers in zip(chosen, steered, strict=True):
            label = f"{one.kind}, block {one.steer[0].sites[0].layer}, a {one.steer[0].value:.1f}"
            print(_measured(label, answers[number]))
    print(
        f"\nof {len(show)} prompts, answers of 40 tokens or more that name {', '.join(WORDS[:-1])} "
        f"or {WORDS[-1]} where the unsteered\nanswer does not, with rep3 below 0.2 and surprise "
        "below 2.0:"
    )
    for one, answers in zip(chosen, steered, strict=True):
        works = sum(a.works and not b.concept for b, a in zip(plain, answers, strict=True))
        print(f"  {one.kind:<9} {works}")
    columns = zip(plain, *steered, strict=True)
    records = [record(j.result, scale) for column in columns for j in column]
    with whole(out / "demo.json") as part:
        part.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"plot and records: {plot}, {out / 'demo.json'}")


def _features(model: SteeringModel) -> list[Direction]:
    """Features of the starter SAE that fire on the concept's words, those most likely to steer."""
    with progress("loading the starter SAE", every=5):
        from interp_steer.features.sae import Sae

        sae = Sae.load("starter", device=model.device)
    import_files([STARTER])
    found = search(" ".join(WORDS), [STARTER], limit=100)
    # a label begins with the words that the feature fires on; its example names many others
    hits = {hit.index: hit for hit in found if names(hit.label.split(" (promotes")[0], WORDS)}
    scored = sorted(screen(sae, model, list(hits)), key=lambda one: -one.output_score)
    print(f"{len(hits)} of {sae.d_sae} features fire on {', '.join(WORDS)}; by output score:")
    for one in scored[:5]:
        print(f"  {one.output_score:.4f}  {one.index:>5}  {safe(hits[one.index].label)[:80]}")
    return [feature(hits[one.index]) for one in scored[:FEATURES]]


def _steer(
    operator: str, vector: Vector, dose: float, layer: int, scale: Scale
) -> tuple[Intervention, ...]:
    one = steer(operator, vector, coefficient=f"{dose} dose", at=layer, on=SCOPE)
    return one.resolve(scale)


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
    rep3, nats = ("-" if v is None else f"{v:.2f}" for v in (judged.rep3, judged.surprise))
    return f"  {label:<32}{tokens:>7}{rep3:>7}{nats:>10}  {words}"


def _shown(label: str, judged: Judged) -> str:
    text = " ".join(safe(judged.result.text).split())
    return textwrap.fill(
        text, 96, initial_indent=f"   {label:>9} | ", subsequent_indent=" " * 12 + " | "
    )
