"""Passes that branch off an unchanged one, sharing what they have in common.

The unchanged pass is computed once and the stream before every block is kept; each variant starts
from the kept stream at its first changed block, and all that have started pass through a block as
one batch. Over all layers that is about half of full passes.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_steer.engine.bank import Bank, Hook, Operands, Steered
from interp_steer.errors import RequestError, nearest
from interp_steer.model.block import exactly
from interp_steer.model.forward import padded
from interp_steer.model.model import SteeringModel

# what is changed for each component
HOOKS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("resid_pre",),
    "resid_post": ("resid_post",),
    "block": ("attn_out", "mlp_out"),
    "attn_out": ("attn_out",),
    "mlp_out": ("mlp_out",),
    "z": ("z",),
    "direction": ("resid_post",),
    "feature": (),
}
BETWEEN = ("resid_pre", "resid_post")  # between blocks, not inside one


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of activations at one place, for all items of a trunk.

    Variants that hold the same edits (the same objects) up to a block share the computation.

    Attributes:
        component, layer, head: where; without a head `z` is changed whole.
        change: a function on `[item, pos, d_model]`; at one head `[item, pos, d_head]`, at the
            whole `z` `[item, pos, head, d_head]`.
    """

    component: str
    layer: int
    change: Callable[[Tensor], Tensor]
    head: int | None = None

    @property
    def block(self) -> int:
        """The first block that it changes, or whose input it changes."""
        return self.layer + (self.component == "resid_post")


Variant = tuple[Edit, ...]


class Trunk:
    """The unchanged pass over some token sequences, from which variants branch off.

    The sequences are right-padded: padding comes after every real token, so that plain causal
    attention is right for sequences of any lengths.

    Attributes:
        real: which positions are no padding, [item, pos].
        positions: absolute positions, -1 at padding, [item, pos].
        streams: the stream before each block, and after the last one; [item, pos, d_model] each.
        kept: activations at the hooks that were asked for.
    """

    def __init__(
        self,
        model: SteeringModel,
        sequences: Sequence[Sequence[int]],
        keep: Collection[Hook] = (),
    ) -> None:
        """Computes it; `keep` names hooks whose activations are kept."""
        self.model = model
        ids, self.real = padded(sequences, model.device)
        where = torch.arange(ids.shape[1], device=model.device)[None]
        self.positions = torch.where(self.real, where, -1)
        self.streams: list[Float[Tensor, "item pos d_model"]] = []
        self.kept: dict[Hook, Tensor] = {}
        with exactly():
            x = model.embed(ids)
            self._rotary = model.rotary(x, where)
            for layer in range(model.n_layers):
                self.streams.append(x)
                changes = {
                    hook[0]: partial(self._keep, hook)
                    for hook in keep
                    if hook[1] == layer and hook[0] not in BETWEEN
                }
                x = model.block(layer, x, self._rotary, changes=changes)
            self.streams.append(x)

    def _keep(self, hook: Hook, x: Tensor) -> Tensor:
        self.kept[hook] = x
        return x

    def value(self, component: str, layer: int, head: int | None = None) -> Tensor:
        """An activation of the unchanged pass, `[item, pos, d_model]` or as `Edit.change` has it;
        one inside a block must have been kept.
        """
        if component in BETWEEN:
            return self.streams[layer + (component == "resid_post")]
        x = self.kept[component, layer]
        return x if head is None else x[:, :, head]

    def changed(self, first: bool = False) -> Bool[Tensor, "item pos"]:
        """Positions open to ablation: no padding, and the first one only if asked."""
        return self.positions >= (0 if first else 1)

    def steered(self, rows: Sequence[Steered]) -> Variant:
        """Edits that steer each item by interventions of its own."""
        spans = [(0, n) for n in self.real.sum(1).tolist()]
        banks = Operands(self.model.device).banks(rows, spans)
        return tuple(
            Edit(component, layer, partial(_steered, bank))
            for (component, layer), bank in banks.items()
        )

    @exactly()
    def branch(
        self, variants: Sequence[Variant], resume: bool = True
    ) -> Float[Tensor, "variant item pos d_model"]:
        """The stream after the last block under each variant.

        At every block the batch holds one entry for each different history of edits so far; those
        of equal history part where they begin to differ.

        Args:
            resume: False computes every variant from the first block on, for comparison.
        """

        def histories(layer: int) -> list[tuple[int, Variant]]:
            so_far = [tuple(e for e in variant if e.block <= layer) for variant in variants]
            return [(-1 if resume else n, edits) for n, edits in enumerate(so_far)]

        unchanged: tuple[int, Variant] = (-1, ())
        x = self.streams[0][None][:0]
        before = [unchanged] * len(variants)
        at: dict[tuple[int, Variant], int] = {}
        for layer in range(self.model.n_layers + 1):
            now = histories(layer)
            parents = {new: old for new, old in zip(now, before, strict=True) if new != unchanged}
            if parents.keys() != at.keys():
                sources = [at.get(old, -1) + 1 for old in parents.values()]
                x = torch.cat([self.streams[layer][None], x])[sources]
                at = {history: n for n, history in enumerate(parents)}
            before = now
            if at:
                x = self._through(x, layer, [edits for _, edits in at])
        order = [at.get(history, -1) + 1 for history in before]
        return torch.cat([self.streams[-1][None], x])[order]

    def _through(
        self, x: Float[Tensor, "entry item pos d_model"], layer: int, edits: list[Variant]
    ) -> Float[Tensor, "entry item pos d_model"]:
        """Edits before a block, and the block with the edits inside it."""
        inside: dict[str, list[tuple[int, Edit]]] = {}
        for entry, variant in enumerate(edits):
            for edit in variant:
                if edit.block != layer:
                    continue
                if edit.component in BETWEEN:
                    x[entry] = edit.change(x[entry])  # x is the batch's own copy
                else:
                    inside.setdefault(edit.component, []).append((entry, edit))
        if layer == self.model.n_layers:
            return x
        changes = {
            component: partial(_edited, x.shape[:2], some) for component, some in inside.items()
        }
        flat = self.model.block(layer, x.flatten(0, 1), self._rotary, changes=changes)
        return flat.view(x.shape)


