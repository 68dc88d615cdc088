"""Forward passes of a batch whose rows are steered differently.

A batch is right-aligned: row r's token at absolute position p stands in slot `pad[r] + p`, and the
last token of every prompt in the last slot. Slots left of a row's first token are padding: no query
looks at them, and nothing is steered there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_steer.bank import Bank, Hook, compile_banks
from interp_steer.intervention import Intervention
from interp_steer.model import Encoded, SteeringModel

Steered = tuple[Sequence[Intervention], Encoded]
"""A row as forward passes see it: resolved interventions, and the prompt."""


class Watch(Protocol):
    """Reads activations on their way, after the interventions there."""

    hooks: set[Hook]

    def __call__(self, hook: Hook, x: Tensor, place: Tensor | None) -> None:
        """`place` says where in `x` each row stands; None if each stands at its own number."""


class Cache:
    """Keys and values of a batch, allocated once: `[row, kv_head, slot, d_head]` for each layer."""

    def __init__(self, model: SteeringModel, rows: int, capacity: int) -> None:
        shape = (rows, model.n_kv_heads, capacity, model.d_head)
        new = dict(dtype=model.dtype, device=model.device)
        self.keys = [torch.empty(shape, **new) for _ in range(model.n_layers)]  # type: ignore[arg-type]
        self.values = [torch.empty(shape, **new) for _ in range(model.n_layers)]  # type: ignore[arg-type]
        self.length = 0

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self.keys[0].shape[2]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """What a block calls: stores the newest slot, gives all up to it."""
        end = self.length
        self.keys[layer][:, :, end - keys.shape[2] : end] = keys
        self.values[layer][:, :, end - keys.shape[2] : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps these rows, in this order."""
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer].index_select(0, rows)
            self.values[layer] = self.values[layer].index_select(0, rows)

    @staticmethod
    def joined(model: SteeringModel, parts: Sequence["Cache"], capacity: int) -> "Cache":
        """Several batches as one, right-aligned at the longest."""
        rows = sum(part.keys[0].shape[0] for part in parts)
        both = Cache(model, rows, capacity)
        both.length = max(part.length for part in parts)
        for layer in range(model.n_layers):
            row = 0
            for part in parts:
                n, start = part.keys[0].shape[0], both.length - part.length
                for mine, its in (
                    (both.keys[layer], part.keys[layer]),
                    (both.values[layer], part.values[layer]),
                ):
                    # padding is masked, but a masked NaN would still spread
                    mine[row : row + n, :, :start] = 0
                    mine[row : row + n, :, start : both.length] = its[:, :, : part.length]
                row += n
        return both


class _Capture:
    """Stands in for a cache during prefill: keeps what one block computed, adds nothing."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


def shared_blocks(steer: Sequence[Intervention], n_layers: int) -> int:
    """How many blocks of a row equal the unsteered model's, keys and values included."""
    return min(
        (site.layer + (site.component == "resid_post") for one in steer for site in one.sites),
        default=n_layers + 1,
    )


def begins_late(row: Steered) -> bool:
    """Whether a row's prompt is unsteered before its last position."""
    steer, prompt = row
    return bool(steer) and not any(any(one.scope.prompt_mask(prompt.content)[:-1]) for one in steer)


