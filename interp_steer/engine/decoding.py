"""Rows in the middle of decoding: keys and values in slots, each row at its own length.

Row r's token p stands in slot p. Rows that need about as many slots share a shelf, whose attention
is one operation; a long row has a shelf of its own and costs the short ones nothing. A step's other
operations take all rows of all shelves together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_steer.engine.bank import Hook, Operands, Steered
from interp_steer.engine.forward import Segment, Watch, inside, read
from interp_steer.engine.memory import unless_memory_lacks
from interp_steer.model.block import attention, exactly
from interp_steer.model.model import SteeringModel

WIDEST = 1.5
"""Most slots of a shelf for each slot that a row on it needs."""


class Shelf:
    """Keys and values of rows with about the same need: `[row, kv_head, slot, d_head]` a layer.

    Attributes:
        capacity: slots of every row.
        seats: the rows that stand here; row n of the tensors is `seats[n]`'s.
        allocated: rows for which there is memory.
        written: no row has ever held anything from this slot on.
    """

    def __init__(self, model: SteeringModel, capacity: int) -> None:
        self.capacity, self.written, self.allocated = capacity, 0, 0
        self.seats: list[Seat] = []
        empty = torch.zeros(
            0, model.n_kv_heads, capacity, model.d_head, dtype=model.dtype, device=model.device
        )
        self.layers = [[empty, empty] for _ in range(model.n_layers)]

    def resize(self, rows: int) -> None:
        """Memory for so many rows: all layers, or if it fails as before."""
        before = self.allocated
        try:
            self._resize(rows)
        except Exception:
            with unless_memory_lacks():
                self._resize(before)
            raise

    def _resize(self, rows: int) -> None:
        """A layer at a time, so that little exists twice; what is there stays until its copy is."""
        self.allocated = min(rows, self.allocated)
        kept = min(rows, len(self.seats))
        for layer in self.layers:
            for n, tensor in enumerate(layer):
                if len(tensor) != rows:
                    grown = tensor.new_zeros(rows, *tensor.shape[1:])
                    grown[:kept, :, : self.written] = tensor[:kept, :, : self.written]
                    layer[n] = grown
        self.allocated = rows

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies some rows over others."""
        device = self.layers[0][0].device
        source, target = torch.tensor([[*sources], [*targets]]).to(device)
        for layer in self.layers:
            for tensor in layer:
                tensor[target, :, : self.written] = tensor[source, :, : self.written]


@dataclass(eq=False)
class Seat:
    """A row's place.

    Attributes:
        row: its steering and prompt.
        number: its number on the shelf.
        length: tokens that it has read; one that has ended may wait in the shelf's last slot.
    """

    row: Steered
    shelf: Shelf
    number: int
    length: int

    @property
    def slot(self) -> int:
        """Where its next token's keys and values go."""
        return min(self.length, self.shelf.capacity - 1)


class Batch:
    """Rows of a decoding step, those of one shelf together; stays as it is for many steps.

    Attributes:
        seats: of the rows, in order.
        positions: of each row's next token.
        banks: what steers it there.
        lasts: steps until other interventions are in scope.
    """

    def __init__(
        self,
        model: SteeringModel,
        operands: Operands,
        seats: Sequence[Seat],
        lengths: Sequence[int],
    ) -> None:
        self.seats = list(seats)
        self.positions: Int[Tensor, " batch"] = torch.tensor(lengths).to(model.device)
        rows = [seat.row for seat in seats]
        self.banks = operands.banks(rows, [(length, 1) for length in lengths])
        edges = (
            edge - length
            for (steering, prompt), length in zip(rows, lengths, strict=True)
            for one in steering.interventions
            for edge in one.scope.after_prompt(len(prompt.ids))
            if edge > length
        )
        self.lasts = min(edges, default=math.inf)


@dataclass(frozen=True, eq=False)
class Arrival:
    """Rows whose prompts are read, in free slots; running rows have not felt them.

    Attributes:
        shelves: those that are new.
        x: the stream that predicts each row's first token.
    """

    seats: list[Seat]
    shelves: list[Shelf]
    x: Float[Tensor, "batch d_model"]


