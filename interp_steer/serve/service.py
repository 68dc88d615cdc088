"""What stands behind the routes: a model, what it may be steered by, and the thread for it."""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from interp_steer.errors import RequestError, SteerError, nearest
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Given
from interp_steer.serve.body import Options
from interp_steer.serve.carriers import carried
from interp_steer.serve.gate import Limits
from interp_steer.serve.worker import Worker
from interp_steer.steering.direction import is_name, load
from interp_steer.steering.grammar import parse
from interp_steer.steering.intervention import Intervention, Vector, resolve
from interp_steer.steering.scale import Scale
from interp_steer.util.files import cache_dir

MOST = 256  # made ones that are kept


class Shelf(Mapping[str, Vector]):
    """The directions of one folder, by their names. A name from the network is never a path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, tuple[int, Vector]] = {}
        self._made: OrderedDict[str, Vector] = OrderedDict()
        self._lock = Lock()

    def put(self, vector: Vector) -> Vector:
        """Keeps one that was made, until the server ends or many others came. Another one of that
        name, stored or made, stays what it is: the new one gets a number.
        """
        with self._lock:
            name, number = vector.name, 2
            while name in set(self) and self._found(name) != vector.named(name):
                name, number = f"{vector.name}-{number}", number + 1
            if name in set(self._stored()):
                return self[name]
            self._made[name] = vector.named(name)
            self._made.move_to_end(name)
            while len(self._made) > MOST:
                self._made.popitem(last=False)
            return self._made[name]

    def __getitem__(self, name: str) -> Vector:
        if name in self._made:
            return self._made[name]
        if not is_name(name) or name not in set(self._stored()):
            raise KeyError(name)
        file = self.path / f"{name}.safetensors"
        written = file.stat().st_mtime_ns
        if name not in self._read or self._read[name][0] != written:
            self._read[name] = written, load(file).named(name)
        return self._read[name][1]

    def _found(self, name: str) -> Vector | None:
        """The one of that name; None for a file that cannot be read."""
        with suppress(SteerError):
            return self[name]
        return None

    def _stored(self) -> Iterator[str]:
        return (path.stem for path in self.path.glob("*.safetensors"))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._stored(), *self._made}))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Unknown(RequestError):
    """A model that is not here: 404, as OpenAI has it."""


@dataclass
class Service:
    """A model that answers, and what it may be steered by.

    Attributes:
        name: the model's, as clients ask for it.
        settings: name -> interventions with lengths; `name+setting` is a model of its own.
        scale: the unit of doses, measured once.
    """

    model: SteeringModel
    name: str
    directions: Shelf
    settings: Mapping[str, tuple[Intervention, ...]]
    scale: Scale
    limits: Limits
    worker: Worker
    began: int = field(default_factory=lambda: int(time.time()))
    answers: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(
        cls,
        model: SteeringModel,
        directions: Shelf,
        settings: Mapping[str, str],
        prompts: Sequence[Given],
        name: str = "",
        limits: Limits | None = None,
    ) -> "Service":
        """Args:
            settings: name -> a line of interventions.
            prompts: whose residual stream is the unit of doses.

        Raises:
            RequestError: a setting that cannot be read or does not fit the model.
        """
        limits = limits or Limits()
        scale = Scale.of(model, [model.encode(prompt) for prompt in prompts])
        read_in = {}
        for key, text in settings.items():
            if not is_name(key) or "+" in key:
                raise RequestError(f"a setting called {key!r}; expected letters, digits, '_', '-'")
            steps = resolve(parse(text, directions), scale)
            for one in steps:
                one.check(model)
            read_in[key] = steps
        called = name or Path(model.name).name
        worker = Worker(model, limits.most, limits.waiting)
        return cls(model, called, directions, read_in, scale, limits, worker)

    @property
    def models(self) -> dict[str, tuple[Intervention, ...]]:
        """Models that may be asked for, by name, and what steers each."""
        steered = {f"{self.name}+{key}": steps for key, steps in self.settings.items()}
        return {self.name: (), **steered}

    def model_steps(self, name: str) -> tuple[Intervention, ...]:
        """What steers the model of that name; raises Unknown if there is none."""
        if name not in self.models:
            raise Unknown(f"no model {name[:80]!r}{nearest(name, self.models)}")
        return self.models[name]

    def told(self, error: Exception) -> str:
        """An error's text for the network, where this machine's folders are nobody's business."""
        text = str(error).replace(self.model.name, self.name)
        for folder in (self.directions.path, cache_dir()):
            text = text.replace(f"{folder}/", "")
        return text

    def steering(self, body: Options) -> tuple[Intervention, ...]:
        """What a request is steered by: its field, or its model's name.

        Raises:
            Unknown: no such model.
            RequestError: as `carried` does; a field beside a model that is steered already.
        """
        by_name = self.model_steps(body.model)
        steps = carried(body.model_extra or {}, self.directions)
        if steps is None:
            return by_name
        if body.model != self.name:
            raise RequestError(
                f"the model {body.model!r} is steered already; ask {self.name!r} and steer it by "
                "the field, or leave the field out"
            )
        return resolve(steps, self.scale)

    def tokens(self, asked: int | None, default: int, prompt: Given) -> int:
        """How long an answer may be."""
        if asked is not None:
            if asked > self.limits.tokens:
                raise RequestError(
                    f"max_tokens is {asked}; this server answers with at most {self.limits.tokens}"
                )
            return max(1, asked)
        room = self.model.n_ctx - len(self.model.encode(prompt).ids)
        return max(1, min(default, self.limits.tokens, room))
