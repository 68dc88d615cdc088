"""Whole sequences through the model, rows steered differently, what is equal computed once.

A batch is left-aligned: the token at absolute position p stands in slot p, padding at the right
end. Rows with the same tokens share a pass up to the first block that is steered. Rows whose prompt
is steered alike, and who differ from its last position on, share all of it before that position.
Rows of different prompts share the tokens with which all begin, such as a template's system prompt,
where these are steered alike.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, takewhile
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.engine.bank import Bank, Hook, Operands, Steered, Steering
from interp_steer.model.block import Change, attention, causal, exactly
from interp_steer.model.forward import padded
from interp_steer.model.model import SteeringModel

SLACK = 64
"""Tokens of padding that cost less than a pass of their own."""


Place = tuple[int, int, int]
"""A row's number, its entry in a batch, and how many new positions it has there."""


@runtime_checkable
class Watch(Protocol):
    """Reads activations on their way, after the interventions there."""

    hooks: set[Hook]

    def __call__(self, hook: Hook, x: Tensor, places: Sequence[Place]) -> None:
        """`x[entry, :new]` holds the newest positions of a row, for (row, entry, new) of places."""


class Segment:
    """Consecutive tokens of some rows, which pass through the blocks as one batch.

    Rows with the same tokens after the same ones start as one unsteered entry, their trunk. A row
    becomes an entry of its own just before its first steered block. A trunk is dropped once no row
    is left on it.

    Attributes:
        x: the residual stream, [entry, pos, d_model].
        keys, values: those of the latest block, [entry, kv_head, pos, d_head].
        place: the entry of each row.
        begins, tokens: each row's first position here, and how many it has.
    """

    keys: Float[Tensor, "entry kv_head pos d_head"]
    values: Float[Tensor, "entry kv_head pos d_head"]

    def __init__(
        self,
        model: SteeringModel,
        rows: Sequence[int],
        serves: Sequence[tuple[int, int]],
        ids: Sequence[Sequence[int]],
        leaves: Sequence[float],
        trunks: Sequence[Hashable],
        past: "tuple[Segment, Sequence[int]] | None" = None,
    ) -> None:
        """Embeds the tokens.

        Args:
            rows: numbers of the distinct rows.
            serves: for every row its number, and the place in `rows` of the row that it equals.
            leaves: the first block that is steered, of each row.
            trunks: rows with the same one have the same tokens and the same past.
            past: the segment before this one, and which row of it each row follows.
        """
        self.model, self.rows, self.serves, self.leaves = model, rows, serves, leaves
        self.tokens = [len(one) for one in ids]
        self.past = past[0] if past else None
        self.follows = past[1] if past else ()
        self.begins = [self.past.tokens[n] for n in self.follows] if self.past else [0] * len(ids)
        numbers = {trunk: n for n, trunk in enumerate(dict.fromkeys(trunks))}
        self.trunk_of = [numbers[trunk] for trunk in trunks]
        examples = [self.trunk_of.index(n) for n in range(len(numbers))]
        batch, _ = padded([ids[r] for r in examples], model.device)
        self.width = batch.shape[1]
        starts = torch.tensor(_one_if_equal([self.begins[r] for r in examples])).to(model.device)
        self.x = model.embed(batch)
        positions = starts[:, None] + torch.arange(self.width, device=model.device)
        self._rotary = model.rotary(self.x, positions)
        self._on_trunk = dict(enumerate(range(len(numbers))))
        self._alone: dict[int, int] = {}
        self._settle(examples)

    def regroup(self, layer: int) -> None:
        """Lets the rows leave their trunk that are steered from this block on."""
        numbers = range(len(self.rows))
        followed = sorted({self.trunk_of[r] for r in numbers if self.leaves[r] > layer})
        away = [r for r in numbers if self.leaves[r] <= layer]
        if len(away) != len(self._alone) or len(followed) != len(self._on_trunk):
            trunks = [next(r for r in numbers if self._stays(r, n, layer)) for n in followed]
            sources = [self.standing[r] for r in [*trunks, *away]]
            self.x = self.x[torch.tensor(sources, device=self.x.device)]
            self._on_trunk = {n: i for i, n in enumerate(followed)}
            self._alone = {r: len(followed) + i for i, r in enumerate(away)}
            self._settle([*trunks, *away])
        elif self.past and self._followed != self.past.standing:
            self._settle(self._examples)

    def _stays(self, row: int, trunk: int, layer: int) -> bool:
        return self.trunk_of[row] == trunk and self.leaves[row] > layer

    def _settle(self, examples: Sequence[int]) -> None:
        """What attention needs of entries, of each of which this is a row."""
        self._examples = examples
        device = self.model.device
        self.standing = [
            self._alone.get(r, self._on_trunk.get(self.trunk_of[r], -1))
            for r in range(len(self.rows))
        ]
        self.place = torch.tensor(self.standing, device=device)
        cos, sin = self._rotary
        if len(cos) > 1:
            index = torch.tensor([self.trunk_of[r] for r in examples], device=device)
            cos, sin = cos[index], sin[index]
        self.rotary = cos, sin
        if self.past:
            self._followed = self.past.standing
            behind = [self.past.standing[self.follows[r]] for r in examples]
            self._behind = torch.tensor(behind, device=device)
            self._mask = self._seen([self.begins[r] for r in examples])

    def _seen(self, begins: Sequence[int]) -> Tensor | None:
        """Which keys, those of the past before those of the segment, each position attends to."""
        assert self.past
        before, device = self.past.width, self.model.device
        if self.width == 1 and min(begins) == before:
            return None
        key = torch.arange(before + self.width, device=device)
        own = key - before <= torch.arange(self.width, device=device)[:, None]
        past = key < torch.tensor(_one_if_equal(begins), device=device)[:, None]
        return torch.where(key < before, past[:, None], own[None])[:, None]

    def through(self, layer: int, changes: Mapping[str, Change]) -> None:
        """One block."""
        self.x = self.model.block(layer, self.x, self.rotary, self._attend, changes)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys, self.values = k, v
        if not self.past:
            return causal(layer, q, k, v)
        pasts = self.past.keys[self._behind], self.past.values[self._behind]
        k, v = (torch.cat([past, new], 2) for past, new in zip(pasts, (k, v), strict=True))
        return attention(q, k, v, self._mask)