def _steered(bank: Bank, x: Tensor) -> Tensor:
    return bank.apply(x.clone())


def _edited(entries: torch.Size, edits: list[tuple[int, Edit]], inner: Tensor) -> Tensor:
    """An activation inside a block, `[entry x item, pos, ...]`, with the edits of its entries."""
    out = inner.clone().view(*entries, *inner.shape[1:])
    for entry, edit in edits:
        part = out[entry] if edit.head is None else out[entry, :, :, edit.head]
        part.copy_(edit.change(part))
    return torch.flatten(out, 0, 1)


def put(
    mask: Bool[Tensor, "item pos"], value: Float[Tensor, "..."], x: Float[Tensor, "item pos *d"]
) -> Float[Tensor, "item pos *d"]:
    """`value` in place of `x` where the mask says so."""
    return torch.where(mask[(..., *(None,) * (x.ndim - 2))], value.to(x.dtype), x)


def check_names(kind: str, given: Sequence[str], choices: Sequence[str]) -> None:
    """Raises RequestError for a name that is none of the choices, or for none at all."""
    if not given:
        raise RequestError(f"no {kind} given{nearest('', choices)}")
    for name in given:
        if name not in choices:
            raise RequestError(f"unknown {kind} {name!r}{nearest(name, choices)}")


def check_range(kind: str, given: Sequence[int] | None, count: int, name: str) -> list[int]:
    """Numbers of layers or heads, all for None; raises RequestError for one out of range."""
    numbers = list(range(count)) if given is None else list(given)
    if not numbers:
        raise RequestError(f"no {kind} given: {name} has {kind}s 0-{count - 1}")
    for one in numbers:
        if not 0 <= one < count:
            raise RequestError(f"{kind} {one} is out of range: {name} has {kind}s 0-{count - 1}")
    return numbers
