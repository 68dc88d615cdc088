"""What a study will cost, before anything runs."""

import itertools
import math
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from interp_steer.engine.admission import Admission
from interp_steer.engine.engine import LOGITS, Engine
from interp_steer.engine.memory import working
from interp_steer.engine.row import Row
from interp_steer.errors import RequestError
from interp_steer.features.matched import matched_features
from interp_steer.model.device import pick_device
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.file import numbered
from interp_steer.prompts.item import Item
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction
from interp_steer.steering.scale import Scale
from interp_steer.study import metrics as measures
from interp_steer.study.chunk import Chunk, measure
from interp_steer.study.design import Design
from interp_steer.study.measured import beginnings
from interp_steer.util.console import progress

BESIDE = 64 * 2**20  # bytes: the tokenizer, and what is small
ADDS = ("add", "add_norm_kept")
GENTLE = 0.02  # dose below which a coefficient was probably meant in another unit
NO_WEIGHTS = (
    "the model's weights are not here; the study's time, and its coefficients as a share of the "
    "residual norm, can only be told with them"
)
TIMED_ROWS, TIMED_TOKENS = 24, 8  # of the short run that a chunk's time is extrapolated from
ALWAYS = 10  # rows' worth of a chunk that is the same for one row and for many


def check(study: Design, model: SteeringModel) -> None:
    """Whether every cell fits the model, the longest prompt its context, every answer its prompt,
    and every feature has others to be matched with, before anything runs.

    Raises:
        RequestError: one that does not.
    """
    admission = Admission(model, computes=False)
    needs = {measures.find(name).needs for name in study.metrics}
    for part, items in study.splits.items():
        for number, item in enumerate(items, start=1):
            with numbered(part, number):
                model.encode(item.prompt)
                for text in _read(item, needs):
                    model.encode_after(item.prompt, text)
    if "concept_logprob" in study.metrics and not beginnings(model, study.concept):
        raise RequestError(
            f"no token begins one of {', '.join(study.concept)}, and concept_logprob reads tokens; "
            "give other words, or the metric concept"
        )
    longest = _longest(study, model)
    rewritten = [item for _, item in study.items() if not model.encode(item.prompt).located][:1]
    unit = Scale((1.0,) * 10_000)  # more layers than there are: the model says which is too many
    new = study.sampling.max_new_tokens if study.generates else 0
    for setting in study.settings:
        cell = study.cell(setting, unit)
        for item in (longest, *rewritten):
            admission.take(0, Row(item.prompt, cell.steer, study.sampling), (), new)
    for cell in study.prompted():
        assert cell.prompting is not None
        for number, item in enumerate(study.prove, start=1):
            with numbered(f"prompting {cell.direction}, prove", number):
                admission.take(0, Row(cell.prompting.put(item.prompt), (), study.sampling), (), new)
    if study.choose or len(study.settings) == 1:  # else nothing is proved
        for one in study.vectors.values():
            if isinstance(one, Direction) and one.is_feature:
                matched_features(one, study.controls.features)


def _read(item: Item, needs: Collection[str]) -> list[str]:
    """What metrics with these needs read after an item's prompt."""
    texts = {
        "pair": (item.positive, item.negative),
        "choices": item.choices,
        "continuation": (item.continuation,),
    }
    return [text for need in needs for text in texts.get(need, ()) if text is not None]


def forecast(study: Design) -> dict[str, int]:
    """Rows of each stage, at most."""
    seeds = len(study.seeds)
    items = len(study.choose) + len(study.prove) + len(study.neutral)
    able, arms = sum(map(len, study.capability.values())), len(study.prompting)
    controls = study.controls
    made = study.directions.values()
    contrastive = any(isinstance(one, Contrast) for one in made)
    features = sum(isinstance(one, Direction) and one.is_feature for one in made)
    cells = 1 + controls.flip + controls.wrong_layer + controls.random + study.selected
    cells += len(study.prompting) + controls.shuffled * contrastive + controls.features * features
    found = {"unsteered": items * seeds + able}
    if study.choose:
        found["grid"] = len(study.settings) * (1 + study.selected) * len(study.choose) * seeds
    elif len(study.settings) > 1:
        cells = len(study.settings) + len(study.prompting)
        return {**found, "grid": cells * (len(study.prove) * seeds + able)}
    found["prove"] = (cells * len(study.prove) + 2 * len(study.neutral)) * seeds
    found["prove"] += (1 + arms) * able
    return found


