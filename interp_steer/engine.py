"""Rows in, rows out: many rows in one batch, every row with its own everything.

    engine = Engine(SteeringModel.load("starter"))
    results = engine.generate([Row(prompt), Row(prompt, steer=parse(text, directions))])

`Stepper` is the machine; `generate` and `stream` wrap it. `score` reads given continuations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.bank import Hook
from interp_steer.console import Report
from interp_steer.errors import RequestError, RunError
from interp_steer.forward import Steered, Stream, begins_late, run
from interp_steer.intervention import Gate, Intervention
from interp_steer.model import SteeringModel
from interp_steer.prompt import Encoded
from interp_steer.row import Result, Row, Score
from interp_steer.sampler import Sampler
from interp_steer.site import Site

LARGEST_BATCH = 256


@dataclass(frozen=True)
class Event:
    """One step of one row: a token, or the end, or both.

    Attributes:
        id: what `add` returned.
        token_id: the new token; None if the row ended without one (a stop id, or cancelled).
        finish: None while the row goes on, else "stop", "length" or "cancelled".
    """

    id: int
    token_id: int | None
    finish: str | None


@dataclass
class _Live:
    """A row in work."""

    id: int
    row: Row
    prompt: Encoded
    taps: tuple[Site, ...]
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


class _Taps:
    """Copies activations of the rows that asked for them."""

    def __init__(self, rows: Sequence[_Live]) -> None:
        self.rows = rows
        self.hooks: set[Hook] = {(s.component, s.layer) for live in rows for s in live.taps}

    def __call__(self, hook: Hook, x: Tensor, place: Tensor | None) -> None:
        for number, live in enumerate(self.rows):
            for site in live.taps:
                if (site.component, site.layer) == hook and live.finish is None:
                    mine = x[number if place is None else int(place[number])]
                    if len(mine) > 1:  # a whole sequence, right-aligned: leave the padding out
                        mine = mine[len(mine) - len(live.prompt.ids) :]
                    if site.head is not None:
                        mine = mine[:, site.head]
                    live.seen.setdefault(site, []).append(mine.cpu().clone())


class Engine:
    """Runs rows on a model."""

    def __init__(self, model: SteeringModel) -> None:
        self.model = model
        self._gates: dict[tuple[tuple[int, ...], Gate], bool] = {}

    def stepper(self) -> "Stepper":
        """A machine to add rows to at any time; several may be in use in turn."""
        return Stepper(self)

    def generate(
        self,
        rows: Sequence[Row],
        *,
        taps: Sequence[Site] = (),
        batch: int | None = None,
        report: Report | None = None,
    ) -> list[Result]:
        """Runs rows to their end, in batches; results in the order of the rows.

        Args:
            rows: what to run. Equal rows in one batch give equal results.
            taps: sites whose activations every row returns.
            batch: rows at once; None fits it to the free memory. A batch that still runs out of
                memory is halved.
            report: called with the number of rows done.

        Raises:
            RequestError: an empty prompt, one that does not fit the context, or an intervention
                that does not fit the model.
            RunError: one row alone runs out of memory.
        """
        encoded = [self.model.encode(row.prompt) for row in rows]
        # neighbours of one length need no padding, and equal prompts share their prefill
        order = sorted(range(len(rows)), key=lambda r: (len(encoded[r].ids), encoded[r].ids))
        longest = [
            len(one.ids) + row.sampling.max_new_tokens
            for one, row in zip(encoded, rows, strict=True)
        ]
        results: dict[int, Result] = {}
        done = 0

        def work(chunk: list[int]) -> None:
            nonlocal done
            stepper = self.stepper()
            ids = {stepper.add(rows[r], taps): r for r in chunk}
            while stepper.busy:
                for event in stepper.step():
                    if event.finish:
                        done += 1
                        results[ids[event.id]] = stepper.pop(event.id)
                        if report:
                            report(done)

        self._in_batches(order, longest, batch, work)
        return [results[r] for r in range(len(rows))]

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, str, str | None]]:
        """Runs rows in one batch and yields (row number, new text, finish) as text appears.

        Leaving the loop early leaves nothing behind.
        """
        stepper = self.stepper()
        ids = {stepper.add(row): number for number, row in enumerate(rows)}
        tokens: list[list[int]] = [[] for _ in rows]
        shown = [""] * len(rows)
        while stepper.busy:
            for event in stepper.step():
                number = ids[event.id]
                if event.token_id is not None:
                    tokens[number].append(event.token_id)
                text = self.model.decode(tokens[number])
                if not event.finish and text.endswith("\ufffd"):
                    continue  # the rest of a character is still to come
                yield number, text[len(shown[number]) :], event.finish
                shown[number] = text

    def score(
        self,
        rows: Sequence[Row],
        continuations: Sequence[Sequence[int] | str],
        *,
        reference: Sequence[int | None] | None = None,
        last_logits: bool = False,
        taps: Sequence[Site] = (),
        batch: int | None = None,
        report: Report | None = None,
    ) -> list[Score]:
        """Reads given continuations, teacher-forced; sampling settings play no part.

        Args:
            rows: prompts and interventions; scope `generated` covers the continuation.
            continuations: token ids (may be none), or text that follows the prompt directly.
            reference: for each row the number of the row that it is compared with by KL; both
                need the same prompt and continuation.
            last_logits: whether to return the logits after the last token.
            taps: sites whose activations every row returns, continuation included.

        Raises:
            RequestError: as for `generate`, and for a reference of other tokens.
        """
        model = self.model
        given = [self._ids(text) for text in continuations]
        if len(given) != len(rows):
            raise RequestError(f"{len(rows)} rows need as many continuations, got {len(given)}")
        lives = [
            self._live(number, row, taps, len(after))
            for number, (row, after) in enumerate(zip(rows, given, strict=True))
        ]
        against = list(reference) if reference is not None else [None] * len(rows)
        for mine, other in zip(range(len(rows)), against, strict=True):
            if other is None:
                continue
            if (lives[mine].prompt.ids, given[mine]) != (lives[other].prompt.ids, given[other]):
                raise RequestError(f"row {mine} and its reference {other} have different tokens")
        self._open_gates(lives)
        sequences = [(*live.prompt.ids, *after) for live, after in zip(lives, given, strict=True)]
        # streams of reference rows are kept; their logits are formed again where they are needed
        wanted = {other for other in against if other is not None}
        kept: dict[int, Tensor] = {}
        found: dict[int, Score] = {}

        def work(chunk: list[int]) -> None:
            part = [lives[r] for r in chunk]
            for live, r in zip(part, chunk, strict=True):  # what the taps slice by
                live.seen.clear()
                live.prompt = Encoded(sequences[r], live.prompt.content, live.prompt.answer)
            prompts = [
                Encoded(live.prompt.ids[: len(live.prompt.content)], live.prompt.content)
                for live in part
            ]
            with torch.no_grad():
                out = run(
                    model,
                    [(live.steer, prompt) for live, prompt in zip(part, prompts, strict=True)],
                    [sequences[r] for r in chunk],
                    watch=_Taps(part) if taps else None,
                )
                last: tuple[int, Tensor] | None = None
                for r, stream in zip(chunk, out, strict=True):
                    stream = stream[len(stream) - len(given[r]) - 1 :]
                    if r in wanted:
                        kept[r] = stream
                    logits = model.unembed(stream).float()
                    logprobs = logits.log_softmax(-1)
                    kl = None
                    if (other := against[r]) is not None:
                        if last is None or last[0] != other:
                            last = other, model.unembed(kept[other]).float().log_softmax(-1)
                        kl = (last[1].exp() * (last[1] - logprobs)).sum(-1).cpu()
                    ids = torch.tensor(given[r], dtype=torch.long, device=model.device)
                    found[r] = Score(
                        given[r],
                        logprobs[:-1].gather(1, ids[:, None])[:, 0].cpu(),
                        logits[-1].cpu() if last_logits else None,
                        kl,
                        {site: torch.cat(parts) for site, parts in lives[r].seen.items()},
                    )
                    if report:
                        report(len(found))

        lengths = [len(s) for s in sequences]
        order = sorted(range(len(rows)), key=lambda r: (len(sequences[r]), sequences[r]))
        # references first, so that their streams are there when they are asked for
        self._in_batches([r for r in order if r in wanted], lengths, batch, work)
        self._in_batches([r for r in order if r not in wanted], lengths, batch, work)
        return [found[r] for r in range(len(rows))]

    def admitted(self, row: Row) -> Steered:
        """A row as forward passes take it: checked, and without interventions whose gate is shut."""
        live = self._live(0, row, (), 0)
        self._open_gates([live])
        return live.steered

    # --- what generate, score and the stepper share ---------------------------------------------

    def _ids(self, continuation: Sequence[int] | str) -> tuple[int, ...]:
        if isinstance(continuation, str):
            return tuple(self.model.tokenizer(continuation, add_special_tokens=False)["input_ids"])
        return tuple(int(i) for i in continuation)

    def _live(self, id: int, row: Row, taps: Sequence[Site], new: int) -> _Live:
        """Checks a row against the model, before anything runs."""
        prompt = self.model.encode(row.prompt)
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
        for site in taps:
            self.model.check(site, self.model.d_model if site.head is None else self.model.d_head)
        return _Live(id, row, prompt, tuple(taps))

    def _open_gates(self, lives: Sequence[_Live]) -> None:
        """Judges every gate on its unsteered prompt, once, and drops what stays shut."""
        asked = {
            (live.prompt, one.gate)
            for live in lives
            for one in live.row.steer
            if one.gate and (live.prompt.ids, one.gate) not in self._gates
        }
        by_prompt: dict[Encoded, list[Gate]] = {}
        for prompt, gate in asked:
            by_prompt.setdefault(prompt, []).append(gate)
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
                        self._gates[prompt.ids, gate] = passed
        for live in lives:
            live.steer = tuple(
                one
                for one in live.row.steer
                if one.gate is None or self._gates[live.prompt.ids, one.gate]
            )

    def _in_batches(
        self,
        order: list[int],
        lengths: Sequence[int],
        batch: int | None,
        work: Callable[[list[int]], None],
    ) -> None:
        """Does `work` on as many rows at once as memory holds; halves what does not fit."""
        at = 0
        while at < len(order):
            size = batch or self._rows_that_fit(max(lengths[r] for r in order[at:]))
            self._halving(order[at : at + size], work)
            at += size

    def _halving(self, chunk: list[int], work: Callable[[list[int]], None]) -> None:
        try:
            work(chunk)
            return
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if len(chunk) == 1:
                raise RunError("out of memory with a single row; shorten its prompt") from error
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        half = (len(chunk) + 1) // 2
        self._halving(chunk[:half], work)
        self._halving(chunk[half:], work)

    def _rows_that_fit(self, tokens: int) -> int:
        """Rows of so many tokens for which half of the free memory suffices."""
        model = self.model
        if model.device.type == "cuda":
            free = torch.cuda.mem_get_info(model.device)[0]
        else:
            import psutil

            free = psutil.virtual_memory().available
        wide = model.dtype.itemsize
        kept = 2 * model.n_layers * model.n_kv_heads * model.d_head * wide
        passing = (6 * model.d_model + 3 * model.hf.config.intermediate_size) * wide
        passing += model.n_heads * tokens * 4  # attention scores of one block
        return max(
            1, min(LARGEST_BATCH, int(free / 2 / (tokens * (kept + passing) + 16 * model.d_vocab)))
        )


class Stepper:
    """Decodes one token of every row a step; rows come and go at any time."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._model = engine, engine.model
        self._waiting: list[_Live] = []
        self._live: list[_Live] = []
        self._ended: dict[int, _Live] = {}
        self._count = 0
        self._stream: Stream | None = None
        self._sampler: Sampler | None = None
        self._next: Tensor | None = None

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting) or any(live.finish is None for live in self._live)

    def add(self, row: Row, taps: Sequence[Site] = ()) -> int:
        """Takes a row in; its prompt is read in the next step.

        Returns:
            The row's id.

        Raises:
            RequestError: as for `Engine.generate`; nothing is added.
        """
        live = self._engine._live(self._count, row, taps, row.sampling.max_new_tokens)
        self._count += 1
        self._waiting.append(live)
        return live.id

    def cancel(self, id: int) -> None:
        """Ends a row; what it has generated so far is its result. Ended rows stay as they are."""
        for live in [*self._waiting, *self._live]:
            if live.id == id and live.finish is None:
                live.finish = "cancelled"
                self._ended[id] = live
        self._waiting = [live for live in self._waiting if live.finish is None]

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
        text = self._model.decode(live.tokens)
        return Result(live.row, tuple(live.tokens), text, live.finish or "", taps)

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Reads waiting prompts, gives every row in work its next token; says what happened."""
        self._drop_ended()
        streams = []
        if self._stream is not None and self._next is not None:
            streams.append(self._stream.step(self._next, self._watch(self._live)))
        if self._waiting:
            streams += self._admit()
        if not streams or self._sampler is None:
            return []
        logits = self._model.unembed(torch.cat(streams))
        steps = torch.tensor([len(live.tokens) for live in self._live], device=logits.device)
        self._next = self._sampler.choose(logits, steps)
        stops = self._model.stop_ids
        events = []
        for live, token in zip(self._live, self._next.tolist(), strict=True):
            if live.finish is not None:
                continue
            if token in stops:
                live.finish = "stop"
            else:
                live.tokens.append(token)
                if live.left <= 0:
                    live.finish = "length"
            if live.finish:
                self._ended[live.id] = live
            events.append(Event(live.id, None if token in stops else token, live.finish))
        return events

    def _watch(self, lives: Sequence[_Live]) -> _Taps | None:
        return _Taps(lives) if any(live.taps for live in lives) else None

    def _admit(self) -> list[Float[Tensor, "batch d_model"]]:
        """Reads the waiting prompts and joins them to the batch."""
        self._engine._open_gates(self._waiting)
        room = max(live.left for live in [*self._live, *self._waiting])
        streams = []
        for late in (False, True):
            group = [live for live in self._waiting if begins_late(live.steered) == late]
            if not group:
                continue
            rows = [live.steered for live in group]
            stream, x = Stream.prefill(self._model, rows, room, self._watch(group))
            streams.append(x)
            self._stream = stream if self._stream is None else self._stream.joined(stream, room)
            self._live += group
        self._waiting = []
        self._settle()
        return streams

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


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)
