"""The parts of a study: its controls, its cells, and the rows that they become."""

from dataclasses import dataclass

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.results.roles import Setting
from interp_steer.steering.intervention import Intervention
from interp_steer.steering.scale import Scale
from interp_steer.util.typed import expect


@dataclass(frozen=True)
class Controls:
    """How many of each control are run beside the chosen cell.

    Attributes:
        random: random directions of the same norm.
        features: SAE features alike in density and largest activation, if the direction is one.
        shuffled: directions from shuffled labels, if the direction is contrastive.
        flip: whether the coefficient is run with its sign turned.
        wrong_layer: whether the direction is run half the model away.
        selected: random directions that go through the whole grid and the selection, as the
            direction itself does. The best of many cells is good by luck, and only these
            directions tell how good. Each costs a grid. None: as many as `random` if no text is
            generated, else 0. With 0, p is Bonferroni's over the cells of the grid.
        seed: of the random and the shuffled controls.

    Raises:
        RequestError: a number is out of range, or a value is of another type.
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
            expect(f"controls: {name}", getattr(self, name), "true or false")
        expect("controls: seed", self.seed, "a whole number")


@dataclass(frozen=True)
class Cell:
    """One setting of a study, whatever the prompt.

    Attributes:
        role: a key of `roles.ROLES`.
        direction, operator, site, level, scope: its setting.
        steer: the interventions, their coefficients resolved to lengths.
        null: of a random control, its number from 0.
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
        """Its "coefficient", "dose" or "max": the mean over its sites. None if a site has none."""
        strengths = [site[name] for step in self.steer for site in step.strengths(scale)]
        numbers = [value for value in strengths if isinstance(value, (int, float))]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(strengths) else None

    @property
    def setting(self) -> Setting:
        """Direction, operator, site, level and scope: no other cell of the grid has all five."""
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
