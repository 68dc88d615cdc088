"""The parts of a study: its controls, its cells, and the rows that they become."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from interp_steer.errors import RequestError, nearest
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import Prompt
from interp_steer.results.roles import Setting
from interp_steer.steering.direction import is_name
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
class Prompting:
    """What a prompt says in place of steering: the baseline that steering has to beat.

    Attributes:
        system: the system prompt; it takes the place of one that is there.
        user: text before the user's last message, an empty line between them.
    """

    system: str | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        if not (self.system or "").strip() and not (self.user or "").strip():
            raise RequestError("a prompting says nothing; give `system`, or `user`, or both")

    @classmethod
    def of(cls, name: str, given: object, taken: Iterable[str] = ()) -> "Prompting":
        """What a study declares under a name that is not taken; raises RequestError if it is not of
        that form.
        """
        if not is_name(str(name)) or name in taken:
            raise RequestError(
                f"{name!r} cannot name a prompt: use letters, digits, '_' and '-', and no "
                "direction's name"
            )
        if not isinstance(given, Mapping):
            raise RequestError(
                f"prompting {name!r} is {str(given)[:60]!r}; expected fields: system, user, or both"
            )
        for key in given:
            if key not in ("system", "user"):
                close = nearest(str(key), ("system", "user"))
                raise RequestError(f"prompting {name!r}: unknown field {key!r}{close}")
            expect(f"prompting {name!r}: {key}", given[key], "text")
        return cls(**given)

    def put(self, prompt: Prompt) -> Prompt:
        """A prompt that says it.

        Raises:
            RequestError: a system prompt for a plain text, or a chat in which no user speaks.
        """
        if isinstance(prompt, str):
            if self.system is not None:
                raise RequestError(
                    f"a system prompt needs a chat, and {prompt[:60]!r} is a plain text; give "
                    "`user`, or a model with a chat template"
                )
            return f"{self.user}\n\n{prompt}"
        said = list(prompt)
        if self.user is not None:
            last = max((n for n, (role, _) in enumerate(said) if role == "user"), default=None)
            if last is None:
                raise RequestError("no user speaks in a chat that is to be prompted by `user`")
            said[last] = ("user", f"{self.user}\n\n{said[last][1]}")
        if self.system is not None:
            rest = [message for message in said if message[0] != "system"]
            said = [("system", self.system), *rest]
        return tuple(said)

    def __str__(self) -> str:
        parts = (("system prompt", self.system), ("before the question", self.user))
        return "; ".join(f"{where}: {text}" for where, text in parts if text is not None)


@dataclass(frozen=True)
class Cell:
    """One setting of a study, whatever the prompt.

    Attributes:
        role: a key of `roles.ROLES`.
        direction, operator, site, level, scope: its setting.
        steer: the interventions, their coefficients resolved to lengths.
        null: of a random control, its number from 0.
        prompting: what the prompt says in place of steering; its name is the `direction`.
    """

    role: str
    direction: str = ""
    operator: str = ""
    site: str = ""
    level: str = ""
    scope: str = ""
    steer: tuple[Intervention, ...] = ()
    null: int | None = None
    prompting: Prompting | None = None

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
        if self.prompting:
            return f"prompt {self.direction}"
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
