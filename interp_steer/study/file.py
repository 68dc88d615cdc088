"""A study as a YAML file.

    question: Does the direction make the model name the tower?
    model: starter                                         # with dtype, revision, date if need be
    directions:
      eiffel: {positive: tower.txt, negative: other.txt}   # contrastive, or
      paris: {feature: starter, index: 2652}               # a feature of an SAE, or
      saved: eiffel.safetensors                            # a file, or a name in the cache
    prompts: {choose: choose.txt, prove: prove.txt}        # or {all: prompts.txt, share: 0.5}
    sites: each 10-16
    coefficients: [0.2 dose, 0.4 dose, 0.6 dose]
    concept: [Eiffel, Paris]
    metrics: [concept, rep3, surprise]
    controls: {random: 50}

The other fields are those of `Study`. A file's name is looked for beside the YAML file first.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, nearest
from interp_steer.features.feature import feature
from interp_steer.model.model import SteeringModel
from interp_steer.model.shape import Bounds
from interp_steer.prompts.entry import SIDES
from interp_steer.prompts.file import PromptFile, is_file
from interp_steer.prompts.item import Item
from interp_steer.prompts.parts import split_items
from interp_steer.prompts.template import read_date
from interp_steer.results.built_in import BUILT_IN
from interp_steer.steering.contrast import METHODS, POSITIONS, Contrast
from interp_steer.steering.direction import Direction, is_name
from interp_steer.steering.directions import Directions
from interp_steer.steering.intervention import Vector
from interp_steer.study.cell import Controls
from interp_steer.study.description import OWN
from interp_steer.study.design import PARTS
from interp_steer.study.study import Study
from interp_steer.util.files import read_text
from interp_steer.util.typed import expect, expect_fields

MODEL = ("model", "dtype", "revision", "date")
FIELDS = (*MODEL, "directions", "prompts", *OWN)
TYPES = {  # of the fields of one value
    **dict.fromkeys(("model", "dtype", "revision", "question", "system"), "text"),
    **dict.fromkeys(("method", "choose_by"), "text"),
    "as_chat": "true or false",
    "chunk": "a whole number",
}
SEVERAL = {  # of those that may hold a list
    "sites": ("a whole number", "text"),
    "coefficients": ("a number", "text"),
    "seeds": ("a whole number",),
    **dict.fromkeys(("operators", "scopes", "lines", "metrics", "concept", "modules"), ("text",)),
}
KINDS = {
    "contrast of prompts": ("positive", "negative", "position", "as_chat"),
    "saved contrast": ("contrast",),
    "feature": ("feature", "sae_id", "index"),
}


@dataclass(frozen=True)
class StudyFile:
    """What a YAML file says; `study` makes a study of it.

    Attributes:
        spec: its fields.
        folder: the folder of the file.
    """

    spec: Mapping[str, Any]
    folder: Path

    @classmethod
    def read(cls, path: str | Path) -> "StudyFile":
        """Reads a file and checks all that needs no model.

        Raises:
            RequestError: no such file, no YAML, an unknown field, a missing prompt file.
        """
        from interp_steer.util.yaml_text import parse_yaml

        path = Path(path)
        if not path.is_file():
            there = os.path.isdir(path)
            raise RequestError(f"{path} is a folder" if there else f"no study file {path}")
        spec = parse_yaml(read_text(path), path)
        if not isinstance(spec, dict):
            raise RequestError(
                f"{path} holds no study; expected fields such as directions, prompts"
            )
        _known(spec, FIELDS, str(path), "field")
        for part, names, what in (
            ("prompts", (*PARTS, "all", "share", "seed"), "part of the prompts"),
            ("controls", [f.name for f in fields(Controls)], "control"),
            ("sampling", [f.name for f in fields(Sampling)], "sampling setting"),
            ("limits", None, ""),
            ("prompting", None, ""),
            ("capability", None, ""),
            ("directions", None, ""),
        ):
            given = spec.get(part, {})
            if not isinstance(given, dict):
                raise RequestError(f"{path}: {part} is {str(given)[:60]!r}, expected fields")
            if names is not None:
                _known(given, names, str(path), what)
        for name, value in spec.items():
            if name in TYPES and value is not None:
                expect(f"{path}: {name}", value, TYPES[name])
            if "text" in SEVERAL.get(name, ()) and isinstance(value, dict):
                raise RequestError(
                    f"{path}: {name} is {str(value)[:60]}, expected text; YAML reads unquoted "
                    f"braces as fields: write quotes around them, as in {name}: '{{8-20}}'"
                )
            if name in SEVERAL and value is not None:
                expect(f"{path}: {name}", value, *SEVERAL[name], several=True)
        for name, limit in spec.get("limits", {}).items():
            expect(f"{path}: a metric of the limits", name, "text")
            expect(f"{path}: the limit of {name}", limit, "a number")
        for part, made in (("controls", Controls), ("sampling", Sampling)):
            expect_fields(made, spec.get(part, {}), f"{path}: {part}")
            made(**spec.get(part, {}))
        for needed in ("directions", "prompts"):
            if not spec.get(needed):
                raise RequestError(f"{path} has no {needed}")
        for name, given in spec["directions"].items():
            _check_direction(name, given)
        read_date(spec.get("date"))
        file = cls(spec, path.parent)
        file.parts()
        file.capability()
        return file

    @property
    def model(self) -> dict[str, Any]:
        """What the file says of the model: name, dtype, revision, date."""
        return {name: self.spec[name] for name in MODEL if self.spec.get(name) is not None}

    def dated(self, date: str | None) -> "StudyFile":
        """The same with another date for the chat template. None keeps the file's own."""
        return self if date is None else replace(self, spec={**self.spec, "date": read_date(date)})

    def without_metrics(self) -> "StudyFile":
        """The same with built-in metrics alone, so that no Python file is run.

        It has the same prompts, directions and cells; what its own metrics decide is left out.
        """
        left = {n: v for n, v in self.spec.items() if n not in ("modules", "choose_by", "limits")}
        left["metrics"] = [n for n in _listed(left.get("metrics")) if n in BUILT_IN]
        return replace(self, spec=left)

    def parts(self) -> dict[str, list[Item]]:
        """The prompts of each part."""
        given = self.spec["prompts"]
        parts = {part: self._file(given[part], part).items() for part in PARTS if part in given}
        if "all" in given:
            if "choose" in parts or "prove" in parts:
                raise RequestError("prompts: give `all`, or `choose` and `prove`")
            share = 0.5 if given.get("share") is None else given["share"]
            seed = 16 if given.get("seed") is None else given["seed"]
            expect("prompts: share", share, "a number")
            expect("prompts: seed", seed, "a whole number")
            both = split_items(self._file(given["all"], "all").items(), share, seed)
            parts |= dict(zip(("choose", "prove"), both, strict=True))
        return parts

    def capability(self) -> dict[str, list[Item]]:
        """The questions of each set."""
        sets = self.spec.get("capability") or {}
        return {name: self._file(one, f"capability {name}").items() for name, one in sets.items()}

    def rehearse(self, bounds: Bounds | None) -> None:
        """Checks all of the study that can be checked before a model loads: the grid, its sites,
        the metrics, the prompts' parts, and the directions that need no model.

        Args:
            bounds: of the model; None where they are not known.

        Raises:
            RequestError: as `study` does.
        """
        method = self.spec.get("method") or "mean-difference"
        if method not in METHODS:
            raise RequestError(f"unknown method {method!r}{nearest(method, METHODS)}")
        width = bounds.d_model if bounds else 1
        directions = {
            name: self.at_hand.get(name)
            # in place of one that the model makes
            or Direction.of(torch.ones(width), "blocks.0.hook_resid_post", name)
            for name in self.spec["directions"]
        }
        study = self._study(directions, [])
        for setting in study.settings:
            for step in study.steps(setting):
                if bounds:
                    step.check(bounds)

    def study(self, model: SteeringModel) -> Study:
        """The study. The model makes its directions, and takes over the file's `date`.

        Raises:
            RequestError: as `Study` does, and for a direction that cannot be made.
        """
        spec = self.spec
        if spec.get("date") is not None:
            model.date = spec["date"]
        directions: dict[str, Vector | Contrast] = {}
        build: list[Item] = []
        for name, declared in spec["directions"].items():
            if name in self.at_hand:
                directions[name] = self.at_hand[name]
                continue
            directions[name], used = self._contrast(declared, model)
            build += [item for item in used if item not in build]
        return self._study(directions, build)

    def _study(self, directions: Mapping[str, Vector | Contrast], used: list[Item]) -> Study:
        """A study of these directions; `used` are prompts that they were made from here."""
        spec = self.spec
        parts: dict[str, Any] = {"choose": [], "prove": [], **self.parts()}
        given = {name: spec[name] for name in OWN if spec.get(name) is not None}
        for name, kind in (("controls", Controls), ("sampling", Sampling)):
            if name in given:
                given[name] = kind(**given[name])
        given["capability"] = self.capability()
        given["modules"] = [str(self._path(m)) for m in _listed(spec.get("modules"))]
        build = list(parts.pop("build", []))
        build += [item for item in used if item not in build]
        return Study(directions=directions, build=build, **parts, **given)

    @cached_property
    def at_hand(self) -> Mapping[str, Vector | Contrast]:
        """The directions that need no model: stored ones, and features."""
        found = {}
        for name, declared in self.spec["directions"].items():
            if (one := self._direction(name, declared)) is not None:
                found[name] = one
        return found

    def _path(self, name: object) -> Path:
        """A path beside this file if there is one, else the path as it is."""
        beside = self.folder / str(name)
        return beside if os.path.exists(beside) or is_file(beside) else Path(str(name))

    def _file(self, given: object, name: str) -> PromptFile:
        """The entries of a prompt file, or of a list that stands in this file."""
        if isinstance(given, str):
            return PromptFile.read(self._path(given))
        if not isinstance(given, list) or not given:
            raise RequestError(
                f"{name} is {str(given)[:60]!r}, expected a file or a list of prompts"
            )
        return PromptFile.of(name, given)

    def _direction(self, name: str, declared: Any) -> Vector | Contrast | None:
        """A direction that needs no model; None for one that it makes."""
        if isinstance(declared, str):
            known = Directions(beside=self.folder)
            try:
                return known[declared].named(name)
            except KeyError:
                raise RequestError(
                    f"direction {name!r}: {declared!r} is no file and no stored direction"
                    f"{nearest(declared, known)}"
                ) from None
        if "feature" in declared:
            place = [declared.get(field) for field in ("sae_id", "index")]
            given = [value for value in place if value is not None]
            return feature(declared["feature"], *given, name=name)
        return Contrast.load(self._path(declared["contrast"])) if "contrast" in declared else None

    def _contrast(
        self, declared: Mapping[str, Any], model: SteeringModel
    ) -> tuple[Contrast, list[Item]]:
        """A contrast of prompts, and the prompts that it was made from here."""
        as_chat = declared.get("as_chat", None if model.is_chat else False)
        files = {side: self._file(declared[side], side) for side in SIDES}
        positive, negative = (file.side(side, as_chat) for side, file in files.items())
        asked = [prompt for side, file in files.items() for prompt in file.asked(side)]
        position = declared.get("position", "mean")
        contrast = Contrast.measure(model, positive, negative, position, asked=asked)
        return contrast, list(dict.fromkeys(map(Item.of, asked)))


