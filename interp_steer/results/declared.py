"""What a metric is, without what computes it: as a run's manifest keeps it, so that a report can be
written where the metric itself cannot be had.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from interp_steer.errors import RunError
from interp_steer.prompts.item import Item
from interp_steer.util.json_shape import NONE, NUMBER, misfit

NEEDS = {
    "text": "prompts that are answered (without a continuation)",
    "unsteered": "prompts that are answered (without a continuation)",
    "pair": "prompts with answers `positive` and `negative`",
    "choices": "prompts with `choices` and the `correct` one",
    "continuation": "texts with a `continuation`",
}
KINDS, BETTER = ("mean", "rate"), ("high", "low")
UNKNOWN = "unknown"
_SHAPE = {
    "kind": str, "better": str, "needs": str, "unit": str, "bounds": (NONE, [NUMBER]),
    "about": str, "version": int, "source": str,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a study has to know of a metric.

    Attributes:
        kind: "rate" for 0 or 1, else "mean": decides the interval.
        better: "high" or "low": which way more effect (or less damage) lies; "unknown" of a custom
            metric whose run did not keep it.
        needs: a key of `NEEDS`: the items it can be asked of.
        unit: of its values, for axes.
        bounds: what no value can pass; of a rate 0 and 1.
        about: what it is, in a sentence.
        version: grows when its numbers change their meaning.
        source: a hash of its source; "" of a built-in metric.
    """

    name: str
    kind: str = "mean"
    better: str = "high"
    needs: str = "text"
    unit: str = ""
    bounds: tuple[float, float] | None = None
    about: str = ""
    version: int = 1
    source: str = ""

    @property
    def sign(self) -> float:
        """1 where more is better (or nobody knows), -1 where less is."""
        return -1.0 if self.better == "low" else 1.0

    @property
    def axis(self) -> str:
        """What an axis is called."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def meaning(self) -> tuple[int, str]:
        """What its numbers depend on, beside the row: equal ones may stand together."""
        return self.version, self.source

    def applies(self, item: Item) -> bool:
        """Whether it can be asked of an item."""
        return {
            "text": item.continuation is None,
            "unsteered": item.continuation is None,
            "pair": item.positive is not None,
            "choices": bool(item.choices),
            "continuation": item.continuation is not None,
        }[self.needs]

    def as_mapping(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        told = {f.name: getattr(self, f.name) for f in fields(Declared)}
        return {**told, "bounds": None if self.bounds is None else list(self.bounds)}


def of_manifest(
    manifest: Mapping[str, Any], built_in: Mapping[str, Declared]
) -> tuple[dict[str, Declared], list[str]]:
    """(metrics by name, what to be careful about) of a run; nothing of the run is executed.

    A run from before manifests kept them has the built-in metrics, as they were first declared; of
    a custom one only the name is known.

    Raises:
        RunError: the manifest does not say what a metric must say.
    """
    kept = manifest.get("measures", {})
    if wrong := misfit(kept, {str: dict}, "measures"):
        raise RunError(f"manifest.json is damaged: {wrong}")
    found: dict[str, Declared] = {}
    notes = []
    for name in manifest["metrics"]:
        if name in kept:
            found[name] = _read(name, kept[name])
        elif name in built_in:
            found[name] = replace(built_in[name], version=1)
        else:
            about = "A metric of the study's own; the run does not keep what it measures."
            found[name] = Declared(name=name, better=UNKNOWN, about=about)
            notes.append(
                f"{name} is not built in and this run does not keep how it is declared: which way "
                "is better is not known, and nothing is declared by it. Running the study in this "
                "folder once more measures it anew and keeps that."
            )
    earlier = [
        name
        for name, one in found.items()
        if not one.source and name in built_in and one.version < built_in[name].version
    ]
    if earlier:
        notes.append(
            f"{', '.join(earlier)}: measured by an earlier version, whose numbers may differ. "
            "Running the study in this folder once more measures them anew."
        )
    return found, notes


def _read(name: str, told: Any) -> Declared:
    wrong = misfit(told, _SHAPE)
    if wrong is None:
        for key, choices in (("kind", KINDS), ("better", (*BETTER, UNKNOWN)), ("needs", NEEDS)):
            if told[key] not in choices:
                wrong = f"{key} is {told[key][:40]!r}"
        if told["bounds"] is not None and len(told["bounds"]) != 2:
            wrong = "bounds are not two"
    if wrong:
        raise RunError(f"manifest.json is damaged: the declaration of {name!r}: {wrong}")
    given = {key: told[key] for key in _SHAPE}
    if told["bounds"] is not None:
        given["bounds"] = tuple(map(float, told["bounds"]))
    return Declared(name=name, **given)