@dataclass
class Layout:
    """A right-aligned batch of token sequences."""

    ids: Int[Tensor, "batch slot"]
    pad: Int[Tensor, " batch"]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> "Layout":
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        pad = torch.tensor([longest - len(sequence) for sequence in sequences])
        return cls(ids.to(device), pad.to(device))

    @property
    def positions(self) -> Int[Tensor, "batch slot"]:
        """Absolute positions; negative ones are padding."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] - self.pad[:, None]

    def mask(self) -> Bool[Tensor, "batch 1 slot key_slot"] | None:
        """Causal, padding left out; None where plain causal says the same."""
        if not bool(self.pad.any()):
            return None
        n, device = self.ids.shape[1], self.ids.device
        causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        mask = causal[None] & (self.positions >= 0)[:, None, :]
        mask |= torch.eye(n, dtype=torch.bool, device=device)  # padding looks at itself: no NaN
        return mask[:, None]


def run(
    model: SteeringModel,
    rows: Sequence[Steered],
    sequences: Sequence[Sequence[int]],
    cache: Cache | None = None,
    watch: Watch | None = None,
) -> Float[Tensor, "batch slot d_model"]:
    """Whole sequences through the model, computing together what is equal.

    Rows with one token sequence form a trunk that is computed once, unsteered. A row leaves its
    trunk at its first steered block, so a sweep over layers costs about half of separate passes.

    Args:
        rows: interventions and prompt of each row.
        sequences: token ids of each row: its prompt, or prompt and continuation.
        cache: receives every row's keys and values.

    Returns:
        The stream after the last block, right-aligned.
    """
    n_layers = model.n_layers
    trunks = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, sequences)))}
    trunk_of = [trunks[tuple(ids)] for ids in sequences]
    leaves = [shared_blocks(steer, n_layers) for steer, _ in rows]
    layout = Layout.of(list(trunks), model.device)
    banks = compile_banks(rows, model.device)

    slots = layout.ids.shape[1]
    trunk_positions, trunk_mask = layout.positions, layout.mask()
    x = model.embed(layout.ids)
    cos, sin = model.rotary(x, trunk_positions.clamp_min(0))
    # the batch as it goes: which trunk each entry follows, and each trunk's and row's entry
    entries = list(range(len(trunks)))
    trunk_at: dict[int, int] = {t: t for t in range(len(trunks))}
    row_at: dict[int, int] = {}

    def regroup(layer: int) -> None:
        """Rows that are steered from here on leave their trunks; trunks nobody follows end."""
        nonlocal x, entries, trunk_at, row_at
        needed = sorted({trunk_of[r] for r in range(len(rows)) if leaves[r] > layer})
        away = [r for r in range(len(rows)) if leaves[r] <= layer]
        if len(away) == len(row_at) and len(needed) == len(trunk_at):
            return
        sources = [trunk_at[t] for t in needed]
        sources += [row_at[r] if r in row_at else trunk_at[trunk_of[r]] for r in away]
        x = x[torch.tensor(sources, device=x.device)]
        entries = [*needed, *(trunk_of[r] for r in away)]
        trunk_at = {t: i for i, t in enumerate(needed)}
        row_at = {r: len(needed) + i for i, r in enumerate(away)}
        refresh()

    def refresh() -> None:
        """Each entry's positions, rotary angles and mask, and where every row stands."""
        nonlocal positions, rotary, mask, place
        index = torch.tensor(entries, device=x.device)
        positions, rotary = trunk_positions[index], (cos[index], sin[index])
        mask = None if trunk_mask is None else trunk_mask[index]
        standing = [row_at[r] if r in row_at else trunk_at[trunk_of[r]] for r in range(len(rows))]
        place = torch.tensor(standing, device=x.device)

    positions, rotary, mask, place = trunk_positions, (cos, sin), trunk_mask, trunk_positions[:, 0]
    refresh()

    def at(hook: Hook, x: Tensor) -> Tensor:
        if hook in banks:
            x = banks[hook].apply(x, positions, place)
        if watch and hook in watch.hooks:
            watch(hook, x, place)
        return x

    inner = _inner_hooks(banks, watch, at)
    for layer in range(n_layers + 1):
        regroup(layer)
        if layer > 0:
            x = at(("resid_post", layer - 1), x)
        if layer == n_layers:
            break
        x = at(("resid_pre", layer), x)
        capture = _Capture() if cache else None
        with model.inside({hook: f for hook, f in inner.items() if hook[1] == layer}):
            x = model.block(layer, x, rotary, mask, capture)
        if cache and capture:
            cache.keys[layer][:, :, :slots] = capture.keys[place]
            cache.values[layer][:, :, :slots] = capture.values[place]
    if cache:
        cache.length = slots
    return x[place]


