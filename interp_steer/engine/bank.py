"""Steers a whole batch at one hook point, every row in its own way.

A row's operators at the hook point act one after the other. All first operators of one kind (say
every `add`) are stacked into one stage, then all second ones, and so on. A stage is one operation
on tensors, so that a step costs the same for two settings as for two hundred.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering import encoder, operators
from interp_steer.steering.encoder import Encoder
from interp_steer.steering.intervention import CLAMPS, Intervention, Scope

Hook = tuple[str, int]
"""Component and layer."""


@dataclass(frozen=True)
class Step:
    """One operator of one row at one site, ready to be stacked."""

    kind: str
    scope: Scope
    operands: tuple[Tensor, ...]
    sae: Encoder | None = None


def steps_at(interventions: Sequence[Intervention], site: Site) -> list[Step]:
    """A row's operators at one site, in order; its clamps become one joint clamp, at the place of
    the last of them, and so do its latent clamps.

    Raises:
        RequestError: clamps that cannot be joined: different scopes, one-sided targets, nearly
            parallel directions, latents of different SAEs; or an SAE that has no latent clamp.
    """
    here = [one for one in interventions if site in one.sites]
    clamps = [one for one in here if one.operator in CLAMPS]
    latents = [one for one in here if one.operator == "latent_clamp"]
    steps = []
    for one in here:
        if one.operator == "latent_clamp":
            if one is latents[-1]:
                steps.append(_latents(latents, site))
        elif one.operator not in CLAMPS:
            steps.append(_single(one, site))
        elif one is clamps[-1]:
            steps.append(_joint(clamps, site))
    return steps


def _single(one: Intervention, site: Site) -> Step:
    units = [direction.unit for direction in one.at(site)]
    length = one.lengths()[one.sites.index(site)]
    if length is not None:
        return Step(one.operator, one.scope, (units[0] * length,))
    names = " and ".join(direction.label for direction in one.at(site))
    angle = torch.tensor(math.radians(one.value), dtype=torch.float32)
    plane = operators.orthonormal_plane(units[0], units[1], names)
    return Step(one.operator, one.scope, (plane, angle))


def _joint(clamps: list[Intervention], site: Site) -> Step:
    if len(clamps) > 1:
        sided = [one.operator for one in clamps if one.operator in ("clamp_min", "clamp_max")]
        if sided:
            raise RequestError(
                f"{sided[0]} cannot be joined with another clamp at {site}: which targets hold at "
                "once has no closed form; clamp both sides, or use another site"
            )
    _one_scope(clamps, site)
    values = [one.lengths()[one.sites.index(site)] or 0.0 for one in clamps]
    low = [
        -math.inf if c.operator == "clamp_max" else v for c, v in zip(clamps, values, strict=True)
    ]
    high = [
        math.inf if c.operator == "clamp_min" else v for c, v in zip(clamps, values, strict=True)
    ]
    directions = torch.stack([one.at(site)[0].unit for one in clamps])
    names = " and ".join(one.at(site)[0].label for one in clamps)
    dual = operators.dual_basis(directions, names)
    bounds = torch.tensor([low, high], dtype=torch.float32)
    return Step("clamp", clamps[0].scope, (directions, dual, *bounds))


def _one_scope(clamps: list[Intervention], site: Site) -> None:
    if len(scopes := list(dict.fromkeys(str(one.scope) for one in clamps))) > 1:
        raise RequestError(
            f"clamps at {site} have different scopes ({', '.join(scopes)}); one site needs one "
            "scope for all of them"
        )


def _latents(clamps: list[Intervention], site: Site) -> Step:
    _one_scope(clamps, site)
    features = [one.at(site)[0] for one in clamps]
    saes = [encoder.features().encoder(feature.source) for feature in features]
    sae = saes[0]
    if any(other is not sae for other in saes):
        raise RequestError(
            f"latents of different SAEs at {site} ({sae.name}, {saes[-1].name}): each would encode "
            "what the other has changed; use one SAE, or two sites"
        )
    sae.check_clampable()
    index = torch.tensor([int(feature.source["index"]) for feature in features])
    if len(set(index.tolist())) < len(index):
        raise RequestError(f"latent_clamp names one latent twice at {site}")
    rows = sae.rows(index)
    for feature, row in zip(features, rows, strict=True):
        adds = feature.unit * feature.activation_unit
        if not torch.allclose(adds, row, rtol=1e-4, atol=1e-5 * feature.activation_unit):
            raise RequestError(
                f"{feature.label} is not the decoder row of {sae.name} any more: the SAE's files "
                "have changed since; make the feature again"
            )
    lengths = [one.lengths()[one.sites.index(site)] for one in clamps]
    targets = torch.tensor(lengths, dtype=torch.float32)
    return Step("latent_clamp", clamps[0].scope, (index, rows, targets), sae)


@dataclass
class Stage:
    """Operators of one kind for some rows (and heads, at z) of a batch."""

    kind: str
    rows: Int[Tensor, " n"]
    heads: Int[Tensor, " n"] | None
    operands: tuple[Tensor, ...]
    prompt_length: Int[Tensor, "n 1"]
    in_prompt: Bool[Tensor, "n prompt_pos"]
    begin: Float[Tensor, "n 1"]
    end: Float[Tensor, "n 1"]
    sae: Encoder | None = None

    def steered(self, positions: Int[Tensor, "n pos"]) -> Bool[Tensor, "n pos"]:
        """Whether each absolute position is in scope; negative positions are padding."""
        inside = positions < self.prompt_length
        looked_up = positions.clamp(0, self.in_prompt.shape[1] - 1)
        early = self.in_prompt.gather(1, looked_up) & inside & (positions >= 0)
        return early | (~inside & (positions >= self.begin) & (positions < self.end))

    def moved(self, x: Float[Tensor, "n pos d"]) -> Float[Tensor, "n pos d"]:
        """The operator on these rows, at every position."""
        function: Any = getattr(operators, self.kind)
        if self.sae:
            index, *operands = self.operands
            out: Tensor = function(x, self.sae.latents(x, index), *operands)
        else:
            out = function(x, *self.operands)
        return out


class Bank:
    """All rows' interventions at one hook.

    `apply` is the general form. `apply_next` is for the one new position of a decoding step, where
    adding, the common case, is a single addition for the whole batch.
    """

    def __init__(self, stages: list[Stage], batch: int) -> None:
        self.stages = stages
        self.batch = batch
        only = stages[0]
        steady = bool(((only.end == math.inf) | (only.end <= only.begin)).all())
        self._delta: Tensor | None = None
        if len(stages) == 1 and only.kind == "add" and only.heads is None and steady:
            live = (only.end == math.inf).to(only.operands[0].dtype)
            width = only.operands[0].shape[-1]
            self._delta = only.operands[0].new_zeros(batch, width)
            self._delta[only.rows] = only.operands[0] * live

    def apply(
        self,
        x: Float[Tensor, "batch pos *d"],
        positions: Int[Tensor, "batch pos"],
        place: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "batch pos *d"]:
        """Changes the steered positions.

        Args:
            x: [batch, pos, d_model], or [batch, pos, head, d_head] at z.
            positions: absolute positions of each row of `x`; negative ones are padding.
            place: where in `x` each row of the bank stands; None if it is the same.

        Raises:
            RequestError: without `place`, a batch of another size than the bank's.
        """
        if place is None and len(x) != self.batch:
            raise RequestError(f"this bank steers {self.batch} rows, the batch has {len(x)}")
        for stage in self.stages:
            rows = stage.rows if place is None else place[stage.rows]
            part = x[rows] if stage.heads is None else x[rows, :, stage.heads]
            chosen = stage.steered(positions[rows])
            moved = torch.where(chosen[..., None], stage.moved(part), part)
            if stage.heads is None:
                x = x.index_copy(0, rows, moved)
            else:
                x = x.clone()
                x[rows, :, stage.heads] = moved
        return x

    def apply_next(
        self, x: Float[Tensor, "batch 1 *d"], positions: Int[Tensor, "batch 1"]
    ) -> Float[Tensor, "batch 1 *d"]:
        """The same for one position beyond every row's prompt."""
        if self._delta is None:
            return self.apply(x, positions)
        if self._delta.dtype != x.dtype:
            self._delta = self._delta.to(x.dtype)
        return x + self._delta[:, None]


