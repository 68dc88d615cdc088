"""Steers a whole batch at one hook point, every row in its own way.

A row's operators at the hook point act one after the other. All first operators of one kind (say
every `add`) are one stage, then all second ones, and so on. A stage is one operation on tensors, so
that a step costs the same for two settings as for two hundred. Vectors are kept once, however many
rows and sites use them; a row holds a number.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering import encoder, operators
from interp_steer.steering.encoder import Encoder, Encoders
from interp_steer.steering.intervention import CLAMPS, Intervention, Scope

Hook = tuple[str, int]
"""Component and layer."""

Acting = tuple[Intervention, float | None]
"""An intervention, and its length at one site; None for an angle."""


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of a row at a site, as numbers."""

    kind: str
    scope: Scope
    operands: tuple[Tensor, ...]
    sae: Encoder | None = None


class Steering:
    """Interventions of a row as steps at sites, computed once for all rows that share them.

    Attributes:
        interventions: the resolved interventions.
        steps: at each site, in order. Clamps of one site are one joint clamp, at the place of the
            last of them, and so are its latent clamps.
        count: how many different steps there are.
        first_block: the first block that is changed, or whose input is; infinite for none.
    """

    def __init__(
        self,
        interventions: Sequence[Intervention],
        device: torch.device,
        encoders: Encoders | None = None,
    ) -> None:
        """Computes the steps.

        Args:
            device: where SAEs are to encode.
            encoders: where SAEs come from; None is the store that all share.

        Raises:
            RequestError: clamps that cannot be joined: different scopes, one-sided targets, nearly
                parallel directions, latents of different SAEs; or an SAE without latent clamps.
        """
        self.interventions = tuple(interventions)
        acting: dict[Site, list[Acting]] = {}
        for one in self.interventions:
            for site, length in zip(one.sites, one.lengths(), strict=True):
                acting.setdefault(site, []).append((one, length))
        known: dict[tuple[object, ...], tuple[Step, ...]] = {}
        self.steps: dict[Site, tuple[Step, ...]] = {}
        for site, here in sorted(acting.items()):
            alike = tuple(
                (one.operator, one.scope, one.value, length, *map(id, one.at(site)))
                for one, length in here
            )
            if alike not in known:
                known[alike] = tuple(_steps(here, site, device, encoders))
            self.steps[site] = known[alike]
        self.count = sum(map(len, known.values()))
        self.first_block = min((site.block for site in acting), default=math.inf)

    def reaches(self, prompt: Encoded) -> bool:
        """Whether it steers a position of the prompt before the last one."""
        scopes = {one.scope for one in self.interventions}
        return any(any(scope.prompt_mask(prompt.content)[:-1]) for scope in scopes)


Steered = tuple[Steering, Encoded]
"""A row as forward passes see it: its steering, and its prompt."""


def _steps(
    here: Sequence[Acting], site: Site, device: torch.device, encoders: Encoders | None
) -> Iterable[Step]:
    clamps = [(one, length) for one, length in here if one.operator in CLAMPS]
    latents = [(one, length) for one, length in here if one.operator == "latent_clamp"]
    for one, length in here:
        if one.operator == "latent_clamp":
            if one is latents[-1][0]:
                yield _latents(latents, site, device, encoders)
        elif one.operator not in CLAMPS:
            yield _single(one, length, site)
        elif one is clamps[-1][0]:
            yield _joint(clamps, site)


def _single(one: Intervention, length: float | None, site: Site) -> Step:
    units = [direction.unit for direction in one.at(site)]
    if length is not None:
        return Step(one.operator, one.scope, (units[0] * length,))
    names = " and ".join(direction.label for direction in one.at(site))
    angle = torch.tensor(math.radians(one.value), dtype=torch.float32)
    plane = operators.orthonormal_plane(units[0], units[1], names)
    return Step(one.operator, one.scope, (plane, angle))


def _joint(clamps: Sequence[Acting], site: Site) -> Step:
    if len(clamps) > 1:
        sided = [one.operator for one, _ in clamps if one.operator in ("clamp_min", "clamp_max")]
        if sided:
            raise RequestError(
                f"{sided[0]} cannot be joined with another clamp at {site}: which targets hold at "
                "once has no closed form; clamp both sides, or use another site"
            )
    scope = _one_scope(clamps, site)
    bounds = [
        (
            -math.inf if one.operator == "clamp_max" else length or 0.0,
            math.inf if one.operator == "clamp_min" else length or 0.0,
        )
        for one, length in clamps
    ]
    directions = torch.stack([one.at(site)[0].unit for one, _ in clamps])
    names = " and ".join(one.at(site)[0].label for one, _ in clamps)
    dual = operators.dual_basis(directions, names)
    low, high = torch.tensor(bounds, dtype=torch.float32).T
    return Step("clamp", scope, (directions, dual, low, high))


