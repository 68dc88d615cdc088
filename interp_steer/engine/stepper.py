"""Decoding a step at a time, for rows that come and go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from threading import RLock
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from interp_steer.engine.bank import Hook, steps_at
from interp_steer.engine.forward import Steered, Stream, begins_late
from interp_steer.engine.row import Result, Row
from interp_steer.engine.sampler import Sampler
from interp_steer.errors import RequestError
from interp_steer.model.block import exactly
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.intervention import Gate, Intervention


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


@dataclass
class Live:
    """A row in work."""

    id: int
    row: Row
    prompt: Encoded
    taps: tuple[Site, ...]
    length: int  # of the sequence that is read at once: the prompt, and a given continuation
    steer: tuple[Intervention, ...] = ()  # without those whose gate stayed shut
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    seen: dict[Site, list[Tensor]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.row.sampling.max_new_tokens - len(self.tokens)

    @property
    def steered(self) -> Steered:
        return self.steer, self.prompt


class Taps:
    """Copies activations of the rows that asked for them."""

    def __init__(self, rows: Sequence[Live]) -> None:
        self.rows = rows
        self.hooks: set[Hook] = {(s.component, s.layer) for live in rows for s in live.taps}

    def __call__(self, hook: Hook, x: Tensor, place: Tensor | None) -> None:
        for number, live in enumerate(self.rows):
            for site in live.taps:
                if (site.component, site.layer) == hook and live.finish is None:
                    mine = x[number if place is None else int(place[number])]
                    if len(mine) > 1:  # a whole sequence, right-aligned: leave the padding out
                        mine = mine[len(mine) - live.length :]
                    if site.head is not None:
                        mine = mine[:, site.head]
                    live.seen.setdefault(site, []).append(mine.cpu().clone())


class Admission:
    """Lets rows in: checks them against the model, and judges their gates once a prompt.

    The latest verdicts are kept while the weights stay as they are.
    """

    KEPT = 4096

    def __init__(self, model: SteeringModel, computes: bool = True) -> None:
        """`computes` is False to check rows only, which needs no weights."""
        if computes and not model.has_weights:
            raise RequestError(f"{model.name or 'this model'} has no weights (they are on 'meta')")
        self.model = model
        self._verdicts: dict[tuple[tuple[int, ...], Gate], bool] = {}
        self._judged = ""  # the fingerprint of the weights that gave the verdicts

    def steered(self, row: Row) -> Steered:
        """A row as forward passes take it: checked, without interventions whose gate is shut."""
        live = self.take(0, row, ())
        self.judge([live])
        return live.steered

    def take(self, id: int, row: Row, taps: Sequence[Site], new: int = 0, given: int = 0) -> Live:
        """Checks a row against the model, before anything runs.

        Args:
            new, given: tokens that will be generated, or are given as a continuation.
        """
        prompt = self.model.encode(row.prompt)
        new += given
        if len(prompt.ids) + new > self.model.n_ctx:
            raise RequestError(
                f"the prompt ({len(prompt.ids)} tokens) and {new} new tokens exceed the context "
                f"of {self.model.name}, {self.model.n_ctx} tokens"
            )
        for one in row.steer:
            one.check(self.model)
            if one.unit not in ("", "deg"):
                raise RequestError(
                    f"{one} has no length yet: resolve it with .resolve(Scale.of(model, prompts))"
                )
            if one.scope.kind == "content" and not prompt.located:
                raise RequestError(
                    f"{one}: the chat template rewrites messages, so that their content cannot be "
                    "told from the template; use another scope, such as 'prompt'"
                )
        for site in {site for one in row.steer for site in one.sites}:
            steps_at(row.steer, site)  # refuses what cannot be joined there
        for site in taps:
            self.model.check(site, self.model.d_model if site.head is None else self.model.d_head)
        return Live(id, row, prompt, tuple(taps), len(prompt.ids) + given)

    def judge(self, lives: Sequence[Live]) -> None:
        """Judges every gate on its unsteered prompt, once, and drops what stays shut."""
        gated = [(live, one.gate) for live in lives for one in live.row.steer if one.gate]
        if gated and self._judged != self.model.fingerprint:
            self._verdicts, self._judged = {}, self.model.fingerprint
        opens = {
            (live.prompt.ids, gate): self._verdicts.get((live.prompt.ids, gate))
            for live, gate in gated
        }
        by_prompt: dict[Encoded, set[Gate]] = {}
        for live, gate in gated:
            if opens[live.prompt.ids, gate] is None:
                by_prompt.setdefault(live.prompt, set()).add(gate)
        for prompt, gates in by_prompt.items():
            for layer, x, _ in self.model.residuals([prompt]):
                for gate in gates:
                    reads = gate.site.layer - (gate.site.component == "resid_pre")
                    if reads == layer:
                        cosine = torch.cosine_similarity(
                            x[0, 1:].float(), gate.vector.to(x.device)[None], dim=-1
                        )
                        mean = cosine.mean().item() if len(cosine) else 0.0
                        passed = mean > gate.threshold if gate.above else mean < gate.threshold
                        opens[prompt.ids, gate] = self._verdicts[prompt.ids, gate] = passed
        for oldest in list(self._verdicts)[: -self.KEPT]:
            del self._verdicts[oldest]
        for live in lives:
            live.steer = tuple(
                one
                for one in live.row.steer
                if one.gate is None or opens[live.prompt.ids, one.gate]
            )


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
        self._live: list[Live] = []
        self._ended: dict[int, Live] = {}
        self._count = 0
        self._stream: Stream | None = None
        self._sampler: Sampler | None = None
        self._next: Tensor | None = None

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
        """Takes a row in; its prompt is read in the next step.

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
                live.finish = "cancelled"
                self._ended[id] = live
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
        late = begins_late(live.steered)
        taps = {}
        for site, parts in live.seen.items():
            if late:  # the last prompt position was read twice: the second time steered
                parts = [parts[0][:-1], *parts[1:]]
            taps[site] = torch.cat(parts)
        text = self._model.decode(live.tokens, live.row.prompt)
        return Result(live.row, tuple(live.tokens), text, live.finish or "", taps)

    @_alone
    @exactly()
    def step(self) -> list[Event]:
        """Reads waiting prompts, gives every row in work its next token; says what happened."""
        self._drop_ended()
        # what can fail for one row's sake comes first: the batch has not moved yet
        arrived = self._read_waiting()
        streams = []
        if self._stream is not None and self._next is not None:
            streams.append(self._stream.step(self._next, self._watch(self._live)))
        if arrived:
            streams += self._join(arrived)
        if not streams or self._sampler is None:
            return []
        logits = self._model.unembed(torch.cat(streams))
        steps = torch.tensor([len(live.tokens) for live in self._live], device=logits.device)
        self._next, sane = self._sampler.choose(logits, steps)
        stops = self._model.stop_ids
        events = []
        for live, token, good in zip(self._live, self._next.tolist(), sane.tolist(), strict=True):
            if live.finish is not None:
                continue
            if not good:
                live.finish = "overflow"
            elif token in stops:
                live.finish = "stop"
            else:
                live.tokens.append(token)
                live.finish = "length" if live.left <= 0 else None
            if live.finish:
                self._ended[live.id] = live
            events.append(
                Event(live.id, token if good and token not in stops else None, live.finish)
            )
        return events

    def _watch(self, lives: Sequence[Live]) -> Taps | None:
        return Taps(lives) if any(live.taps for live in lives) else None

    def _read_waiting(self) -> list[tuple[list[Live], Stream, Tensor]]:
        """Reads the waiting prompts, those that are steered late apart from the others."""
        self._admission.judge(self._waiting)
        read = []
        for late in (False, True):
            group = [live for live in self._waiting if begins_late(live.steered) == late]
            if group:
                for live in group:
                    live.seen.clear()  # of a try that failed
                rows, room = [live.steered for live in group], self._room()
                read.append((group, *Stream.prefill(self._model, rows, room, self._watch(group))))
        return read

    def _join(self, arrived: list[tuple[list[Live], Stream, Tensor]]) -> list[Tensor]:
        """Joins rows that were read to the batch."""
        room = self._room()
        for group, stream, _ in arrived:
            self._stream = stream if self._stream is None else self._stream.joined(stream, room)
            self._live += group
        self._waiting = []
        self._settle()
        return [x for _, _, x in arrived]

    def _room(self) -> int:
        """Slots that the longest row still needs."""
        return max(live.left for live in [*self._live, *self._waiting])

    def _drop_ended(self) -> None:
        """Ended rows leave once they are a quarter of the batch: leaving copies the others."""
        going = [i for i, live in enumerate(self._live) if live.finish is None]
        if not going:
            self._live, self._stream, self._sampler, self._next = [], None, None, None
        elif len(going) <= 0.75 * len(self._live) and self._stream and self._next is not None:
            self._stream.keep(going)
            self._live = [self._live[i] for i in going]
            self._next = self._next[torch.tensor(going, device=self._next.device)]
            self._settle()

    def _settle(self) -> None:
        """Sampling settings of the rows now in the batch."""
        settings = [live.row.sampling for live in self._live]
        seen = None
        if any(s.repetition_penalty != 1 for s in settings):
            seen = torch.zeros(len(settings), self._model.d_vocab, dtype=torch.bool)
            for i, live in enumerate(self._live):
                seen[i, torch.tensor([*live.prompt.ids, *live.tokens])] = True
            seen = seen.to(self._model.device)
        seeds = [live.row.seed for live in self._live]
        self._sampler = Sampler(settings, seeds, seen, self._model.device)