def _one_if_equal(numbers: Sequence[int]) -> list[int]:
    """Equal numbers as a single one, which broadcasts."""
    return [*numbers[:1]] if len(set(numbers)) == 1 else [*numbers]


Keep = Callable[[int, Segment], None]
"""Takes the keys and values of a segment after a block."""

Part = tuple[Steering | None, Hashable]
"""What decides the stream of a prompt's beginning: its steering there (None: unsteered), and its
tokens or, where all begin alike, which of them are steered.
"""


@exactly()
def read(
    model: SteeringModel,
    operands: Operands,
    rows: Sequence[Steered],
    sequences: Sequence[Sequence[int]],
    keep: Keep | None = None,
    watch: Watch | None = None,
) -> Float[Tensor, "tokens d_model"]:
    """Reads sequences that begin with the rows' prompts.

    A sweep over layers on one prompt costs about half of separate passes. Rows that are steered
    from the last position of a prompt on, or read on differently, share the rest of that prompt.
    Prompts under one steering share the tokens with which all of them begin.

    Args:
        rows: steering and prompt of each row.
        sequences: token ids of each row: its prompt, or prompt and continuation.
        keep: receives keys and values.

    Returns:
        The residual stream after the last block, of each row from the last position of its prompt
        on, one row after the other.
    """
    twins: dict[Hashable, list[int]] = {}
    for row, ((steering, prompt), ids) in enumerate(zip(rows, sequences, strict=True)):
        twins.setdefault((steering, prompt, tuple(ids)), []).append(row)
    wanted = [len(ids) - len(p.ids) + 1 for (_, p), ids in zip(rows, sequences, strict=True)]
    starts = [0, *accumulate(wanted)]
    out = torch.empty(starts[-1], model.d_model, dtype=model.dtype, device=model.device)
    for group in _groups(rows, sequences, [*twins.values()]):
        segments = _segments(model, rows, sequences, group)
        _through(model, operands, rows, segments, keep, watch)
        last = segments[-1]
        entries: list[int] = []
        slots: list[int] = []
        places: list[int] = []
        for row, n in last.serves:
            first = len(rows[row][1].ids) - 1 - last.begins[n]
            entries += [last.standing[n]] * wanted[row]
            slots += range(first, first + wanted[row])
            places += range(starts[row], starts[row] + wanted[row])
        entry, slot, place = torch.tensor([entries, slots, places]).to(model.device)
        out[place] = last.x[entry, slot]
    return out