def _one_scope(clamps: Sequence[Acting], site: Site) -> Scope:
    if len(scopes := list(dict.fromkeys(str(one.scope) for one, _ in clamps))) > 1:
        raise RequestError(
            f"clamps at {site} have different scopes ({', '.join(scopes)}); one site needs one "
            "scope for all of them"
        )
    return clamps[0][0].scope


def _latents(
    clamps: Sequence[Acting], site: Site, device: torch.device, encoders: Encoders | None
) -> Step:
    scope = _one_scope(clamps, site)
    features = [one.at(site)[0] for one, _ in clamps]
    encoders = encoders or encoder.features().encoder
    saes = [encoders(feature.source, device) for feature in features]
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
    rows = sae.rows(index.to(device)).cpu()
    for feature, row in zip(features, rows, strict=True):
        adds = feature.unit * feature.activation_unit
        if not torch.allclose(adds, row, rtol=1e-4, atol=1e-5 * feature.activation_unit):
            raise RequestError(
                f"{feature.label} is not the decoder row of {sae.name} any more: the SAE's files "
                "have changed since; make the feature again"
            )
    targets = torch.tensor([length for _, length in clamps], dtype=torch.float32)
    return Step("latent_clamp", scope, (index, rows, targets), sae)


@dataclass(eq=False)
class Stage:
    """Operators of one kind for some rows (and heads, at z) of a batch.

    Attributes:
        which: the number of each row's operands among `operands`.
        single: that number if all rows have the same.
        mask: which positions are steered; None for all.
        whole: whether the rows are all of the batch, in its order.
        operands: one tensor each, with a first axis of different steps.
    """

    kind: str
    rows: Int[Tensor, " n"]
    heads: Int[Tensor, " n"] | None
    which: Int[Tensor, " n"]
    single: int | None
    mask: Bool[Tensor, "n pos"] | None
    whole: bool
    operands: tuple[Tensor, ...]
    sae: Encoder | None = None

    def moved(self, x: Float[Tensor, "n pos d"]) -> Float[Tensor, "n pos d"]:
        """The rows after their operator, where the mask says so."""
        if self.single is None:
            operands = [part[self.which] for part in self.operands]
        else:  # a view
            operands = [part[self.single].expand(len(x), *part.shape[1:]) for part in self.operands]
        if self.sae:
            operands[0] = self.sae.latents(x, operands[0])
        function: Any = getattr(operators, self.kind)
        out: Tensor = function(x, *operands)
        return out if self.mask is None else torch.where(self.mask[..., None], out, x)


class Bank:
    """All rows' interventions at one hook."""

    def __init__(self, stages: Sequence[Stage], batch: int) -> None:
        self.stages = stages
        self.batch = batch

    def apply(
        self, x: Float[Tensor, "batch pos *d"], place: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "batch pos *d"]:
        """Changes the steered positions, in `x` itself or in a new tensor.

        Args:
            x: [batch, pos, d_model], or [batch, pos, head, d_head] at z; left-aligned.
            place: where in `x` each row of the bank stands; None if it is the same.

        Raises:
            RequestError: without `place`, a batch of another size than the bank's.
        """
        if place is None and len(x) != self.batch:
            raise RequestError(f"this bank steers {self.batch} rows, the batch has {len(x)}")
        for stage in self.stages:
            if stage.whole and place is None and stage.heads is None:
                x = stage.moved(x)
                continue
            rows = stage.rows if place is None else place[stage.rows]
            if stage.heads is None:
                x.index_copy_(0, rows, stage.moved(x[rows]))
            else:
                x[rows, :, stage.heads] = stage.moved(x[rows, :, stage.heads])
        return x


