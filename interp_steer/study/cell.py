"""The parts of a study: its controls, its cells, and the rows that they become."""

from dataclasses import dataclass

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.results.roles import Setting
from interp_steer.steering.intervention import Intervention
from interp_steer.steering.scale import Scale


@dataclass(frozen=True)
class Controls:
    """How many of each control are run beside the chosen cell.

    Attributes:
        random: random directions of matched norm.
        features: features matched on density and largest activation, where the direction is one.
        shuffled: directions from shuffled labels, where it is contrastive.
        flip, wrong_layer: whether those are run.
        selected: random directions that go through the whole grid and the choice as the direction
            itself did. The best of many cells is good by luck: only these tell how good. None:
            as many as `random` if no text is generated, else none, as they cost a grid each; p is
            then Bonferroni's over the cells of the grid.
        seed: another one draws other random and shuffled controls.
    """

    random: int = 50
    features: int = 50
    shuffled: int = 50
    flip: bool = True
    wrong_layer: bool = True
    selected: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("random", "features", "shuffled", "selected"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= 10_000):
                raise RequestError(f"controls: {name} is {value!r}, expected 0 to 10000")
        for name in ("flip", "wrong_layer"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"controls: {name} is {getattr(self, name)!r}, expected true or false"
                )
        if type(self.seed) is not int:
            raise RequestError(f"controls: seed is {self.seed!r}, expected a whole number")


@dataclass(frozen=True)
class Cell:
    """One setting of a study, whatever the prompt.

    Attributes:
        role: a key of `roles.ROLES`.
        direction, operator, site, level, scope: as the study declares them; "" where there is none.
        steer: the interventions, resolved to lengths.
        null: the number of the null direction, from 0.
    """

    role: str
    direction: str = ""
    operator: str = ""
    site: str = ""
    level: str = ""
    scope: str = ""
    steer: tuple[Intervention, ...] = ()
    null: int | None = None

    def strength(self, name: str, scale: Scale) -> float | None:
        """Its "coefficient", "dose" or "max", the mean over its sites; None where one has none."""
        strengths = [one[name] for step in self.steer for one in step.strengths(scale)]
        told = [value for value in strengths if isinstance(value, (int, float))]
        return sum(told) / len(told) if told and len(told) == len(strengths) else None

    @property
    def setting(self) -> Setting:
        """What tells it from the other cells of the grid."""
        return self.direction, self.operator, self.site, self.level, self.scope

    def __str__(self) -> str:
        if not self.direction:
            return self.role
        level = f", {self.level}" if self.level else ""
        scope = f" on {self.scope}" if self.scope not in ("", "all") else ""
        return f"{self.operator}({self.direction}{level}) at {self.site}{scope}"


@dataclass(frozen=True)
class Planned:
    """A row of the plan: a cell on an item with a seed."""

    cell: Cell
    item: Item
    split: str
    seed: int
