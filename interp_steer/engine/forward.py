"""Forward passes of a batch whose rows are steered differently.

A batch is right-aligned: row r's token at absolute position p stands in slot `pad[r] + p`, and the
last token of every prompt in the last slot. Slots left of a row's first token are padding: no query
looks at them, and nothing is steered there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_steer.engine.bank import Bank, Hook, compile_banks
from interp_steer.model.block import Change, exactly
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.intervention import Intervention

Steered = tuple[Sequence[Intervention], Encoded]
"""A row as forward passes see it: resolved interventions, and the prompt."""


@runtime_checkable
class Watch(Protocol):
    """Reads activations on their way, after the interventions there."""

    hooks: set[Hook]

    def __call__(self, hook: Hook, x: Tensor, place: Tensor | None) -> None:
        """`place` says where in `x` each row stands; None if each stands at its own number."""


class Cache:
    """Keys and values of a batch, allocated once: `[row, kv_head, slot, d_head]` for each layer."""

    def __init__(self, model: SteeringModel, rows: int, capacity: int) -> None:
        shape = (rows, model.n_kv_heads, capacity, model.d_head)
        self.keys, self.values = (
            [
                torch.empty(shape, dtype=model.dtype, device=model.device)
                for _ in range(model.n_layers)
            ]
            for _ in range(2)
        )
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
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

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
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


class SharedPrefill:
    """One batch in which rows share what is equal among them.

    Rows with the same tokens start as one unsteered entry, their trunk. A row becomes an entry of
    its own just before its first steered block. A trunk is dropped once no row is left on it. Rows
    that are steered alike too, such as a sweep's seeds, stay one entry throughout.
    """

    def __init__(
        self, model: SteeringModel, rows: Sequence[Steered], sequences: Sequence[Sequence[int]]
    ) -> None:
        numbers = {ids: n for n, ids in enumerate(dict.fromkeys(map(tuple, sequences)))}
        self.trunk_of = [numbers[tuple(ids)] for ids in sequences]
        self.leaves = [shared_blocks(steer, model.n_layers) for steer, _ in rows]
        # the prompt too: one sequence may be divided into prompt and continuation in several ways
        alike = [
            (trunk, prompt, *map(id, steer))
            for trunk, (steer, prompt) in zip(self.trunk_of, rows, strict=True)
        ]
        firsts = {key: r for r, key in reversed(list(enumerate(alike)))}
        self.first = [firsts[key] for key in alike]
        layout = Layout.of(list(numbers), model.device)
        self._positions, self._mask = layout.positions, layout.mask()
        self.x = model.embed(layout.ids)
        self._rotary = model.rotary(self.x, self._positions.clamp_min(0))
        self.trunk_at = {n: n for n in range(len(numbers))}
        self.row_at: dict[int, int] = {}
        self._settle(list(range(len(numbers))))

    def regroup(self, layer: int) -> None:
        """Lets the rows leave that are steered from this block on."""
        rows = range(len(self.leaves))
        followed = sorted({self.trunk_of[r] for r in rows if self.leaves[r] > layer})
        away = [r for r in rows if self.leaves[r] <= layer and self.first[r] == r]
        if len(away) == len(self.row_at) and len(followed) == len(self.trunk_at):
            return
        sources = [*(self.trunk_at[n] for n in followed), *(self._stands(r) for r in away)]
        self.x = self.x[torch.tensor(sources, device=self.x.device)]
        self.trunk_at = {n: i for i, n in enumerate(followed)}
        self.row_at = {r: len(followed) + i for i, r in enumerate(away)}
        self._settle([*followed, *(self.trunk_of[r] for r in away)])

    def _stands(self, row: int) -> int:
        """The entry of the batch that is, or still speaks for, a row."""
        return self.row_at.get(self.first[row], self.trunk_at.get(self.trunk_of[row], -1))

    def _settle(self, trunks: list[int]) -> None:
        """What attention needs for a batch whose entries have these trunks' tokens."""
        index = torch.tensor(trunks, device=self.x.device)
        self.positions = self._positions[index]
        self.rotary = self._rotary[0][index], self._rotary[1][index]
        self.mask = None if self._mask is None else self._mask[index]
        standing = [self._stands(r) for r in range(len(self.leaves))]
        self.place = torch.tensor(standing, device=self.x.device)


@exactly()
def run(
    model: SteeringModel,
    rows: Sequence[Steered],
    sequences: Sequence[Sequence[int]],
    cache: Cache | None = None,
    watch: Watch | None = None,
) -> Float[Tensor, "batch slot d_model"]:
    """Whole sequences through the model, computing once what is equal.

    A sweep over layers on one prompt costs about half of separate passes.

    Args:
        rows: interventions and prompt of each row.
        sequences: token ids of each row: its prompt, or prompt and continuation.
        cache: receives every row's keys and values.

    Returns:
        The stream after the last block, right-aligned.
    """
    banks = compile_banks(rows, model.device)
    batch = SharedPrefill(model, rows, sequences)
    slots = batch.x.shape[1]

    def at(hook: Hook, x: Tensor) -> Tensor:
        if hook in banks:
            x = banks[hook].apply(x, batch.positions, batch.place)
        if watch and hook in watch.hooks:
            watch(hook, x, batch.place)
        return x

    inner = _inner(banks, watch, at)
    for layer in range(model.n_layers):
        batch.regroup(layer)
        if layer > 0:
            batch.x = at(("resid_post", layer - 1), batch.x)
        batch.x = at(("resid_pre", layer), batch.x)
        capture = _Capture() if cache else None
        changes = inner.get(layer, {})
        batch.x = model.block(layer, batch.x, batch.rotary, batch.mask, capture, changes)
        if cache and capture:
            cache.keys[layer][:, :, :slots] = capture.keys[batch.place]
            cache.values[layer][:, :, :slots] = capture.values[batch.place]
    batch.regroup(model.n_layers)
    x = at(("resid_post", model.n_layers - 1), batch.x)
    if cache:
        cache.length = slots
    return x[batch.place]


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
    @exactly()
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

    @exactly()
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

        at = partial(self._at, positions, watch, in_prompt)
        x = model.embed(tokens[:, None])
        rotary = model.rotary(x, positions)
        inner = _inner(self.banks, watch, at)
        for layer in range(model.n_layers):
            x = at(("resid_pre", layer), x)
            x = model.block(layer, x, rotary, mask, cache, inner.get(layer, {}))
            x = at(("resid_post", layer), x)
        return x[:, 0]

    def _at(
        self, positions: Tensor, watch: Watch | None, in_prompt: bool, hook: Hook, x: Tensor
    ) -> Tensor:
        """What a hook makes of one position of every row."""
        bank = self.banks.get(hook)
        if bank is not None:
            x = bank.apply(x, positions) if in_prompt else bank.apply_next(x, positions)
        if watch and hook in watch.hooks:
            watch(hook, x, None)
        return x

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


def _inner(
    banks: dict[Hook, Bank],
    watch: Watch | None,
    at: Callable[[Hook, Tensor], Tensor],
) -> dict[int, dict[str, Change]]:
    """Changes inside blocks, by layer and component; none where nobody steers or watches."""
    inner: dict[int, dict[str, Change]] = {}
    for component, layer in set(banks) | (watch.hooks if watch else set()):
        if component not in ("resid_pre", "resid_post"):
            inner.setdefault(layer, {})[component] = partial(at, (component, layer))
    return inner