class Operands:
    """The operands of steps, each on the device once, and banks that refer to them by number."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._numbers: dict[Step, int] = {}
        self._stacks: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def _add(self, steps: Iterable[Step]) -> None:
        """Puts steps that are new behind the others of their kind."""
        new: dict[tuple[object, ...], list[Step]] = {}
        for step in dict.fromkeys(steps):
            if step not in self._numbers:
                new.setdefault(_alike(step), []).append(step)
        for kind, members in new.items():
            known = self._stacks.get(kind, ())
            start = len(known[0]) if known else 0
            stacks = [torch.stack(p) for p in zip(*(s.operands for s in members), strict=True)]
            stacks = [part.to(self.device) for part in stacks]
            if known:
                stacks = [torch.cat(both) for both in zip(known, stacks, strict=True)]
            self._stacks[kind] = tuple(stacks)
            self._numbers.update({step: start + n for n, step in enumerate(members)})

    def banks(self, rows: Sequence[Steered], spans: Sequence[tuple[int, int]]) -> dict[Hook, Bank]:
        """Banks for some positions of a batch of rows.

        A step that steers none of a row's positions is left out.

        Args:
            spans: of each row the first position and how many; shorter ones are right-padded.
        """
        width = max(length for _, length in spans)
        numbers: dict[Steering, list[int]] = {}
        for number, (steering, _) in enumerate(rows):
            numbers.setdefault(steering, []).append(number)
        members: dict[tuple[object, ...], list[tuple[int, int, Step, tuple[bool, ...]]]] = {}
        masks: dict[tuple[object, ...], tuple[bool, ...]] = {}
        for steering, mine in numbers.items():
            reached: dict[Scope, list[tuple[int, tuple[bool, ...]]]] = {}
            for site, steps in steering.steps.items():
                for order, step in enumerate(steps):
                    if step.scope not in reached:
                        reached[step.scope] = [
                            (row, mask)
                            for row in mine
                            if any(
                                mask := _mask(masks, step.scope, rows[row][1], spans[row], width)
                            )
                        ]
                    if reached[step.scope]:
                        slot = ((site.component, site.layer), order, *_alike(step))
                        members.setdefault(slot, []).extend(
                            (row, site.head or 0, step, mask) for row, mask in reached[step.scope]
                        )
        self._add(step for some in members.values() for _, _, step, _ in some)
        return self._stacked(members, len(rows))

    def _stacked(
        self,
        members: dict[tuple[Any, ...], list[tuple[int, int, Step, tuple[bool, ...]]]],
        batch: int,
    ) -> dict[Hook, Bank]:
        """Stages in their order. What is equal among them goes to the device once, all together."""
        lists: dict[tuple[int, ...], int] = {}
        tables: dict[tuple[tuple[bool, ...], ...], int] = {}
        plans: list[tuple[Any, ...]] = []
        for slot in sorted(members, key=lambda slot: (slot[0], slot[1], str(slot[2:]))):
            some = sorted(members[slot], key=lambda member: member[:2])
            rows, heads, steps, mask = zip(*some, strict=True)
            which = tuple(self._numbers[step] for step in steps)
            at = [lists.setdefault(one, len(lists)) for one in (rows, heads, which)]
            table = None if all(map(all, mask)) else tables.setdefault(mask, len(tables))
            single = which[0] if len(set(which)) == 1 else None
            plans.append((slot, steps[0], at, single, table, rows == tuple(range(batch))))
        flat = torch.tensor([n for one in lists for n in one], dtype=torch.long).to(self.device)
        indices = flat.split([len(one) for one in lists])
        stages: dict[Hook, list[Stage]] = {}
        if tables:
            every = torch.tensor([mask for table in tables for mask in table]).to(self.device)
            chosen = every.split([len(table) for table in tables])
        for slot, step, (row, head, which), single, table, whole in plans:
            stage = Stage(
                step.kind,
                indices[row],
                indices[head] if slot[0][0] == "z" else None,
                indices[which],
                single,
                None if table is None else chosen[table],
                whole,
                self._stacks[_alike(step)],
                step.sae,
            )
            stages.setdefault(slot[0], []).append(stage)
        return {hook: Bank(parts, batch) for hook, parts in stages.items()}


def _alike(step: Step) -> tuple[object, ...]:
    """What steps have in common that are stacked."""
    return step.kind, *(tuple(part.shape) for part in step.operands), id(step.sae)


def _mask(
    known: dict[tuple[object, ...], tuple[bool, ...]],
    scope: Scope,
    prompt: Encoded,
    span: tuple[int, int],
    width: int,
) -> tuple[bool, ...]:
    """Which positions of a span are in scope, False at padding."""
    key = scope, id(prompt), span
    if key not in known:
        begin, length = span
        inside = scope.prompt_mask(prompt.content)[begin : begin + length]
        first, last = scope.after_prompt(len(prompt.ids))
        after = range(max(begin, len(prompt.ids)), begin + length)
        chosen = [*inside, *(first <= position < last for position in after)]
        known[key] = (*chosen, *[False] * (width - length))
    return known[key]
