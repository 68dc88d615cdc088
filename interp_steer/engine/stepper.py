"""Decoding a step at a time, for rows that come and go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from threading import RLock
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from interp_steer.engine.admission import Admission, Live, Taps, watching
from interp_steer.engine.decoding import Decoding
from interp_steer.engine.memory import is_out_of_memory, release
from interp_steer.engine.row import Result, Row
from interp_steer.engine.sampler import Sampler
from interp_steer.errors import RequestError
from interp_steer.model.block import exactly
from interp_steer.model.site import Site


@dataclass(frozen=True)
class Event:
    """One step of one row: a token, or the end, or both.

    Attributes:
        id: what `add` returned.
        token_id: the new token; None if the row ended without one.
        finish: None while the row goes on, else as in `Result`.
    """

    id: int
    token_id: int | None
    finish: str | None


Method = TypeVar("Method", bound=Callable[..., Any])


def _alone(method: Method) -> Method:
    """One call at a time: a second thread waits."""

    @wraps(method)
    def locked(self: "Stepper", *given: Any, **named: Any) -> Any:
        with self._lock:
            return method(self, *given, **named)

    return cast(Method, locked)


class Stepper:
    """Decodes one token of every row a step; rows come and go at any time, from any thread."""

    def __init__(self, admission: Admission) -> None:
        self._admission, self._model = admission, admission.model
        self._lock = RLock()
        self._waiting: list[Live] = []
        self._live: list[Live] = []  # in the order of the batch, rows that have ended included
        self._ended: dict[int, Live] = {}
        self._count = 0
        self._full = False  # memory ran out with rows that waited; none has ended since
        self._decoding = Decoding(self._model)
        self._sampler: Sampler | None = None
        self._taps: Taps | None = None
        self._next: Tensor | None = None  # the tokens to read next
        self._steps: Tensor | None = None  # how many each row has generated

    @property
    @_alone
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting) or any(live.finish is None for live in self._live)

    @property
    @_alone
    def share(self) -> float:
        """Progress of the running rows: the sum over them of tokens generated / most allowed."""
        going = (live for live in self._live if live.finish is None)
        return sum(len(live.tokens) / live.row.sampling.max_new_tokens for live in going)

    @_alone
    def add(self, row: Row, taps: Sequence[Site] = ()) -> int:
        """Takes a row in; its prompt is read in the next step that has memory for it.

        Returns:
            The row's id.

        Raises:
            RequestError: as for `Engine.generate`; nothing is added.
        """
        live = self._admission.take(self._count, row, taps, row.sampling.max_new_tokens)
        self._count += 1
        self._waiting.append(live)
        return live.id

    @_alone
    def cancel(self, id: int) -> None:
        """Ends a row; what it has generated so far is its result. Ended rows stay as they are."""
        for live in [*self._waiting, *self._live]:
            if live.id == id and live.finish is None:
                self._end(live, "cancelled")
        self._waiting = [live for live in self._waiting if live.finish is None]

    @_alone
    def pop(self, id: int) -> Result:
        """The result of a row that has ended.

        Raises:
            RequestError: no row of that id has ended.
        """
        if id not in self._ended:
            raise RequestError(f"row {id} has not ended, or was popped before")
        live = self._ended.pop(id)
        taps = {site: torch.cat(parts) for site, parts in live.seen.items()}
        text = self._model.decode(live.tokens, live.row.prompt)
        return Result(live.row, tuple(live.tokens), text, live.finish or "", taps)

    @_alone
    @exactly()
    def step(self) -> list[Event]:
        """Reads waiting prompts, gives every row in work its next token; says what happened.

        It is all or nothing: if it raises, every row is as it was, and it may be called again.
        Waiting rows for which memory does not suffice wait until others leave. One that does not
        fit alone ends with "memory".
        """
        self._leave()
        arriving = [] if self._full and self._live else list(self._waiting)
        while True:
            try:
                self._admission.judge(arriving)
                return self._step(arriving)
            except (RuntimeError, MemoryError) as error:
                if not arriving or not is_out_of_memory(error):
                    raise
            release(self._model.device)
            if len(arriving) == 1 and not self._live:
                self._waiting.remove(arriving[0])
                self._end(arriving[0], "memory")
                return [Event(arriving[0].id, None, "memory")]
            arriving, self._full = arriving[: len(arriving) // 2], True

    def _step(self, arriving: list[Live]) -> list[Event]:
        """A step with some of the waiting rows. What can fail comes first."""
        if not self._live and not arriving:
            return []
        live, decoding, before = self._live, self._decoding, int(bool(self._live))
        streams, arrival, batch, arrived = [], None, None, watching(arriving)
        if live:
            self._settle()
            assert self._next is not None
            streams.append(decoding.step(self._next, self._taps))
        sampler, steps = self._sampler, self._steps
        if arriving:
            rows, rooms = [one.steered for one in arriving], [one.left for one in arriving]
            arrival = decoding.read(rows, rooms, arrived)
            streams.append(arrival.x)
            batch, order = decoding.joined(arrival, before)
            both = [*live, *arriving]
            live = [both[n] for n in order]
            streams = [torch.cat(streams)[torch.tensor(order).to(arrival.x.device)]]
            sampler, steps = self._sampler_of(live), self._counts(live)
        assert sampler and steps is not None
        chosen = sampler.pick(self._model.unembed(streams[0]), steps)
        tokens = chosen.tolist()
        seen = [found for taps in (self._taps, arrived) if taps for found in taps.take()]

        # from here on nothing fails
        sampler.mark(chosen.clamp_min_(0))
        decoding.advance(before, arrival, batch)
        if arrival:
            for one, seat in zip(arriving, arrival.seats, strict=True):
                one.seat = seat
            self._live, self._sampler, self._taps = live, sampler, watching(live)
            self._waiting = self._waiting[len(arriving) :]  # the first ones
        self._next, self._steps = chosen, steps.add_(1)
        for one, site, values in seen:
            one.seen.setdefault(site, []).append(values)
        going = [(one, token) for one, token in zip(live, tokens, strict=True) if not one.finish]
        return [self._took(one, token) for one, token in going]

    def _took(self, live: Live, token: int) -> Event:
        """A row's next token; below 0 if there was none."""
        if token < 0:
            self._end(live, "overflow")
        elif token in self._model.stop_ids:
            self._end(live, "stop")
        else:
            live.tokens.append(token)
            if live.left <= 0:
                self._end(live, "length")
        ended = live.finish in ("overflow", "stop")
        return Event(live.id, None if ended else token, live.finish)

    def _end(self, live: Live, finish: str) -> None:
        live.finish = finish
        self._ended[live.id] = live
        self._full = False

    def _leave(self) -> None:
        """Ended rows leave once they are a quarter of the batch, or others wait for their place."""
        going = [live for live in self._live if live.finish is None]
        waited = bool(self._waiting) and not self._full
        if len(going) <= (len(self._live) - 1 if waited else 0.75 * len(self._live)):
            self._decoding.keep({live.seat for live in going if live.seat})
            at = {seat: n for n, seat in enumerate(self._decoding.seats)}
            self._live = sorted(going, key=lambda live: at[live.seat] if live.seat else -1)
            self._sampler = self._taps = None

    def _settle(self) -> None:
        """What a step needs of the running rows, where it is not kept from the last one."""
        if self._sampler is None:
            device = self._model.device
            self._next = torch.tensor([live.tokens[-1] for live in self._live]).to(device)
            self._steps, self._taps = self._counts(self._live), watching(self._live)
            self._sampler = self._sampler_of(self._live)
        elif self._taps:
            self._taps.parts = []  # of a step that failed

    def _counts(self, live: Sequence[Live]) -> Tensor:
        return torch.tensor([len(one.tokens) for one in live]).to(self._model.device)

    def _sampler_of(self, live: Sequence[Live]) -> Sampler:
        settings = [one.row.sampling for one in live]
        seen = None
        if any(s.repetition_penalty != 1 for s in settings):
            seen = torch.zeros(len(settings), self._model.d_vocab, dtype=torch.bool)
            for marks, one in zip(seen, live, strict=True):
                marks[torch.tensor([*one.prompt.ids, *one.tokens])] = True
            seen = seen.to(self._model.device)
        return Sampler(settings, [one.row.seed for one in live], seen, self._model.device)
