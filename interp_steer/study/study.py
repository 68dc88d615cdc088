"""A study: a declared grid of steered rows with its controls.

    study = Study(
        choose=["Describe a walk.", ...], prove=["Tell me about your day.", ...],
        directions={"eiffel": contrast}, sites=["each 10-16"],
        coefficients=["0.4 dose", "0.6 dose"], concept=["Eiffel", "Paris"],
    )
    run = study.run(model, "runs/eiffel")
    run.findings()

Prompts play one part each. Those that built a direction are `build`; the whole grid runs on
`choose` prompts, which pick one cell; that cell, its controls and nothing else run on `prove`
prompts, from which alone a claim is made.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError, nearest
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from interp_steer.results.declared import NEEDS
from interp_steer.results.roles import Setting
from interp_steer.results.words import middle
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import Reader, parse, steer
from interp_steer.steering.intervention import OPERATORS, Intervention, Vector, resolve, sites_text
from interp_steer.steering.scale import Scale
from interp_steer.study import metrics as measures
from interp_steer.study.cell import Cell, Controls, Planned
from interp_steer.study.chunk import load_modules
from interp_steer.study.parts import PARTS, check_apart
from interp_steer.util.typed import expect

if TYPE_CHECKING:
    from interp_steer.report.run import Run


def _tuple(given: object) -> tuple[Any, ...]:
    """One value, or several, as several."""
    return tuple(given) if isinstance(given, (list, tuple, range)) else (given,)


@dataclass(frozen=True)
class Study:
    """A declared grid: directions x operators x sites x coefficients x scopes, x prompts x seeds.

    Attributes:
        choose, prove: prompts (texts, chats, mappings or `Item`s) that pick a cell, and those that
            test it. One list may be split with `split_items`.
        directions: by name: a Direction, a DirectionSet, or a Contrast, which brings its
            shuffled-label controls with it.
        sites: a layer, or sites as text such as "14-16", which are steered together; "each 10-20"
            stands for a cell a layer.
        coefficients: numbers, or text with a unit: "0.4 dose", "2 max", "2 raw".
        operators, scopes, seeds: as in an intervention and a row.
        lines: whole lines of interventions, each a cell of its own.
        metrics: names, see `metrics.METRICS`.
        choose_by: the metric that picks the cell, by its mean difference from the unsteered
            answers; default the first.
        limits: metric -> the worst mean on `choose` prompts that a cell may have to be picked.
        concept: words, for `concept` and `mention`.
        neutral: texts whose loss says what steering damages: given continuations, or the second
            half of a plain text. Where a token stands across the boundary, it is continuation.
        build: the prompts that the directions were made from, to make sure that they do not come
            back.
        method: how a Contrast makes its direction.
        controls: how many of each.
        sampling: how tokens are chosen.
        as_chat, system: whether plain prompts become a chat (None: if the model is one), and its
            system prompt.
        modules: Python files that define further metrics.
        chunk: rows that are run together. Fixed, because neighbours decide the last bits.
        question: what is asked, for the report.
    """

    choose: Sequence[Any]
    prove: Sequence[Any]
    directions: Mapping[str, Any]
    sites: Any = ()
    coefficients: Any = ()
    operators: Any = ("add",)
    scopes: Any = ("all",)
    seeds: Any = (0,)
    lines: Any = ()
    metrics: Any = ()
    choose_by: str = ""
    limits: Mapping[str, Any] = field(default_factory=dict)
    concept: Any = ()
    neutral: Sequence[Any] = ()
    build: Sequence[Any] = ()
    method: str = "mean-difference"
    controls: Controls = field(default_factory=Controls)
    sampling: Sampling = field(default_factory=Sampling)
    as_chat: bool | None = None
    system: Any = None
    modules: Any = ()
    chunk: int = 128
    question: str = ""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("modules", tuple(str(Path(one).resolve()) for one in _tuple(self.modules)))
        load_modules(self.modules)
        for name in ("choose", "prove", "neutral", "build"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise RequestError(f"{name} is one text, expected a list of prompts")
            items = tuple(Item.of(one) for one in given)
            put(name, tuple(map(_halved, items)) if name == "neutral" else items)
        for name in ("sites", "coefficients", "operators", "scopes", "seeds", "lines", "concept"):
            put(name, _tuple(getattr(self, name)))
        asked = _tuple(self.metrics) or (
            *(("concept",) if self.concept else ()),
            "rep3",
            "surprise",
            "length",
        )
        put("metrics", asked)
        put("choose_by", self.choose_by or asked[0])
        put("sites", tuple(site for one in self.sites for site in _each(one)))
        put("coefficients", tuple(_level(one) for one in self.coefficients))
        self._check()

    def _check(self) -> None:
        if self.as_chat is not None:
            expect("as_chat", self.as_chat, "true or false")
        for name in ("question", "method"):
            expect(name, getattr(self, name), "text")
        if not self.sites and not self.lines:
            raise RequestError("the study has no sites")
        for name in ("sites", "coefficients", "operators", "scopes", "seeds", "lines", "metrics"):
            values = getattr(self, name)
            if twice := [v for i, v in enumerate(values) if v in values[:i]]:
                raise RequestError(f"{name} hold {twice[0]!r} twice")
        if not isinstance(self.system, (str, type(None))):
            raise RequestError(f"system is {self.system!r}, expected text")
        if not self.prove:
            raise RequestError("the study has no prompts to prove with")
        if not self.directions:
            raise RequestError("the study has no directions")
        if any(not str(one).strip() for one in self.lines):
            raise RequestError("a line of interventions is empty")
        for operator in self.operators:
            if operator not in OPERATORS:
                raise RequestError(f"unknown operator {operator!r}{nearest(operator, OPERATORS)}")
            if OPERATORS[operator][0] > 1:
                raise RequestError(
                    f"{operator} takes two directions; give it as a line: "
                    f"lines: ['{operator}(a, b, 30 deg) at 12']"
                )
            if OPERATORS[operator][1] and not self.coefficients and self.sites:
                raise RequestError(f"{operator} needs coefficients, and the study has none")
        for scope in self.scopes:
            Reader(str(scope)).only(Reader.scope)
        if self.sites and not self.operators:
            raise RequestError("the study has no operators")
        if not self.seeds:
            raise RequestError("the study has no seeds")
        expect("seeds", list(self.seeds), "a whole number", several=True)
        if type(self.chunk) is not int or self.chunk < 1:
            raise RequestError(f"chunk is {self.chunk!r}, expected at least 1")
        for word in self.concept:
            if not isinstance(word, str) or not word.strip():
                raise RequestError(f"concept holds {word!r}, expected words")
        for name, limit in self.limits.items():
            expect(f"the limit of {name}", limit, "a number")
        for name in (*self.metrics, self.choose_by, *self.limits):
            measures.find(name)
        for name in (self.choose_by, *self.limits):
            if name not in self.metrics:
                raise RequestError(f"{name!r} decides but is not among the metrics")
        for name in self.metrics:
            metric = measures.METRICS[name]
            if name in ("concept", "mention") and not self.concept:
                raise RequestError(f"{name} needs the study's `concept`: words to look for")
            if not any(metric.applies(item) for item in (*self.prove, *self.neutral)):
                raise RequestError(f"{name} needs {NEEDS[metric.needs]}; prove has none")
        decides = measures.METRICS[self.choose_by]
        for part in ("choose", "prove"):
            items = getattr(self, part)
            if items and not any(decides.applies(item) for item in items):
                raise RequestError(
                    f"{self.choose_by} needs {NEEDS[decides.needs]}; {part} has none"
                )
        for name, given in self.directions.items():
            if not isinstance(given, (Direction, DirectionSet, Contrast)):
                raise RequestError(
                    f"direction {name!r} is a {type(given).__name__}, expected a Direction, a "
                    "DirectionSet or a Contrast"
                )
        check_apart({name: getattr(self, name) for name in PARTS}, self.directions)

    # --- what is run ----------------------------------------------------------------------------

    @cached_property
    def vectors(self) -> dict[str, Vector]:
        """The directions, by name."""
        return {
            name: given.directions(self.method, name)
            if isinstance(given, Contrast)
            else given.named(name)
            for name, given in self.directions.items()
        }

    @property
    def generates(self) -> bool:
        """Whether steered text is generated."""
        return any(measures.METRICS[name].needs == "text" for name in self.metrics)

    @property
    def selected(self) -> int:
        """Null directions that go through the choice."""
        if len(self.settings) == 1 or not self.choose:
            return 0
        if self.controls.selected is not None:
            return self.controls.selected
        return 0 if self.generates else self.controls.random

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """(direction, operator, site, level, scope) of every cell of the grid."""
        crossed = [
            (name, operator, site, level if OPERATORS[operator][1] else "", scope)
            for name, operator, site, level, scope in itertools.product(
                self.directions, self.operators, self.sites, self.coefficients or ("",), self.scopes
            )
        ]
        lines = [(str(line), "", "", "", "") for line in self.lines]
        return tuple(dict.fromkeys([*crossed, *lines]))

    def bound(self, model: SteeringModel) -> "Study":
        """The study with its plain prompts as chats where the model is one."""
        as_chat = model.is_chat if self.as_chat is None else self.as_chat

        def said(item: Item) -> Item:
            if not as_chat or not isinstance(item.prompt, str) or item.continuation is not None:
                return item
            other = item.corrupted
            if isinstance(other, str):
                other = chat(other, self.system)
            return replace(item, prompt=chat(item.prompt, self.system), corrupted=other)

        def parted(item: Item) -> Item:
            if item.continuation is None or not isinstance(item.prompt, str):
                return item
            prompt, rest = model.parted(item.prompt, item.continuation)
            return replace(item, prompt=prompt, continuation=rest)

        parts: dict[str, Any] = {
            n: [said(i) for i in getattr(self, n)] for n in ("choose", "prove", "neutral")
        }
        parts["neutral"] = [parted(item) for item in parts["neutral"]]
        return replace(self, **parts, as_chat=False)

    def items(self) -> Iterator[tuple[str, Item]]:
        """(split, item) of everything that is run."""
        for split in ("choose", "prove", "neutral"):
            for item in getattr(self, split):
                yield split, item

    def scale(self, model: SteeringModel) -> Scale:
        """The unit of dose: measured on `choose` prompts, or on `prove` where nothing is chosen."""
        items = self.choose or self.prove
        return Scale.of(model, [model.encode(item.prompt) for item in items])

    def cell(
        self,
        setting: Setting,
        scale: Scale,
        role: str = "grid",
        vectors: Mapping[str, Vector] | None = None,
        null: int | None = None,
    ) -> Cell:
        """The cell of a setting, with its own directions or with others in their place."""
        known = vectors or self.vectors
        steps: list[Intervention] = []
        for one in self.steps(setting):
            # a multiple of the direction's own length stays that length under another direction
            own = one.resolve(scale) if one.unit == "raw" else (one,)
            steps += [_with(part, lambda v: known.get(v.name, v)) for part in own]
        return Cell(role, *setting, resolve(steps, scale), null)

    def steps(self, setting: Setting) -> tuple[Intervention, ...]:
        """The interventions of a setting as they are declared."""
        name, operator, site, level, scope = setting
        if not operator:
            return parse(name, self.vectors)
        vector = self.vectors[name]
        return (steer(operator, vector, coefficient=level or 0.0, at=site, on=scope),)

    def grid(self, scale: Scale) -> list[Cell]:
        """Every cell of the grid."""
        return [self.cell(setting, scale) for setting in self.settings]

    def null_vectors(self, number: int) -> dict[str, Vector]:
        """Random directions in place of all of the study's."""
        seed = self.controls.seed * 100_003 + number
        drawn = {name: vector.random(seed) for name, vector in self.vectors.items()}
        return {name: one.named(f"{name}-random{number}") for name, one in drawn.items()}

    def shuffled(self, contrasts: Mapping[str, Contrast], number: int) -> dict[str, Vector]:
        """Directions from shuffled labels in place of contrastive ones."""
        seed = self.controls.seed * 100_003 + number
        return {
            name: contrast.shuffled(seed).directions(self.method, f"{name}-shuffled{number}")
            for name, contrast in contrasts.items()
        }

    def sampled(self, row: Planned) -> Row:
        """The row that a planned row runs."""
        return Row(row.item.prompt, row.cell.steer, self.sampling, row.seed)

    def notes(self) -> list[str]:
        """What a small study should say of itself."""
        told = []
        for name, least in (("random", 50), ("features", 50), ("shuffled", 50)):
            count = getattr(self.controls, name)
            if count < least:
                told.append(f"{count} {name} controls; {least} are usual")
        if len(self.settings) > 1 and self.choose and not self.selected:
            told.append(
                "no random directions go through the choice: p is Bonferroni's over "
                f"{len(self.settings)} cells (controls: {{selected: 50}} would run "
                f"{50 * len(self.settings) * len(self.choose) * len(self.seeds):,} rows more)"
            )
        cells = 1 if self.selected or not self.choose else len(self.settings)
        nulls = self.selected or self.controls.random
        if cells > 0.05 * (1 + nulls):
            among = "that choose for themselves" if self.selected else f"and {cells} cells"
            told.append(
                f"p cannot reach 0.05 with {nulls} random directions {among}: nothing will be "
                "declared to steer"
            )
        for part in ("choose", "prove"):
            if 0 < len(getattr(self, part)) < 10:
                told.append(f"{len(getattr(self, part))} prompts {part}: points without intervals")
        return told

    def run(self, model: SteeringModel, folder: Any, **options: Any) -> "Run":
        """Runs the study, or goes on with it, in a folder; see `execution.run`."""
        from interp_steer.study.execution import run

        return run(self, model, folder, **options)


def _halved(item: Item) -> Item:
    """A neutral text without a continuation: its second half continues the first."""
    if item.continuation is not None or not isinstance(item.prompt, str):
        return item
    cut = middle(item.prompt)
    if cut is None:
        raise RequestError(f"the neutral text {item.prompt[:60]!r} has no second half")
    return replace(item, prompt=item.prompt[:cut], continuation=item.prompt[cut:])


def _each(given: object) -> list[str]:
    """Sites of one cell as text, or of several for `each ...`."""
    text = str(given).strip()
    one, _, rest = text.partition(" ")
    if one != "each":
        return [sites_text(Reader(text).only(Reader.sites))]
    return [sites_text((site,)) for site in Reader(rest).only(Reader.sites)]


def _level(given: object) -> str:
    """A coefficient as text in one spelling."""
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        raise RequestError(f"{given!r} is no coefficient; expected such as 8.5 or '0.4 dose'")
    value, unit = Reader(str(given)).only(Reader.coefficient)
    return f"{value!r} {unit}".strip()


def _with(one: Intervention, change: Callable[[Vector], Vector]) -> Intervention:
    return replace(one, directions=tuple(change(vector) for vector in one.directions))