@dataclass
class Group:
    """Rows that are read in one pass, those alike together.

    Attributes:
        rows: numbers of rows that are equal, for each distinct row.
        parts: what each shares with others; None if it shares nothing.
        cut: of how many tokens the shared part consists; None for the prompt without its last one.
    """

    rows: list[list[int]]
    parts: list[Part] | None
    cut: int | None = None


def _groups(
    rows: Sequence[Steered], sequences: Sequence[Sequence[int]], twins: Sequence[list[int]]
) -> Iterator[Group]:
    """Rows that share their prompt apart from the others, and each kind by length.

    A pass ends where padding would be more than an eighth of its tokens, beside `SLACK` and the
    prompts that a new pass would have to read again.
    """
    parts: dict[int, Part] = {}
    for row, *_ in twins:
        steering, prompt = rows[row]
        early = steering.reaches(prompt)
        parts[row] = (steering, prompt) if early else (None, prompt.ids[:-1])
    count = Counter(parts.values())
    kinds: dict[bool, dict[tuple[int, int], list[list[int]]]] = {True: {}, False: {}}
    for same in twins:
        before = len(rows[same[0]][1].ids) - 1
        shared = count[parts[same[0]]] > 1 and before > 0
        size = len(sequences[same[0]]) - before * shared, before * shared
        kinds[shared].setdefault(size, []).append(same)
    for shared, sizes in kinds.items():
        group: list[list[int]] = []
        tokens: list[tuple[int, int]] = []
        for size in sorted(sizes, reverse=True):
            grown = tokens + [size] * len(sizes[size])
            prompts = dict.fromkeys(parts[same[0]] for same in [*group, *sizes[size]])
            again = sum(len(rows[same[0]][1].ids) for same in sizes[size][:1]) * shared
            total = sum(n for n, _ in grown)
            waste = max(n for n, _ in grown) * len(grown) - total
            befores = {b for _, b in grown}
            waste += (max(befores) - min(befores)) * len(prompts)
            if group and waste > total // 8 + SLACK + again * len(prompts):
                yield _grouped(rows, sequences, group, parts if shared else None)
                group, grown = [], grown[len(tokens) :]
            group, tokens = group + sizes[size], grown
        if group:
            yield _grouped(rows, sequences, group, parts if shared else None)


def _grouped(
    rows: Sequence[Steered],
    sequences: Sequence[Sequence[int]],
    group: list[list[int]],
    prompts: Mapping[int, Part] | None,
) -> Group:
    """Rows that share their `prompts`; or, without, the tokens with which all of them begin, where
    that saves more than the pass costs.
    """
    numbers = [same[0] for same in group]
    if prompts:
        return Group(group, [prompts[r] for r in numbers])
    shortest = min(len(rows[r][1].ids) - 1 for r in numbers)
    columns = zip(*(rows[r][1].ids[:shortest] for r in numbers), strict=True)
    cut = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    parts = [_beginning(rows[r], cut) for r in numbers]
    saved = cut * (len(parts) - len(set(parts)))
    if saved <= sum(len(sequences[r]) for r in numbers) // 8 + SLACK:
        return Group(group, None)
    return Group(group, parts, cut)


