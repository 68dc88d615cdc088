"""A study as a YAML file, and back.

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

The other fields are those of `Study`. Files are looked for beside the YAML file first.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, nearest
from interp_steer.features.feature import feature
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.entry import SIDES
from interp_steer.prompts.file import PromptFile, is_file
from interp_steer.prompts.item import Item
from interp_steer.prompts.template import read_date
from interp_steer.results.built_in import BUILT_IN
from interp_steer.steering.contrast import POSITIONS, Contrast
from interp_steer.steering.direction import Direction, DirectionSet, is_name
from interp_steer.steering.directions import Directions
from interp_steer.steering.intervention import Vector
from interp_steer.study.cell import Controls
from interp_steer.study.parts import split_items
from interp_steer.study.study import Study
from interp_steer.util.files import read_text, whole
from interp_steer.util.typed import expect, expect_fields

PARTS = ("choose", "prove", "neutral", "build")
MODEL = ("model", "dtype", "revision", "date")
_OWN = {f.name for f in fields(Study)} - {*PARTS, "directions"}
FIELDS = (*MODEL, "directions", "prompts", *sorted(_OWN))
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
    """A YAML file that was read; `study` makes it a study of a model.

    Attributes:
        spec: its fields.
        folder: where it lies.
    """

    spec: Mapping[str, Any]
    folder: Path

    @classmethod
    def read(cls, path: str | Path) -> "StudyFile":
        """Reads and checks all that can be checked without a model.

        Raises:
            RequestError: no such file, no YAML, an unknown field, a prompt file that is not there.
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
        return file

    @property
    def model(self) -> dict[str, Any]:
        """What the file says of the model: name, dtype, revision, date."""
        return {name: self.spec[name] for name in MODEL if self.spec.get(name) is not None}

    def told(self, date: str | None) -> "StudyFile":
        """The same with another date for the chat template; None leaves the file's."""
        return self if date is None else replace(self, spec={**self.spec, "date": read_date(date)})

    def without_metrics(self) -> "StudyFile":
        """The same without metrics of its own and what they decide, so that no file of theirs is
        run: for its prompts, directions and cells.
        """
        left = {n: v for n, v in self.spec.items() if n not in ("modules", "choose_by", "limits")}
        left["metrics"] = [n for n in _listed(left.get("metrics")) if n in BUILT_IN]
        return replace(self, spec=left)

    def parts(self) -> dict[str, list[Item]]:
        """The prompts, by the part that they play."""
        given = self.spec["prompts"]
        found = {part: self._file(given[part], part).items() for part in PARTS if part in given}
        if "all" in given:
            if "choose" in found or "prove" in found:
                raise RequestError("prompts: give `all`, or `choose` and `prove`")
            share = 0.5 if given.get("share") is None else given["share"]
            seed = 16 if given.get("seed") is None else given["seed"]
            expect("prompts: share", share, "a number")
            expect("prompts: seed", seed, "a whole number")
            both = split_items(self._file(given["all"], "all").items(), share, seed)
            found |= dict(zip(("choose", "prove"), both, strict=True))
        return found

    def study(self, model: SteeringModel) -> Study:
        """The study, its directions made with the model, whose `date` becomes the file's.

        Raises:
            RequestError: as `Study` does, and for a direction that cannot be made.
        """
        spec = self.spec
        if spec.get("date") is not None:
            model.date = spec["date"]
        parts: dict[str, Any] = {**self.parts()}
        given = {name: spec[name] for name in _OWN if spec.get(name) is not None}
        for name, kind in (("controls", Controls), ("sampling", Sampling)):
            if name in given:
                given[name] = kind(**given[name])
        given["modules"] = [str(self._path(m)) for m in _listed(spec.get("modules"))]
        build = list(parts.pop("build", []))
        directions = {}
        for name, told in spec["directions"].items():
            directions[name], used = self._direction(name, told, model)
            build += [item for item in used if item not in build]
        return Study(
            choose=parts.pop("choose", []),
            prove=parts.pop("prove", []),
            directions=directions,
            build=build,
            **parts,
            **given,
        )

    def _path(self, name: object) -> Path:
        """A file beside this one, else as it is."""
        beside = self.folder / str(name)
        return beside if os.path.exists(beside) or is_file(beside) else Path(str(name))

    def _file(self, given: object, name: str) -> PromptFile:
        """The entries of a prompt file, or of a list in this one."""
        if isinstance(given, str):
            return PromptFile.read(self._path(given))
        if not isinstance(given, list) or not given:
            raise RequestError(
                f"{name} is {str(given)[:60]!r}, expected a file or a list of prompts"
            )
        return PromptFile.of(name, given)

    def _direction(
        self, name: str, told: Any, model: SteeringModel
    ) -> tuple[Vector | Contrast, list[Item]]:
        if isinstance(told, str):
            known = Directions(beside=self.folder)
            found: Direction | DirectionSet
            try:
                found = known[told]
            except KeyError:
                raise RequestError(
                    f"direction {name!r}: {told!r} is no file and no stored direction"
                    f"{nearest(told, known)}"
                ) from None
            return found.named(name), []
        if "feature" in told:
            sae_id = told.get("sae_id")
            args = [a for a in (sae_id, told.get("index")) if a is not None]
            return feature(told["feature"], *args, name=name), []
        if "contrast" in told:
            return Contrast.load(self._path(told["contrast"])), []
        as_chat = told.get("as_chat", None if model.is_chat else False)
        files = {side: self._file(told[side], side) for side in SIDES}
        up, down = (file.side(side, as_chat) for side, file in files.items())
        asked = [prompt for side, file in files.items() for prompt in file.asked(side)]
        made = Contrast.measure(model, up, down, told.get("position", "mean"), asked=asked)
        return made, list(dict.fromkeys(map(Item.of, asked)))


def declared(study: Study, model: SteeringModel) -> dict[str, Any]:
    """The fields of the file that repeats a study from a folder with its directions."""
    directions: dict[str, Any] = {}
    for name, given in study.directions.items():
        told = str(stored(name))
        directions[name] = {"contrast": told} if isinstance(given, Contrast) else told
    spec: dict[str, Any] = {
        "question": study.question,
        "model": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        **({"revision": model.revision} if model.revision else {}),
        **({"date": str(model.date)} if model.date else {}),
        "directions": directions,
        "prompts": {
            part: [item.as_mapping() for item in getattr(study, part)]
            for part in PARTS
            if getattr(study, part)
        },
    }
    for name in sorted(_OWN - {"question"}):
        value = getattr(study, name)
        if name in ("controls", "sampling"):
            value = asdict(value)
        spec[name] = list(value) if isinstance(value, tuple) else value
    spec["limits"] = dict(study.limits)
    return spec


def write(study: Study, model: SteeringModel, folder: Path) -> Path:
    """`study.yaml` in a folder, with the directions beside it: what repeats the study.

    All files are there in full before the first of them takes its name.
    """
    import yaml

    path = folder / "study.yaml"
    text = yaml.safe_dump(declared(study, model), sort_keys=False, allow_unicode=True, width=100)
    with ExitStack() as parts:
        parts.enter_context(whole(path)).write_text(text, encoding="utf-8")
        for name, given in study.directions.items():
            given.save(parts.enter_context(whole(folder / stored(name))))
    return path


def stored(name: str) -> Path:
    """Where a direction lies in a run's folder."""
    return Path("directions") / f"{name}.safetensors"


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
