"""Directions: unit vectors with a home in the model and a record of where they came from."""

import hashlib
import math
import numbers
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError, note
from interp_steer.model.site import Site
from interp_steer.steering import encoder, file


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector at a hook point; arithmetic and equality are those of `norm * unit`.

    A coefficient always multiplies the unit vector, so that strengths compare across sources:
    decoder rows of different SAEs have norms from 0.1 to 1, differences of means from 1 to 100.

    Attributes:
        unit: [d_model] (or [d_head] for one head's `z`), length 1, float32, on the CPU.
        hook_point: TransformerLens's name of its home, such as `blocks.15.hook_resid_post`.
        norm: length before normalisation, in the model's residual units.
        name: what lines of text call it.
        source: where it came from: release, sae_id, index, label; or method, prompts, model.
        max_activation: largest activation seen of an SAE feature, in residual units.
    """

    unit: Float[Tensor, " d_model"]
    hook_point: str
    norm: float = 1.0
    name: str = "direction"
    source: Mapping[str, str] = field(default_factory=dict)
    max_activation: float | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        object.__setattr__(self, "hook_point", Site.parse(self.hook_point).hook_point)
        if self.unit.ndim != 1 or not self.unit.is_floating_point():
            raise RequestError(
                f"direction {self.name!r} is {self.unit.dtype} of shape {list(self.unit.shape)}; "
                "expected floating-point numbers on one axis"
            )
        length = self.unit.double().norm().item()
        if not math.isfinite(length) or not math.isfinite(self.norm):
            raise RequestError(f"direction {self.name!r} holds numbers that are not finite")
        if abs(length - 1) > 1e-4 or self.norm <= 0:
            raise RequestError(
                f"direction {self.name!r} has a unit vector of length {length:.4g} and norm "
                f"{self.norm:.4g}; use Direction.of(vector, ...) for a vector of any length above 0"
            )
        peak = self.max_activation
        if peak is not None and (
            isinstance(peak, bool)
            or not isinstance(peak, numbers.Real)
            or not 0 <= peak <= sys.float_info.max
        ):
            raise RequestError(
                f"direction {self.name!r} has a largest activation of {peak!r:.60}; expected a "
                "number from 0, or none"
            )
        # + 0.0 copies, and makes -0.0 0.0: equal directions have one sha
        unit = self.unit.detach().to("cpu", torch.float32) + 0.0
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "norm", float(self.norm))
        object.__setattr__(self, "max_activation", None if peak is None else float(peak))
        object.__setattr__(self, "source", MappingProxyType(dict(self.source)))

    @classmethod
    def of(
        cls,
        vector: Float[Tensor, " d_model"] | Float[np.ndarray, " d_model"],
        hook_point: str,
        name: str = "direction",
        source: Mapping[str, str] | None = None,
        max_activation: float | None = None,
    ) -> "Direction":
        """The direction of a vector of any length, a tensor or an array of NumPy.

        Raises:
            RequestError: the vector is zero or holds NaN or infinity.
        """
        if isinstance(vector, np.ndarray):
            vector = torch.from_numpy(vector.astype(np.float64))
        if vector.ndim != 1:
            raise RequestError(
                f"direction {name!r} has shape {list(vector.shape)}, expected one axis"
            )
        exact = vector.detach().to("cpu", torch.float64)
        norm = exact.norm().item()
        if not math.isfinite(norm) or norm == 0:
            raise RequestError(f"direction {name!r} has length {norm}: it points nowhere")
        return cls((exact / norm).float(), hook_point, norm, name, source or {}, max_activation)

    @property
    def site(self) -> Site:
        """The home as a site."""
        return Site.parse(self.hook_point)

    @property
    def is_feature(self) -> bool:
        """Whether it is a decoder row whose SAE is known, so that it has an encoder too."""
        return "release" in self.source and "index" in self.source

    @property
    def activation_unit(self) -> float:
        """Of a feature: the length in the residual stream that one unit of its activation adds."""
        rescaled = self.source.get("rescale_acts_by_decoder_norm")  # the SAE divides by the norm
        return 1.0 if rescaled else self.norm

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """The vector at its original length."""
        return self.unit * self.norm

    @cached_property
    def sha(self) -> str:
        """Eight hexadecimal digits of the content: unit vector, norm and hook point."""
        text = f"{self.hook_point} {self.norm!r}".encode()
        return hashlib.sha256(self.unit.numpy().tobytes() + text).hexdigest()[:8]

    @property
    def label(self) -> str:
        """How lines of text name it: `name@sha8`."""
        return f"{self.name}@{self.sha}"

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # a mappingproxy cannot be pickled
        parts = (self.unit, self.hook_point, self.norm, self.name, dict(self.source))
        return Direction, (*parts, self.max_activation)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Direction):
            return NotImplemented
        return (
            self.hook_point == other.hook_point
            and self.norm == other.norm
            and torch.equal(self.unit, other.unit)
        )

    def __hash__(self) -> int:
        return hash(self.sha)

    def __repr__(self) -> str:
        return f"Direction({self.label}, {self.hook_point}, norm {self.norm:.4g})"

    def _repr_html_(self) -> str:
        from interp_steer.util.html import table

        about = {"hook point": self.hook_point, "norm": self.norm}
        about |= {"largest activation": self.max_activation} if self.max_activation else {}
        told: dict[str, object] = {**about, **self.source}
        told.pop("asked", None)  # digests of prompts: not to be read
        return table([{"": key, "value": value} for key, value in told.items()], self.label)

    def __add__(self, other: "Direction") -> "Direction":
        return self._combined(other, "+", self.vector.double() + other.vector.double())

    def __sub__(self, other: "Direction") -> "Direction":
        return self._combined(other, "-", self.vector.double() - other.vector.double())

    def __neg__(self) -> "Direction":
        return replace(self, unit=-self.unit, source={"expression": f"-{self.label}"})

    def __mul__(self, factor: float) -> "Direction":
        if not math.isfinite(factor) or factor == 0:
            raise RequestError(f"cannot multiply a direction by {factor}")
        turned = self if factor > 0 else -self
        source = {"expression": f"{factor!r} * {self.label}"}
        return replace(turned, norm=self.norm * abs(factor), source=source)

    __rmul__ = __mul__

    def _combined(self, other: "Direction", sign: str, vector: Tensor) -> "Direction":
        if self.hook_point != other.hook_point:
            raise RequestError(
                f"{self.label} is at {self.hook_point} and {other.label} at {other.hook_point}; "
                "move one with .at(hook_point) first"
            )
        source = {"expression": f"{self.label} {sign} {other.label}"}
        return Direction.of(vector, self.hook_point, f"{self.name}{sign}{other.name}", source)

    def at(self, hook_point: str) -> "Direction":
        """The same vector with another home."""
        return replace(self, hook_point=hook_point)

    def named(self, name: str) -> "Direction":
        """The same direction under another name."""
        return replace(self, name=name)

    def cosine(self, other: "Direction") -> float:
        """Cosine of the angle to another direction, -1 to 1."""
        return float(torch.dot(self.unit.double(), other.unit.double()))

    def nearest(self, others: Iterable["Direction"], k: int = 5) -> list[tuple["Direction", float]]:
        """The `k` of `others` with the largest cosine, best first, with the cosine."""
        ranked = sorted(((o, self.cosine(o)) for o in others), key=lambda pair: -pair[1])
        return ranked[:k]

    def random(self, seed: int) -> "Direction":
        """Control: a random direction of the same norm and home, uniform on the sphere."""
        vector = torch.randn(
            self.unit.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        unit = (vector / vector.norm()).float()
        source = {"control": "random", "seed": str(seed), "matched": self.label}
        name = f"{self.name}-random{seed}"
        return Direction(unit, self.hook_point, self.norm, name, source)

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with all attributes, whole or not at all."""
        return _save(Path(path), self.name, [self], "direction")

    @staticmethod
    def load(path: str | Path) -> "Direction":
        """Reads what `save` wrote, exactly.

        Raises:
            RequestError: there is no such file, or it is not a direction.
            RunError: the file is damaged.
        """
        found = load(path)
        if isinstance(found, DirectionSet):
            raise RequestError(
                f"{path} holds a direction for each of {len(found)} layers; take one with "
                f"DirectionSet.load(path)[layer], layers {found.layers[0]}-{found.layers[-1]}"
            )
        return found


class DirectionSet:
    """One direction a layer, all at one component. `directions[15]` is block 15's."""

    def __init__(self, directions: Iterable[Direction], name: str | None = None) -> None:
        """Raises RequestError if the directions are not of one component and different layers."""
        members = sorted(directions, key=lambda one: one.site.layer)
        if not members or len({(m.site.component, len(m.unit)) for m in members}) > 1:
            raise RequestError("a DirectionSet needs directions of one component and one width")
        self.layers = tuple(m.site.layer for m in members)
        if len(set(self.layers)) < len(members):
            raise RequestError(f"a DirectionSet needs one direction a layer, got {self.layers}")
        self.name = name or members[0].name
        _check_name(self.name)
        self._members = tuple(m.named(self.name) for m in members)

    def __getitem__(self, layer: int) -> Direction:
        if layer not in self.layers:
            raise RequestError(
                f"{self.name} has no direction for layer {layer}; it has layers "
                f"{self.layers[0]}-{self.layers[-1]}"
            )
        return self._members[self.layers.index(layer)]

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Direction]:
        return iter(self._members)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DirectionSet) and self._members == other._members

    def __hash__(self) -> int:
        return hash(self._members)

    def __repr__(self) -> str:
        return f"DirectionSet({self.label}, layers {self.layers[0]}-{self.layers[-1]})"

    def _repr_html_(self) -> str:
        from interp_steer.util.html import bars, table

        norms: dict[object, float] = {m.site.layer: m.norm for m in self}
        rows = [{"layer": m.site.layer, "norm": m.norm, "sha": m.sha} for m in self]
        about = (
            f"norm at layers {self.layers[0]}-{self.layers[-1]}, at most {max(norms.values()):.3g}"
        )
        return bars(norms, about) + f"<details>{table(rows, self.label)}</details>"

    def named(self, name: str) -> "DirectionSet":
        """The same directions under another name."""
        return DirectionSet(self._members, name)

    @cached_property
    def sha(self) -> str:
        """Eight hexadecimal digits of all members' content."""
        return hashlib.sha256("".join(m.sha for m in self._members).encode()).hexdigest()[:8]

    @property
    def label(self) -> str:
        """How lines of text name it: `name@sha8`."""
        return f"{self.name}@{self.sha}"

    def random(self, seed: int) -> "DirectionSet":
        """Control: independent random directions of the members' norms."""
        members = [m.random(seed * 100_003 + m.site.layer) for m in self]
        return DirectionSet(members, f"{self.name}-random{seed}")

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with every member and its attributes."""
        return _save(Path(path), self.name, list(self), "set")

    @staticmethod
    def load(path: str | Path) -> "DirectionSet":
        """Reads what `save` wrote, exactly; raises as `Direction.load` does."""
        found = load(path)
        return DirectionSet([found]) if isinstance(found, Direction) else found


def members(vector: Direction | DirectionSet) -> list[Direction]:
    """The directions of a set, or a direction by itself."""
    return [vector] if isinstance(vector, Direction) else list(vector)


def together(directions: Sequence[Direction], name: str) -> Direction | DirectionSet:
    """A direction by itself, or several as a set; raises RequestError as `DirectionSet` does."""
    return directions[0] if len(directions) == 1 else DirectionSet(directions, name)


def load(path: str | Path) -> Direction | DirectionSet:
    """Reads a file of either kind.

    Raises:
        RequestError: there is no such file, or it is none of ours.
        RunError: the file is damaged.
    """
    return file.read(Path(path), _made)


def _made(kind: str, name: str, members: list[file.Values]) -> Direction | DirectionSet:
    """What a file's values are."""
    directions = [
        _by_todays_rule(Direction(unit, hook, norm, name, source, maximum))
        for unit, hook, norm, source, maximum in members
    ]
    if kind == "direction" and len(directions) == 1:
        return directions[0]
    return DirectionSet(directions, name)


def _save(path: Path, name: str, members: list[Direction], kind: str) -> Path:
    values = [(m.unit, m.hook_point, m.norm, m.source, m.max_activation) for m in members]
    return file.write(path, name, values, kind)


def _by_todays_rule(stored: Direction) -> Direction:
    """A feature that an earlier version stored, with its largest activation as it is read now."""
    known = stored.max_activation
    if known is None or not stored.is_feature or "label" not in stored.source:
        return stored
    source, now = encoder.features().maximum(stored.source, stored.norm, known)
    if now != known:
        note(
            f"{stored.label}: the largest activation was stored as {known:.4g}, the label's number "
            f"times the row's norm; that norm is in the number already, so it is read as {now:.4g}"
        )
    return replace(stored, source=source, max_activation=now)


def is_name(text: str) -> bool:
    """Whether a text can name a direction in a line of interventions."""
    word = re.fullmatch(r"[\w.+-]+", text)
    return bool(word) and not re.fullmatch(r"[\d.+-]+(e[\d+-]+)?|[+-]?(nan|inf)", text)


def _check_name(name: str) -> None:
    if not is_name(name):
        raise RequestError(
            f"{name!r} cannot name a direction: use letters, digits, '_', '.', '+' and '-', "
            "and not a number"
        )