@dataclass(frozen=True)
class Plan:
    """Rows, chunks, memory and time of a study.

    Attributes:
        rows: of each stage, at most.
        chunks: of each stage.
        weights, memory: bytes: of the weights, and of everything at the peak.
        seconds: expected for all rows if none stops early; None if it was not measured, as it
            cannot be without weights.
        notes: what the study should say of itself.
    """

    rows: dict[str, int]
    chunks: dict[str, int]
    weights: int
    memory: int
    seconds: float | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        study: Design,
        model: SteeringModel,
        timed: bool = True,
        device: str | torch.device | None = None,
    ) -> "Plan":
        """Plans a study for a model, after checking that it fits.

        Args:
            model: one without weights will do for all but the time and the lengths of coefficients
                (see `SteeringModel.load`, `weights`).
            timed: whether to time a short run of a few rows, for `seconds`.
            device: where a model without weights is going to run; default as in loading.

        Raises:
            RequestError: a cell does not fit the model, or a prompt its context.
        """
        study = study.bound(model)
        check(study, model)
        rows = forecast(study)
        chunks = {name: math.ceil(n / study.chunk) for name, n in rows.items()}
        largest = min(study.chunk, max(rows.values()))
        weights = sum(w.numel() * w.element_size() for w in model.hf.parameters())
        seconds = _seconds(study, model, largest) if timed and model.has_weights else None
        if seconds is not None:
            seconds *= sum(rows.values()) / largest
        if model.has_weights:
            notes, place = gentle(study, model), model.device
        else:
            notes, place = [NO_WEIGHTS], pick_device(device, here=False)
        notes = [*study.notes(), *notes]
        memory = weights + _working(study, model, largest, place)
        return cls(rows, chunks, weights, memory, seconds, tuple(notes))


def gentle(study: Design, model: SteeringModel) -> list[str]:
    """What should be said of coefficients that hardly move the stream."""
    steps = [
        one
        for setting in study.settings
        for one in study.steps(setting)
        if one.operator in ADDS and one.unit in ("", "raw") and one.value
    ]
    scale = study.scale(model) if steps else None
    found: dict[str, float] = {}
    for one in steps:
        told = f"{one.value:g} {one.unit}".strip()
        doses = [abs(float(str(s["dose"] or 0))) for s in one.strengths(scale)]
        found[told] = max(found.get(told, 0.0), *doses)
    small = {told: dose for told, dose in found.items() if 0 < dose < GENTLE}
    if not small:
        return []
    shown = ", ".join(f"{told} is {dose:.2%}" for told, dose in small.items())
    return [
        f"coefficients below {GENTLE:.0%} of the median residual norm hardly steer ({shown} at "
        "most); '0.4 dose' is a share of that norm, '2 raw' a multiple of the direction's own "
        "length"
    ]


def _longest(study: Design, model: SteeringModel) -> Item:
    return max((i for _, i in study.items()), key=lambda i: len(model.encode(i.prompt).ids))


def _working(study: Design, model: SteeringModel, rows: int, device: torch.device) -> int:
    """Bytes beside the weights while so many rows decode, and while what they say is scored."""
    prompt = len(model.encode(_longest(study, model).prompt).ids)
    new = study.sampling.max_new_tokens
    scored = rows * working(model, prompt + new, 0, device)
    scored += 4 * 4 * min(LOGITS, rows * (new + 1) * model.d_vocab)  # logits, and copies of them
    return max(rows * working(model, prompt, prompt + new, device), scored) + BESIDE


def typical(
    study: Design,
    model: SteeringModel,
    rows: int,
    new: int | None = None,
    scale: Scale | None = None,
) -> Chunk:
    """A chunk of real cells, with made-up unsteered answers of full length.

    Args:
        new: tokens to generate; None for as many as the study's.
        scale: of the study, if it is known.
    """
    items = [item for split, item in study.items() if split == "choose"] or list(study.prove)
    scale = scale or study.scale(model)
    cells = [study.cell(setting, scale) for setting in study.settings[:rows]]
    pairs = [(item, cell) for item in items for cell in cells]
    pairs = (pairs * math.ceil(rows / len(pairs)))[:rows]
    sampling = replace(study.sampling, **({"max_new_tokens": new} if new else {}))
    return Chunk(
        keys=tuple(map(str, range(rows))),
        rows=tuple(Row(item.prompt, cell.steer, sampling, study.seeds[0]) for item, cell in pairs),
        items=tuple(item for item, _ in pairs),
        about=({},) * rows,
        unsteered=(tuple(range(sampling.max_new_tokens)),) * rows,
        metrics=tuple(study.metrics),
        concept=tuple(study.concept),
    )


def _seconds(study: Design, model: SteeringModel, rows: int) -> float:
    """Of one chunk of so many rows: from one short run of few rows, so a rough figure.

    What a token takes is the median over the steps of that run; what is left of it is reading and
    scoring. A chunk of r rows is taken to cost as much as r + `ALWAYS` rows one by one.
    """
    engine, new = Engine(model), study.sampling.max_new_tokens
    few, tokens = min(rows, TIMED_ROWS), min(new, TIMED_TOKENS)
    scale, steps = study.scale(model), list[float]()

    def run(size: int, length: int) -> float:
        chunk = typical(study, model, size, length, scale)
        steps[:] = []
        start = time.perf_counter()
        measure(engine, chunk, lambda *_: steps.append(time.perf_counter()))
        return time.perf_counter() - start

    with progress("timing a few rows", 2) as report:
        run(2, min(new, 2))  # a first run is slower
        report(1)
        took = run(few, tokens)
        report(2)
    each = statistics.median(b - a for a, b in itertools.pairwise(steps)) if steps[1:] else 0.0
    return (took + each * (new - tokens)) * (rows + ALWAYS) / (few + ALWAYS)