def compile_banks(
    rows: Sequence[tuple[Sequence[Intervention], Encoded]], device: torch.device
) -> dict[Hook, Bank]:
    """Banks for a batch of rows, each given by its (resolved) interventions and its prompt."""
    # one SAE a stage: `id` tells SAEs apart, `kind` comes first for a stable order
    slots: dict[tuple[Hook, int, str, int], list[tuple[int, int | None, Step]]] = {}
    for index, (steer, _) in enumerate(rows):
        for site in sorted({site for one in steer for site in one.sites}):
            for order, step in enumerate(steps_at(steer, site)):
                slot = ((site.component, site.layer), order, step.kind, id(step.sae))
                slots.setdefault(slot, []).append((index, site.head, step))
    stages: dict[Hook, list[Stage]] = {}
    for (hook, _, kind, _), members in sorted(slots.items(), key=lambda item: item[0]):
        stages.setdefault(hook, []).append(_stack(kind, members, rows, device))
    return {hook: Bank(parts, len(rows)) for hook, parts in stages.items()}


def _stack(
    kind: str,
    members: list[tuple[int, int | None, Step]],
    rows: Sequence[tuple[Sequence[Intervention], Encoded]],
    device: torch.device,
) -> Stage:
    prompts = [rows[index][1] for index, _, _ in members]
    longest = max(len(prompt.ids) for prompt in prompts)
    in_prompt = torch.zeros(len(members), longest, dtype=torch.bool)
    for i, (prompt, (_, _, step)) in enumerate(zip(prompts, members, strict=True)):
        in_prompt[i, : len(prompt.ids)] = torch.tensor(step.scope.prompt_mask(prompt.content))
    after = [
        step.scope.after_prompt(len(prompt.ids))
        for prompt, (_, _, step) in zip(prompts, members, strict=True)
    ]
    ends = torch.tensor(after, dtype=torch.float32, device=device)
    operands = [step.operands for _, _, step in members]
    if kind in ("clamp", "latent_clamp"):  # fewer than the longest: add ones that move nothing
        widest = max(len(one[0]) for one in operands)
        operands = [tuple(_padded(part, widest) for part in one) for one in operands]
    heads = [head for _, head, _ in members]
    sae = members[0][2].sae
    return Stage(
        kind=kind,
        rows=torch.tensor([index for index, _, _ in members], device=device),
        heads=None if heads[0] is None else torch.tensor(heads, device=device),
        operands=tuple(torch.stack(parts).to(device) for parts in zip(*operands, strict=True)),
        prompt_length=torch.tensor([[len(p.ids)] for p in prompts], device=device),
        in_prompt=in_prompt.to(device),
        begin=ends[:, :1],
        end=ends[:, 1:],
        sae=sae.on(device) if sae else None,
    )


def _padded(part: Tensor, length: int) -> Tensor:
    return torch.cat([part, part.new_zeros(length - len(part), *part.shape[1:])])