def _beginning(row: Steered, cut: int) -> Part:
    """What decides the stream of the first tokens of a prompt, beside the tokens themselves."""
    steering, prompt = row
    scopes = dict.fromkeys(one.scope for one in steering.interventions)
    masks = tuple(tuple(scope.prompt_mask(prompt.content)[:cut]) for scope in scopes)
    return (steering, masks) if any(map(any, masks)) else (None, ())


def _segments(
    model: SteeringModel,
    rows: Sequence[Steered],
    sequences: Sequence[Sequence[int]],
    group: Group,
) -> list[Segment]:
    """Whole sequences as one segment; or what their rows share, then the rest."""
    numbers = [same[0] for same in group.rows]
    leaves = [rows[r][0].first_block for r in numbers]
    serves = [(row, n) for n, same in enumerate(group.rows) for row in same]
    ids = [tuple(sequences[r]) for r in numbers]
    if group.parts is None:
        return [Segment(model, numbers, serves, ids, leaves, ids)]
    shared = {part: n for n, part in enumerate(dict.fromkeys(group.parts))}
    follows = [shared[part] for part in group.parts]
    examples = [numbers[group.parts.index(part)] for part in shared]
    cuts = {r: len(rows[r][1].ids) - 1 if group.cut is None else group.cut for r in numbers}
    begins = [rows[r][1].ids[: cuts[r]] for r in examples]
    first = Segment(
        model,
        examples,
        [(row, follows[n]) for row, n in serves],
        begins,
        [steering.first_block if steering else math.inf for steering, _ in shared],
        begins,
    )
    rest = [one[cuts[r] :] for r, one in zip(numbers, ids, strict=True)]
    trunks = [(begins[n], one) for n, one in zip(follows, rest, strict=True)]
    return [first, Segment(model, numbers, serves, rest, leaves, trunks, (first, follows))]


def _through(
    model: SteeringModel,
    operands: Operands,
    rows: Sequence[Steered],
    segments: Sequence[Segment],
    keep: Keep | None,
    watch: Watch | None,
) -> None:
    """Segments through all blocks, a block at a time."""
    acting = []
    for segment in segments:
        spans = list(zip(segment.begins, segment.tokens, strict=True))
        banks = operands.banks([rows[r] for r in segment.rows], spans)
        at = partial(_at, segment, banks, watch)
        acting.append((segment, at, inside(banks, watch, at)))
    for layer in range(model.n_layers + 1):
        for segment, at, inner in acting:
            segment.regroup(layer)
            if layer > 0:
                segment.x = at(("resid_post", layer - 1), segment.x)
            if layer == model.n_layers:
                continue
            segment.x = at(("resid_pre", layer), segment.x)
            segment.through(layer, inner.get(layer, {}))
            if keep:
                keep(layer, segment)


def _at(
    segment: Segment, banks: Mapping[Hook, Bank], watch: Watch | None, hook: Hook, x: Tensor
) -> Tensor:
    """What a hook makes of a segment."""
    if hook in banks:
        x = banks[hook].apply(x, segment.place)
    if watch and hook in watch.hooks:
        serves = segment.serves
        watch(hook, x, [(row, segment.standing[n], segment.tokens[n]) for row, n in serves])
    return x


def inside(
    banks: Mapping[Hook, Bank], watch: Watch | None, at: Callable[[Hook, Tensor], Tensor]
) -> dict[int, dict[str, Change]]:
    """Changes inside blocks, by layer and component; none where nobody steers or watches."""
    found: dict[int, dict[str, Change]] = {}
    for component, layer in set(banks) | (watch.hooks if watch else set()):
        if component not in ("resid_pre", "resid_post"):
            found.setdefault(layer, {})[component] = partial(at, (component, layer))
    return found