class Stream:
    """A batch in the middle of decoding: keys and values, compiled interventions, padding."""

    def __init__(self, model: SteeringModel, rows: Sequence[Steered], cache: Cache) -> None:
        self.model, self.rows, self.cache = model, list(rows), cache
        lengths = torch.tensor([len(prompt.ids) for _, prompt in rows], device=model.device)
        self.pad = cache.length - lengths  # of the slots that the prompts fill
        self._compile()

    def _compile(self) -> None:
        self.banks = compile_banks(self.rows, self.model.device)
        self.padded = bool(self.pad.any())

    @classmethod
    def prefill(
        cls,
        model: SteeringModel,
        rows: Sequence[Steered],
        room: int,
        watch: Watch | None = None,
    ) -> tuple["Stream", Float[Tensor, "batch d_model"]]:
        """Reads prompts, all of them steered late or none.

        Rows that are steered from their last prompt position on share the whole prompt; that
        position is then read once more, steered, as a decoding step would.

        Returns:
            The stream with room for `room` more slots, and the residual stream that predicts each
            row's first token.
        """
        late = begins_late(rows[0])
        longest = max(len(prompt.ids) for _, prompt in rows)
        cache = Cache(model, len(rows), longest + room)
        read: list[Steered] = [((), prompt) for _, prompt in rows] if late else list(rows)
        x = run(model, read, [prompt.ids for _, prompt in rows], cache, watch)
        stream = cls(model, rows, cache)
        if not late:
            return stream, x[:, -1]
        cache.length -= 1
        last = torch.tensor([prompt.ids[-1] for _, prompt in rows], device=model.device)
        return stream, stream.step(last, watch, in_prompt=True)

    def step(
        self, tokens: Int[Tensor, " batch"], watch: Watch | None = None, in_prompt: bool = False
    ) -> Float[Tensor, "batch d_model"]:
        """Reads one more token of every row; gives the stream after the last block."""
        model, cache = self.model, self.cache
        slot = cache.length
        cache.length += 1
        positions = slot - self.pad[:, None]
        mask = None
        if self.padded:
            slots = torch.arange(slot + 1, device=model.device)
            mask = (slots[None] >= self.pad[:, None])[:, None, None]

        def at(hook: Hook, x: Tensor) -> Tensor:
            bank = self.banks.get(hook)
            if bank is not None:
                x = bank.apply(x, positions) if in_prompt else bank.apply_next(x, positions)
            if watch and hook in watch.hooks:
                watch(hook, x, None)
            return x

        x = model.embed(tokens[:, None])
        rotary = model.rotary(x, positions)
        with model.inside(_inner_hooks(self.banks, watch, at)):
            for layer in range(model.n_layers):
                x = at(("resid_pre", layer), x)
                x = model.block(layer, x, rotary, mask, cache)
                x = at(("resid_post", layer), x)
        return x[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Leaves out all other rows."""
        index = torch.tensor(rows, device=self.model.device)
        self.rows = [self.rows[r] for r in rows]
        self.pad = self.pad[index]
        self.cache.select(index)
        self._compile()

    def joined(self, other: "Stream", room: int) -> "Stream":
        """Both batches as one, this one's rows first, with room for `room` more slots."""
        length = max(self.cache.length, other.cache.length)
        both = Cache.joined(self.model, [self.cache, other.cache], length + room)
        pads = [s.pad + length - s.cache.length for s in (self, other)]
        merged = Stream(self.model, [*self.rows, *other.rows], both)
        merged.pad = torch.cat(pads)
        merged.padded = bool(merged.pad.any())
        return merged


def _inner_hooks(
    banks: dict[Hook, Bank],
    watch: Watch | None,
    at: Callable[[Hook, Tensor], Tensor],
) -> dict[Hook, Callable[[Tensor], Tensor]]:
    """Changes inside blocks; hooks that nobody steers or watches are not registered at all."""
    hooks = set(banks) | (watch.hooks if watch else set())
    inner = {hook for hook in hooks if hook[0] not in ("resid_pre", "resid_post")}
    return {hook: partial(at, hook) for hook in inner}
