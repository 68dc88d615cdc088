"""The design of a study: a declared grid of steered rows with its controls.

Each prompt plays one part. `build` prompts made a direction. The whole grid runs on `choose`
prompts (selection), which pick one cell. That cell and its controls run on `prove` prompts (held
out); claims are made from these alone. Here a design is declared and checked, and it says which
cells follow from it; `stages` says which rows run when, and `execution` runs them.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError, nearest
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.item import Item, digest
from interp_steer.prompts.parts import check_apart, questions
from interp_steer.prompts.prompt import chat
from interp_steer.results.declared import NEEDS
from interp_steer.results.roles import CAPABILITY, Setting
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import Reader, parse, steer
from interp_steer.steering.intervention import OPERATORS, Intervention, Vector, resolve
from interp_steer.steering.scale import Scale
from interp_steer.study import metrics as measures
from interp_steer.study.cell import Cell, Controls, Planned, Prompting
from interp_steer.study.fields import apart, each, halved, lettered, level, listed, questioned
from interp_steer.study.modules import load_modules
from interp_steer.util.typed import expect

SPLITS = ("choose", "prove", "neutral")  # the parts whose prompts are run
PARTS = ("build", *SPLITS)
ACCURACY = "accuracy"  # the metric of `capability`


@dataclass(frozen=True)
class Design:
    """A declared grid: directions x operators x sites x coefficients x scopes, x prompts x seeds.

    Attributes:
        choose: prompts that pick a cell (selection): texts, chats, mappings or `Item`s.
        prove: other prompts, which test that cell (held out). `split_items` makes both of one list.
        directions: by name: a Direction, a DirectionSet, or a Contrast. Only a Contrast can have
            controls with shuffled labels.
        sites: a layer, or sites as text. "14-16" is one cell that steers three layers together;
            "each 10-20", or "{10-20}", is eleven cells of one layer each.
        coefficients: numbers, or text with a unit: "0.4 dose", "{1,2} max", "2 raw".
        operators, scopes, seeds: as in an intervention and a row.
        lines: whole lines of interventions, each a cell of its own; see `spread` for braces.
        metrics: names, see `metrics.METRICS`.
        choose_by: the metric that picks the cell, by its mean difference from the unsteered
            answers. Default: the first metric.
        limits: metric -> the worst mean on `choose` prompts with which a cell can be picked.
        concept: words, for `concept` and `mention`.
        neutral: texts whose loss tells what steering damages. The loss is of the continuation, or
            of a plain text's second half. A token that crosses the boundary counts to it.
        build: the prompts that the directions were made from. They are not run: a study that asks
            one of them again is refused.
        method: how a Contrast makes its direction.
        controls: how many of each.
        sampling: how tokens are chosen.
        as_chat: whether plain prompts become chats. None: if the model is a chat model.
        system: the system prompt of these chats.
        modules: Python files that define further metrics.
        chunk: rows that are run together. It is fixed, because the other rows of a batch decide a
            row's last bits.
        question: what the study asks, for the report.
        prompting: by name, what prompts say in place of steering: `{"system": "..."}`, `{"user":
            "..."}` or both; see `Prompting`. Each runs on the `prove` prompts beside the chosen
            cell: is steering better than asking?
        capability: by name, multiple-choice questions (`choices` and the `correct` one), asked as
            MMLU is; see `fields.lettered`. They are answered unsteered, by the chosen cell and
            by each prompt, or by the whole grid where nothing is chosen; `accuracy` tells.

    Raises:
        RequestError: the fields do not fit together. All is checked that needs no model.
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
    prompting: Mapping[str, Any] = field(default_factory=dict)
    capability: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("modules", tuple(str(Path(path).resolve()) for path in listed(self.modules)))
        load_modules(self.modules)
        for name in PARTS:
            given = getattr(self, name)
            if isinstance(given, str):
                raise RequestError(f"{name} is one text, expected a list of prompts")
            items = tuple(map(Item.of, given))
            put(name, tuple(map(halved, items)) if name == "neutral" else items)
        put("capability", {name: questioned(name, some) for name, some in self.capability.items()})
        for name in ("sites", "coefficients", "operators", "scopes", "seeds", "lines", "concept"):
            put(name, listed(getattr(self, name)))
        usual = (*(("concept",) if self.concept else ()), "rep3", "surprise", "length")
        told = listed(self.metrics) or usual
        asked = (ACCURACY,) if self.capability and ACCURACY not in told else ()
        put("metrics", (*told, *asked))
        put("choose_by", self.choose_by or self.metrics[0])
        for name in ("sites", "coefficients", "operators", "scopes", "lines"):
            put(name, tuple(part for given in getattr(self, name) for part in apart(given)))
        put("sites", tuple(site for given in self.sites for site in each(given)))
        put("coefficients", tuple(map(level, self.coefficients)))
        self._check_grid()
        for name, given in self.prompting.items():
            Prompting.of(name, given, self.directions)
        self._check_metrics()
        self._check_prompts()

    def _check_grid(self) -> None:
        if self.as_chat is not None:
            expect("as_chat", self.as_chat, "true or false")
        for name in ("question", "method"):
            expect(name, getattr(self, name), "text")
        for present, what in (
            (self.sites or self.lines, "sites"),
            (self.prove, "prompts to prove with"),
            (self.directions, "directions"),
            (self.operators or not self.sites, "operators"),
            (self.seeds, "seeds"),
        ):
            if not present:
                raise RequestError(f"the study has no {what}")
        for name in ("sites", "coefficients", "operators", "scopes", "seeds", "lines", "metrics"):
            values = getattr(self, name)
            if twice := [v for i, v in enumerate(values) if v in values[:i]]:
                raise RequestError(f"{name} hold {twice[0]!r} twice")
        if not isinstance(self.system, (str, type(None))):
            raise RequestError(f"system is {self.system!r}, expected text")
        if any(not str(line).strip() for line in self.lines):
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
        expect("seeds", list(self.seeds), "a whole number", several=True)
        if type(self.chunk) is not int or self.chunk < 1:
            raise RequestError(f"chunk is {self.chunk!r}, expected at least 1")

    def _check_metrics(self) -> None:
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
            if name in ("concept", "mention", "concept_logprob") and not self.concept:
                raise RequestError(f"{name} needs the study's `concept`: words to look for")
            if not any(metric.applies(item) for split, item in self.items() if split != "choose"):
                raise RequestError(f"{name} needs {NEEDS[metric.needs]}; prove has none")
        decides = measures.METRICS[self.choose_by]
        for part in ("choose", "prove"):
            items = getattr(self, part)
            if items and not any(decides.applies(item) for item in items):
                raise RequestError(
                    f"{self.choose_by} needs {NEEDS[decides.needs]}; {part} has none"
                )

    def _check_prompts(self) -> None:
        """Refuses a prompt in two parts, and one that a direction was made from."""
        for name, given in self.directions.items():
            if not isinstance(given, (Direction, DirectionSet, Contrast)):
                raise RequestError(
                    f"direction {name!r} is a {type(given).__name__}, expected a Direction, a "
                    "DirectionSet or a Contrast"
                )
        check_apart({part: getattr(self, part) for part in PARTS})
        run: dict[str, tuple[str, str]] = {}  # digest of a question -> its prompt and split
        for split, items in self.splits.items():
            for item in items:
                if items.count(item) > 1:
                    raise RequestError(f"{split} holds {item.text[:60]!r} twice")
                run |= {digest(question): (item.text[:60], split) for question in questions(item)}
        for name, given in self.directions.items():
            direction = next(iter(given)) if isinstance(given, DirectionSet) else given
            for question in direction.source.get("asked", "").split():
                if question in run:
                    text, split = run[question]
                    raise RequestError(
                        f"direction {name!r} was made from {text!r}, which is asked in {split} "
                        "too; give it other prompts"
                    )

    # --- what follows ---------------------------------------------------------------------------

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
        """How many random directions go through the selection as the direction itself does."""
        if len(self.settings) == 1 or not self.choose:
            return 0
        if self.controls.selected is not None:
            return self.controls.selected
        return 0 if self.generates else self.controls.random

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The setting of every cell of the grid: the product in declared order, then the lines."""
        crossed = [
            (name, operator, site, level if OPERATORS[operator][1] else "", scope)
            for name, operator, site, level, scope in itertools.product(
                self.directions, self.operators, self.sites, self.coefficients or ("",), self.scopes
            )
        ]
        lines = [(str(line), "", "", "", "") for line in self.lines]
        return tuple(dict.fromkeys([*crossed, *lines]))

    def bound(self, model: SteeringModel) -> "Design":
        """The same for one model: plain prompts become chats, neutral texts part at a token."""
        as_chat = model.is_chat if self.as_chat is None else self.as_chat

        def as_asked(item: Item) -> Item:
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

        parts = {split: [as_asked(item) for item in getattr(self, split)] for split in SPLITS}
        parts["neutral"] = [parted(item) for item in parts["neutral"]]
        sets = {
            name: tuple(lettered(item, as_chat, self.system) for item in some)
            for name, some in self.capability.items()
        }
        changes: dict[str, Any] = {**parts, "capability": sets, "as_chat": False}
        return replace(self, **changes)

    @property
    def splits(self) -> dict[str, Sequence[Item]]:
        """The parts whose prompts are run: those of `SPLITS`, and each set of `capability`."""
        sets = {CAPABILITY.format(name): items for name, items in self.capability.items()}
        return {split: getattr(self, split) for split in SPLITS} | sets

    def items(self) -> Iterator[tuple[str, Item]]:
        """(split, item) of everything that is run."""
        return ((split, item) for split, items in self.splits.items() for item in items)

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
        """The cell of a setting.

        Args:
            scale: of the model, which makes lengths of doses.
            role: a key of `roles.ROLES`.
            vectors: name -> what takes the place of the design's direction of that name.
            null: the number of the null direction, if it is one.
        """
        known = vectors or self.vectors
        steps: list[Intervention] = []
        for step in self.steps(setting):
            # "raw" means this direction's length: another direction is given the same length
            for part in step.resolve(scale) if step.unit == "raw" else (step,):
                put = tuple(known.get(vector.name, vector) for vector in part.directions)
                steps.append(replace(part, directions=put))
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

    def prompted(self) -> list[Cell]:
        """A cell for each prompt that takes the place of steering."""
        return [
            Cell("prompted", name, prompting=Prompting.of(name, given))
            for name, given in self.prompting.items()
        ]

    def null_vectors(self, number: int) -> dict[str, Vector]:
        """Random directions in place of all of the study's."""
        seed = self.controls.seed * 100_003 + number
        drawn = {name: vector.random(seed) for name, vector in self.vectors.items()}
        return {name: vector.named(f"{name}-random{number}") for name, vector in drawn.items()}

    def shuffled(self, contrasts: Mapping[str, Contrast], number: int) -> dict[str, Vector]:
        """Directions from shuffled labels in place of contrastive ones."""
        seed = self.controls.seed * 100_003 + number
        return {
            name: contrast.shuffled(seed).directions(self.method, f"{name}-shuffled{number}")
            for name, contrast in contrasts.items()
        }

    def sampled(self, row: Planned) -> Row:
        """What the engine runs for a planned row."""
        asked = row.cell.prompting.put(row.item.prompt) if row.cell.prompting else row.item.prompt
        return Row(asked, row.cell.steer, self.sampling, row.seed)

    def notes(self) -> list[str]:
        """What to be careful about: too few prompts, controls or random directions."""
        notes = []
        for name, least in (("random", 50), ("features", 50), ("shuffled", 50)):
            count = getattr(self.controls, name)
            if count < least:
                notes.append(f"{count} {name} controls; {least} are usual")
        if len(self.settings) > 1 and self.choose and not self.selected:
            notes.append(
                "no random directions go through the choice: p is Bonferroni's over "
                f"{len(self.settings)} settings (controls: {{selected: 50}} would run "
                f"{50 * len(self.settings) * len(self.choose) * len(self.seeds):,} rows more)"
            )
        cells = 1 if self.selected or not self.choose else len(self.settings)
        nulls = self.selected or self.controls.random
        if cells > 0.05 * (1 + nulls):
            among = "that choose for themselves" if self.selected else f"and {cells} settings"
            notes.append(
                f"p cannot reach 0.05 with {nulls} random directions {among}: nothing will be "
                "declared to steer"
            )
        for part in ("choose", "prove"):
            if 0 < len(getattr(self, part)) < 10:
                notes.append(f"{len(getattr(self, part))} prompts {part}: points without intervals")
        return notes
