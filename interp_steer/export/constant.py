"""What of a line of interventions is a constant: a vector added at every position.

    constants(parse("add(eiffel, 8.5) at 15 on all+first", {"eiffel": eiffel}), model)

Files and biases add to every position of a text, also to the first one, at which a line is silent
unless it says `+first`. Nothing else can leave this toolkit and stay what it was, so the rest is
refused, with the nearest line that can.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.model.model import SteeringModel
from interp_steer.model.shape import Bounds
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Prompt
from interp_steer.steering.direction import Direction, DirectionSet, together
from interp_steer.steering.intervention import Intervention, Scope, brief

EVERYWHERE = Scope(first=True)
NOTHING = "no intervention to export; give --steer 'add(NAME, 8) at 15'"
LENGTH = 32  # tokens of an answer on which two scopes are compared
Constants = Mapping[Site, Float[Tensor, " d_model"]]
"""Site -> what is added there at every position, in residual units, float32."""


def with_first(steps: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The same line, at the first position too."""
    return tuple(replace(one, scope=replace(one.scope, first=True)) for one in steps)


def constants(steps: Sequence[Intervention], model: SteeringModel | Bounds) -> Constants:
    """The vectors that a line adds, by site; what meets at one place is summed.

    `mlp_out L` is `resid_post L`, and `resid_pre L` is `resid_post L-1`: a constant is the same
    there.

    Args:
        steps: with lengths, not doses (see `resolve`).

    Raises:
        RequestError: a step is no constant add at every position, or does not fit the model.
    """
    sums: dict[Site, Tensor] = {}
    refuse(steps)
    for one in steps:
        one.check(model)
        for site, length in zip(one.sites, one.lengths(), strict=True):
            added = one.at(site)[0].unit.double() * (length or 0.0)
            home = _home(site)
            sums[home] = sums[home] + added if home in sums else added
    return {site: vector.float() for site, vector in sorted(sums.items())}


def refuse_others(found: Constants, kinds: Iterable[str], reader: str) -> None:
    """Refuses sites that a reader has no place for; `resid_pre` is that of block 0."""
    known = tuple(kinds)
    for site in found:
        if site.component not in known:
            raise RequestError(
                f"{reader} adds at {' or '.join(known)}, and the line does at {site}"
                + (", where the stream begins: steer at a layer" if site.layer == 0 else "")
            )


def _home(site: Site) -> Site:
    """The place by one name."""
    if site.component == "mlp_out":
        return Site("resid_post", site.layer)
    if site.component == "resid_pre" and site.layer:
        return Site("resid_post", site.layer - 1)
    return site


def refuse(steps: Sequence[Intervention]) -> None:
    """Refuses what is no constant, with the nearest line that is; steps may have doses."""
    if not steps:
        raise RequestError(NOTHING)
    for one in steps:
        _refuse(one)


def _refuse(one: Intervention) -> None:
    why = None
    if one.operator != "add":
        why = f"what {one.operator} adds depends on the activation"
    elif one.gate:
        why = f"it is done only if {one.gate}"
    elif any(site.component == "z" for site in one.sites):
        raise RequestError(
            f"cannot export {brief([one])!r}: no reader adds to a head's z; add the direction "
            "times that head's rows of o_proj at attn_out of the same layer"
        )
    elif one.scope.kind != "all":
        why = f"{one.scope} is not every position"
    elif not one.scope.first:
        raise RequestError(
            f"cannot export {brief([one])!r}: it leaves the first position out, and readers add at "
            "every position; --include-first exports it with `on all+first` and tells how much "
            "that changes"
        )
    if why:
        nearest = replace(one, scope=EVERYWHERE, gate=None)
        if one.operator != "add":
            fits = len(one.directions) == 1 and one.unit in ("", "dose", "max")
            value, unit = (one.value, one.unit) if fits and one.value else (0.3, "dose")
            nearest = replace(
                nearest, operator="add", directions=one.directions[:1], value=value, unit=unit
            )
        raise RequestError(
            f"cannot export {brief([one])!r}: {why}, and a file holds one vector for every "
            f"position; what can leave is such as {brief([nearest])!r}, which is another "
            "intervention: measure it first"
        )


def directions(found: Constants, name: str, steer: str) -> Direction | DirectionSet:
    """The vectors as a direction, or one a layer: `add(name, 1 raw)` adds them.

    Raises:
        RequestError: nothing is added, or at several components.
    """
    source = {"method": "export", "steer": steer}
    made = [Direction.of(v, site.hook_point, name, source) for site, v in found.items()]
    return together(made, name)


@dataclass(frozen=True)
class FirstPosition:
    """What the first position changes: KL(as written || at the first position too).

    Attributes:
        kl: nats a token, mean over prompts.
        largest: of the prompts' means.
        prompts: how many.
    """

    kl: float
    largest: float
    prompts: int


def first_position(
    model: SteeringModel, steps: Sequence[Intervention], prompts: Sequence[Prompt]
) -> FirstPosition:
    """Compares a line with the same at the first position too, on the answers that it gives.

    Raises:
        RequestError: no prompts.
    """
    if not prompts:
        raise RequestError("no prompts to compare with")
    engine, sampling = Engine(model), Sampling(max_new_tokens=LENGTH)
    as_written = [Row(prompt, tuple(steps), sampling) for prompt in prompts]
    answers = [result.token_ids for result in engine.generate(as_written)]
    everywhere = [replace(row, steer=with_first(row.steer)) for row in as_written]
    count = len(prompts)
    scores = engine.score(
        [*as_written, *everywhere], [*answers, *answers],
        reference=[None] * count + list(range(count)),
    )[count:]  # fmt: skip
    means = torch.stack([one.kl.mean() for one in scores if one.kl is not None])
    return FirstPosition(means.mean().item(), means.max().item(), count)