class Decoding:
    """Rows that decode together."""

    def __init__(self, model: SteeringModel) -> None:
        self.model = model
        self.shelves: list[Shelf] = []
        self._operands = Operands(model.device)
        self._batch: Batch | None = None

    @property
    def seats(self) -> list[Seat]:
        """Seats of all rows, in the order of the batch."""
        return [seat for shelf in self.shelves for seat in shelf.seats]

    def read(
        self, rows: Sequence[Steered], rooms: Sequence[int], watch: Watch | None = None
    ) -> Arrival:
        """Reads prompts of rows that will have room for so many more tokens each.

        Rows go to shelves of at most `WIDEST` times their need; the longest comes first, so that
        few new ones are opened.
        """
        shelves, seats = [*self.shelves], {}
        standing = {shelf: len(shelf.seats) for shelf in shelves}
        needs = [len(p.ids) + room for (_, p), room in zip(rows, rooms, strict=True)]
        for r in sorted(range(len(rows)), key=needs.__getitem__, reverse=True):
            fits = (s for s in shelves if needs[r] <= s.capacity <= WIDEST * needs[r])
            shelf = min(fits, key=lambda shelf: shelf.capacity, default=None)
            if shelf is None:
                shelf = Shelf(self.model, needs[r])
                shelves.append(shelf)
            number = standing.get(shelf, 0)
            standing[shelf] = number + 1
            seats[r] = Seat(rows[r], shelf, number, len(rows[r][1].ids))
        for shelf, count in standing.items():
            if count > shelf.allocated:
                shelf.resize(count + (count // 8 if shelf.seats else 0))
        steerings = {steering for steering, _ in (*rows, *(seat.row for seat in self.seats))}
        if len(self._operands) > 2 * sum(one.count for one in steerings) + 64:  # of rows that left
            self._operands, self._batch = Operands(self.model.device), None
        mine = [seats[r] for r in range(len(rows))]
        ids = [prompt.ids for _, prompt in rows]
        x = read(self.model, self._operands, rows, ids, Filling(mine), watch)
        return Arrival(mine, shelves[len(self.shelves) :], x)

    @exactly()
    def step(
        self, tokens: Int[Tensor, " batch"], watch: Watch | None = None
    ) -> Float[Tensor, "batch d_model"]:
        """Reads one more token of every row; gives the stream after the last block.

        Nothing counts before `advance`: a step that failed is simply made again.
        """
        model, batch = self.model, self.settled()
        x = model.embed(tokens[:, None])
        equal = len({seat.length for seat in batch.seats}) == 1
        positions = batch.positions[:1] if equal else batch.positions
        rotary = model.rotary(x, positions[:, None])
        attend = _Attention(self.shelves, batch)
        at = partial(_at, batch, watch)
        inner = inside(batch.banks, watch, at)
        for layer in range(model.n_layers):
            x = at(("resid_pre", layer), x)
            x = model.block(layer, x, rotary, attend, inner.get(layer, {}))
            x = at(("resid_post", layer), x)
        return x[:, 0]

    def settled(self) -> Batch:
        """The running rows as a batch."""
        if self._batch is None or self._batch.lasts <= 0:
            seats = self.seats
            lengths = [seat.length for seat in seats]
            self._batch = Batch(self.model, self._operands, seats, lengths)
        return self._batch

    def joined(self, arrival: Arrival, steps: int) -> tuple[Batch, list[int]]:
        """The batch after running rows have made so many steps and others have arrived. Of each of
        its rows also the number in a list of the running rows, then the arrived ones.
        """
        seats = [*self.seats, *arrival.seats]
        lengths = [s.length + steps for s in self.seats] + [s.length for s in arrival.seats]
        rank = {shelf: n for n, shelf in enumerate([*self.shelves, *arrival.shelves])}
        order = sorted(range(len(seats)), key=lambda n: (rank[seats[n].shelf], seats[n].number))
        seats, lengths = [seats[n] for n in order], [lengths[n] for n in order]
        return Batch(self.model, self._operands, seats, lengths), order

    def advance(
        self, steps: int, arrival: Arrival | None = None, batch: Batch | None = None
    ) -> None:
        """Makes steps count, and takes rows in; `batch` is what `joined` gave, if it was asked."""
        for seat in self.seats:
            seat.length += steps
        if arrival:
            self.shelves += arrival.shelves
            for seat in sorted(arrival.seats, key=lambda seat: seat.number):
                seat.shelf.seats.append(seat)
            self._batch = batch
        elif self._batch:
            self._batch.positions.add_(steps)
            self._batch.lasts -= steps

    def keep(self, seats: set[Seat]) -> None:
        """Frees the other rows' places; the last rows of a shelf move into the holes."""
        moves: list[tuple[Seat, int]] = []
        for shelf in self.shelves:
            stay = [seat for seat in shelf.seats if seat in seats]
            holes = sorted(set(range(len(stay))) - {seat.number for seat in stay})
            movers = [seat for seat in stay if seat.number >= len(stay)]
            if movers:
                shelf.move([seat.number for seat in movers], holes)
            moves += zip(movers, holes, strict=True)
        self._batch = None  # all is copied: now it counts
        for seat, hole in moves:
            seat.number = hole
        for shelf in self.shelves:
            stay = [seat for seat in shelf.seats if seat in seats]
            shelf.seats = sorted(stay, key=lambda seat: seat.number)
        self.shelves = [shelf for shelf in self.shelves if shelf.seats]
        for shelf in self.shelves:
            if 2 * len(shelf.seats) <= shelf.allocated:
                with unless_memory_lacks():
                    shelf.resize(len(shelf.seats))


def _at(batch: Batch, watch: Watch | None, hook: Hook, x: Tensor) -> Tensor:
    """What a hook makes of one position of every row."""
    if hook in batch.banks:
        x = batch.banks[hook].apply(x)
    if watch and hook in watch.hooks:
        watch(hook, x, [(n, n, 1) for n in range(len(batch.seats))])
    return x


class _Attention:
    """A step's attention: each shelf's rows over their own slots."""

    def __init__(self, shelves: Sequence[Shelf], batch: Batch) -> None:
        # rows of the batch; where their new keys go, numbers of the shelf and slots; how far to
        # look, and what to leave out
        self._parts: list[
            tuple[Shelf, slice, slice | Tensor, int | Tensor, int, Tensor | None]
        ] = []
        start = 0
        for shelf in shelves:
            rows = slice(start, start := start + len(shelf.seats))
            taken = {seat.slot for seat in shelf.seats}
            longest = max(taken) + 1
            shelf.written = max(shelf.written, longest)
            numbers: slice | Tensor = slice(len(shelf.seats))
            slots: int | Tensor = longest - 1
            mask = None
            if len(taken) > 1:  # rows that have ended may stand beyond the last slot
                slots = batch.positions[rows].clamp_max(shelf.capacity - 1)
                numbers = torch.arange(len(slots), device=slots.device)
                seen = torch.arange(longest, device=slots.device) <= slots[:, None]
                kind = shelf.layers[0][0].dtype
                mask = torch.zeros(seen.shape, dtype=kind, device=slots.device)
                mask = mask.masked_fill_(~seen, -math.inf)[:, None, None]
            self._parts.append((shelf, rows, numbers, slots, longest, mask))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = []
        for shelf, rows, numbers, slots, longest, mask in self._parts:
            count = rows.stop - rows.start
            for tensor, new in zip(shelf.layers[layer], (k, v), strict=True):
                tensor[numbers, :, slots] = new[rows, :, 0]
            keys, values = (tensor[:count, :, :longest] for tensor in shelf.layers[layer])
            found.append(attention(q[rows], keys, values, mask))
        return found[0] if len(found) == 1 else torch.cat(found)


class Filling:
    """Puts keys and values of prompts that are read into the seats of their rows."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self._seats = seats
        self._plans: dict[Segment, list[tuple[Shelf, Tensor, Tensor, Tensor, int]]] = {}

    def __call__(self, layer: int, segment: Segment) -> None:
        if segment not in self._plans:
            self._plans[segment] = [*self._plan(segment)]
        for shelf, numbers, served, begins, stale in self._plans[segment]:
            entries = segment.place[served]
            begin = segment.begins[0]
            end = min(begin + segment.width, shelf.capacity)
            for tensor, new in zip(
                shelf.layers[layer], (segment.keys, segment.values), strict=True
            ):
                if segment.past and segment.width == 1:  # shared parts may differ in length
                    tensor[numbers, :, begins] = new[entries, :, 0]
                    continue
                tensor[numbers, :, begin:end] = new[entries, :, : end - begin]
                if end < stale:  # a masked number that is none would still spread
                    tensor[numbers, :, end:stale] = 0

    def _plan(self, segment: Segment) -> Iterator[tuple[Shelf, Tensor, Tensor, Tensor, int]]:
        """Of each shelf: numbers of rows, which rows of the segment, first positions."""
        shelves: dict[Shelf, list[tuple[int, int, int]]] = {}
        for row, n in segment.serves:
            seat = self._seats[row]
            shelves.setdefault(seat.shelf, []).append((seat.number, n, segment.begins[n]))
        for shelf, rows in shelves.items():
            end = max(begin for _, _, begin in rows) + segment.width
            numbers, served, begins = torch.tensor(rows).T.to(segment.x.device)
            stale, shelf.written = (
                shelf.written,
                max(shelf.written, min(end, shelf.capacity)),
            )
            yield shelf, numbers, served, begins, stale
