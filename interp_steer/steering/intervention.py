"""What is done where: operator, directions, coefficient, sites, scope and gate, as one value.

An intervention is one line of text and back, the same on the command line, in a file and in
results. A few that say what the grammar can:

    add(eiffel, 8.5) at 15
    add(eiffel@3f2a91bc, 0.35 dose) at 14-16 on generated
    clamp(paris, 8.5) at 15; clamp(tower, 4) at 15            # joined: both targets hold
    clamp_min(eiffel, 2 max) at resid_post 11,15
    add(refusal, -1.5 raw) at 10-16                           # each layer by its own difference
    latent_clamp(f13-4711, 40) at 13; latent_clamp(f13-12, 0) at 13
    ablate(refusal) at resid_pre 0-29 + attn_out 0-29 + mlp_out 0-29 on all+first
    rotate(happy, sad, 30 deg) at 12 on positions 4-9
    add(head_vector, 3) at z 15h3,15h7 if cos(refusal, resid_post 12) > 0.2

A coefficient is a length in the residual stream; `dose` makes it a share of the median residual
length at the site, `max` a multiple of the feature's largest activation, and `raw` a multiple of
the direction's own length, as CAA's multipliers of a mean difference. Ranges include both ends.
`latent_clamp` alone takes the units of its SAE's activations, and only features as directions.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from interp_steer.errors import RequestError, nearest
from interp_steer.model.model import SteeringModel
from interp_steer.model.shape import Bounds
from interp_steer.model.site import Site
from interp_steer.steering import encoder
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.scale import Scale

# operator: (least and most directions, the units of its coefficient; none = takes no coefficient)
LENGTHS = ("", "dose", "max", "raw")
OPERATORS: dict[str, tuple[int, tuple[str, ...]]] = {
    "add": (1, LENGTHS),
    "add_norm_kept": (1, LENGTHS),
    "clamp": (1, LENGTHS),
    "clamp_min": (1, LENGTHS),
    "clamp_max": (1, LENGTHS),
    "ablate": (1, ()),
    "latent_clamp": (1, ("", "max")),
    "rotate": (2, ("deg",)),
    "angular": (2, ("deg",)),
}
LARGEST = 1e15
CLAMPS = ("clamp", "clamp_min", "clamp_max", "ablate")
SCOPES = ("all", "prompt", "generated", "last", "content", "positions")

Vector = Direction | DirectionSet


@dataclass(frozen=True)
class Scope:
    """Which positions of a row are steered; position 0 is the row's first real token.

    `prompt` and `generated` both hold the last prompt position: it predicts the first generated
    token. Padding is never steered, and the first position only if asked: it is an attention sink.

    Attributes:
        kind: `all`; `prompt`; `generated`; `last` prompt position; `content`: what the user and
            the model say, without template or special tokens; `positions`.
        begin, end: for `positions`, both included.
        first: whether position 0 is steered too, where the kind holds it.
    """

    kind: str = "all"
    begin: int = 0
    end: int = 0
    first: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SCOPES:
            raise RequestError(f"unknown scope {self.kind!r}{nearest(self.kind, SCOPES)}")
        if not 0 <= self.begin <= self.end:
            raise RequestError(f"positions {self.begin}-{self.end} are not a range")
        if self.kind != "positions" and self.end:
            raise RequestError(f"scope {self.kind!r} takes no begin and end; 'positions' does")

    def prompt_mask(self, content: Sequence[bool]) -> list[bool]:
        """Which positions of a prompt are steered, given which are content."""
        n = len(content)
        chosen = {
            "all": [True] * n,
            "prompt": [True] * n,
            "generated": [i == n - 1 for i in range(n)],
            "last": [i == n - 1 for i in range(n)],
            "content": list(content),
            "positions": [self.begin <= i <= self.end for i in range(n)],
        }[self.kind]
        # naming position 0 in a range asks for it
        asked = self.first or (self.kind == "positions" and self.begin == 0)
        return [chosen[0] and asked, *chosen[1:]]

    def after_prompt(self, prompt_length: int) -> tuple[int, float]:
        """Which later positions are steered: from, and up to but not including."""
        if self.kind in ("all", "generated", "content"):
            return prompt_length, math.inf
        if self.kind == "positions":
            return max(self.begin, prompt_length), self.end + 1
        return 0, 0

    def __str__(self) -> str:
        text = f"positions {self.begin}-{self.end}" if self.kind == "positions" else self.kind
        return text + ("+first" if self.first else "")


@dataclass(frozen=True)
class Gate:
    """A condition on the prompt: mean over its positions of cos(x, direction), first one left out.

    Conditional activation steering, Lee et al. 2024 (CAST, arXiv 2409.05907). It is judged once,
    on the unsteered prompt.
    """

    direction: Vector
    site: Site
    above: bool
    threshold: float

    def __post_init__(self) -> None:
        if self.site.component not in ("resid_pre", "resid_post"):
            raise RequestError(f"a gate reads resid_pre or resid_post, not {self.site}")
        if not math.isfinite(self.threshold):
            raise RequestError(f"the threshold of a gate is {self.threshold}, not a number")
        object.__setattr__(self, "threshold", float(self.threshold))

    @property
    def vector(self) -> Tensor:
        """The unit direction that the prompt is compared with."""
        return _at(self.direction, self.site).unit

    def __str__(self) -> str:
        sign = ">" if self.above else "<"
        return f"cos({self.direction.label}, {self.site}) {sign} {self.threshold!r}"


@dataclass(frozen=True)
class Intervention:
    """One change of activations; build it with `steer(...)` or `parse(...)`.

    Attributes:
        operator: a key of `OPERATORS`.
        directions: one, or two for the angular operators.
        value, unit: the coefficient; unit "" is a length, else "dose", "max", "raw" or "deg".
        sites: where; a Direction goes unchanged to each, a DirectionSet gives each layer its own.
        scope: which positions.
        gate: applied only to prompts that pass, or None.
    """

    operator: str
    directions: tuple[Vector, ...]
    value: float
    unit: str
    sites: tuple[Site, ...]
    scope: Scope = Scope()
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.operator not in OPERATORS:
            raise RequestError(
                f"unknown operator {self.operator!r}{nearest(self.operator, OPERATORS)}"
            )
        needed, units = OPERATORS[self.operator]
        if len(self.directions) != needed:
            raise RequestError(
                f"{self.operator} takes {needed} direction{'s' * (needed > 1)}, "
                f"got {len(self.directions)}"
            )
        if not math.isfinite(self.value):
            raise RequestError(f"the coefficient of {self.operator} is {self.value}, not a number")
        if abs(self.value) > LARGEST:
            raise RequestError(
                f"the coefficient of {self.operator} is {self.value:g}; beyond {LARGEST:g} the "
                "squares in the model's norms overflow and its output would mean nothing"
            )
        object.__setattr__(self, "value", float(self.value))  # 8 and 8.0 are one line of text
        if not units and (self.value or self.unit):
            raise RequestError(f"{self.operator} takes no coefficient")
        if units and self.unit not in units:
            wanted = " or ".join(unit or "none" for unit in units)
            raise RequestError(f"{self.operator} takes a coefficient with unit {wanted}")
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise RequestError(f"{self.operator} needs sites, each once")
        if self.operator == "latent_clamp":
            for site in self.sites:
                self._check_latent(site)

    def __str__(self) -> str:
        names = ", ".join(one.label for one in self.directions)
        number = f", {self.value!r} {self.unit}".rstrip() if OPERATORS[self.operator][1] else ""
        line = f"{self.operator}({names}{number}) at {sites_text(self.sites)}"
        if self.scope != Scope():
            line += f" on {self.scope}"
        return line + (f" if {self.gate}" if self.gate else "")

    def _repr_html_(self) -> str:
        from interp_steer.util.html import shown

        return f"<code>{shown(self)}</code>"

    def _check_latent(self, site: Site) -> None:
        direction = self.at(site)[0]
        if not direction.is_feature:
            raise RequestError(
                f"latent_clamp needs a feature of an SAE, and {direction.label} is none; make it "
                "with feature(release, sae_id, index), or use clamp"
            )
        if direction.site != site:
            raise RequestError(
                f"the SAE of {direction.label} encodes {direction.site}: latent_clamp works there, "
                f"not at {site}"
            )

    def at(self, site: Site) -> tuple[Direction, ...]:
        """The directions used at one site."""
        return tuple(_at(one, site) for one in self.directions)

    def check(self, model: SteeringModel | Bounds) -> None:
        """Raises RequestError if a layer, head or width does not fit the model."""
        for site in self.sites:
            for direction in self.at(site):
                model.check(site, len(direction.unit))
        if self.gate:
            model.check(self.gate.site, len(self.gate.vector))

    def lengths(self, scale: Scale | None = None) -> tuple[float | None, ...]:
        """The coefficient at each site as a length in the residual stream (of `latent_clamp` in
        units of its SAE's activations); None for angles.

        Raises:
            RequestError: a dose without a scale, or `max` of a direction that has no maximum.
        """
        if self.unit == "deg":
            return tuple(None for _ in self.sites)
        if self.unit == "dose":
            if scale is None:
                raise RequestError(
                    f"{self} has a dose: call .resolve(Scale.of(model, prompts)) first"
                )
            return tuple(self.value * scale.at(site) for site in self.sites)
        if self.unit == "max":
            return tuple(self.value * self._known_peak(site) for site in self.sites)
        if self.unit == "raw":
            return tuple(self.value * self.at(site)[0].norm for site in self.sites)
        return tuple(self.value for _ in self.sites)

    def _known_peak(self, site: Site) -> float:
        if peak := self.peak(site):
            return peak
        direction = self.at(site)[0]
        why = ": it never fired where its largest activation was measured"
        if peak is None:
            why = _no_maximum(direction)
        raise RequestError(f"{direction.label}{why}; or give the coefficient as a number or a dose")

    def peak(self, site: Site) -> float | None:
        """The feature's largest activation in the coefficient's own units, None if not known."""
        direction = self.at(site)[0]
        if direction.max_activation is None or self.operator != "latent_clamp":
            return direction.max_activation
        return direction.max_activation / direction.activation_unit

    def resolve(self, scale: Scale | None = None) -> tuple["Intervention", ...]:
        """The same with lengths for coefficients: itself, or one for each length.

        Lengths are rounded to six digits, so that the line stays one that a person can read.
        """
        if self.unit in ("", "deg"):
            return (self,)
        groups: dict[float, list[Site]] = {}
        for site, length in zip(self.sites, self.lengths(scale), strict=True):
            groups.setdefault(float(f"{length or 0.0:.6g}"), []).append(site)
        return tuple(
            replace(self, value=length, unit="", sites=tuple(sites))
            for length, sites in groups.items()
        )

    def strengths(self, scale: Scale | None = None) -> list[dict[str, object]]:
        """Every form of the coefficient at each site: length, dose, multiple of the maximum."""
        shown = []
        for site, length in zip(self.sites, self.lengths(scale), strict=True):
            peak = self.peak(site)
            dose = None
            # the length of a latent clamp's step differs from position to position
            steady = self.operator != "latent_clamp" and site.component != "z"
            if length is not None and scale is not None and steady:
                dose = length / scale.at(site)
            shown.append(
                {
                    "site": str(site),
                    "coefficient": self.value if length is None else length,
                    "dose": dose,
                    "max": length / peak if length is not None and peak else None,
                }
            )
        return shown


def _no_maximum(direction: Direction) -> str:
    """Why a direction has no largest activation, and where that of a feature is found."""
    if not direction.is_feature:
        return " has no maximum activation, as it is no feature of an SAE"
    if scaling := direction.source.get("normalize_activations"):
        return f": its SAE rescales activations ({scaling}), so that they have no fixed length"
    if command := encoder.features().how_to_get_maximum(direction.source):
        return (
            f": its largest activation is not known here: run {command} and make the feature again"
        )
    return ": no label says what the largest activation of this feature is"


def _at(vector: Vector, site: Site) -> Direction:
    return vector[site.layer] if isinstance(vector, DirectionSet) else vector


def resolve(
    interventions: Sequence[Intervention], scale: Scale | None = None
) -> tuple[Intervention, ...]:
    """Interventions with lengths in place of doses and multiples; raises as `lengths` does."""
    return tuple(part for one in interventions for part in one.resolve(scale))


def line(interventions: Sequence[Intervention]) -> str:
    """The text of interventions, which `parse` reads back; "" for none."""
    return "; ".join(str(one) for one in interventions)


def brief(interventions: Sequence[Intervention]) -> str:
    """The line for a title: names without hashes, and no component where it is resid_post."""
    return re.sub(r"@[0-9a-f]{8}|(?<= at )resid_post ", "", line(interventions))


def sites_text(sites: Sequence[Site]) -> str:
    """`resid_post 12-14,16 + z 3h1`: neighbours of one component as ranges."""
    groups: list[tuple[str, list[str]]] = []
    run: list[int] = []
    for i, site in enumerate(sites):
        if not groups or groups[-1][0] != site.component:
            groups.append((site.component, []))
        if site.head is not None:
            groups[-1][1].append(f"{site.layer}h{site.head}")
            continue
        run.append(site.layer)
        after = sites[i + 1] if i + 1 < len(sites) else None
        if after is None or (after.component, after.layer) != (site.component, site.layer + 1):
            groups[-1][1].append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
            run = []
    return " + ".join(f"{component} {','.join(parts)}" for component, parts in groups)