def _listed(given: object) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list) else [given]


def _known(given: Mapping[Any, Any], names: Any, where: str, what: str) -> None:
    for key in given:
        if not isinstance(key, str):
            raise RequestError(
                f"{where}: a {what} is named {key}, expected text; YAML reads an unquoted yes, no, "
                "on or off as true or false"
            )
        if key not in names:
            raise RequestError(f"{where}: unknown {what} {key!r}{nearest(key, names)}")


def _check_direction(name: object, given: object) -> None:
    if not isinstance(name, str) or not is_name(name):
        raise RequestError(
            f"{name!r} cannot name a direction: use letters, digits, '_', '.', '+' and '-', and "
            "not a number"
        )
    if isinstance(given, str):
        return
    if not isinstance(given, dict):
        raise RequestError(
            f"direction {name!r} is {str(given)[:60]!r}; expected a file, or fields: positive and "
            "negative, or feature"
        )
    known = [key for keys in KINDS.values() for key in keys]
    _known(given, known, f"direction {name!r}", "field")
    if sum(key in given for key in ("positive", "feature", "contrast")) != 1 or (
        "positive" in given and "negative" not in given
    ):
        raise RequestError(
            f"direction {name!r} has {', '.join(given)}; expected positive and negative, or "
            "feature, or contrast"
        )
    for field in ("feature", "sae_id", "contrast", "position", "index", "as_chat"):
        if given.get(field) is not None:
            kind = {"index": "a whole number", "as_chat": "true or false"}.get(field, "text")
            expect(f"{field} of direction {name!r}", given[field], kind)
    if given.get("position", "mean") not in POSITIONS:
        raise RequestError(
            f"direction {name!r}: unknown position {given['position']!r}"
            f"{nearest(given['position'], POSITIONS)}"
        )
