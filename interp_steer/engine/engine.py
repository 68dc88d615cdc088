"""Rows in, rows out: many rows in one batch, every row with its own everything.

    engine = Engine(SteeringModel.load("starter"))
    results = engine.generate([Row(prompt), Row(prompt, steer=parse(text, directions))])

`Stepper` is the machine; `generate` and `stream` wrap it. `score` reads given continuations.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from interp_steer.engine.forward import run
from interp_steer.engine.memory import chunks, free, is_out_of_memory, release, working
from interp_steer.engine.row import Result, Row, Score
from interp_steer.engine.stepper import Admission, Stepper, Taps
from interp_steer.errors import RequestError, RunError
from interp_steer.model.block import exactly
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Prompt
from interp_steer.util.console import Report


class Engine:
    """Runs rows on a model."""

    def __init__(self, model: SteeringModel) -> None:
        self.model = model
        self.admission = Admission(model)

    def stepper(self) -> Stepper:
        """A machine to add rows to at any time; several may be in use in turn."""
        return Stepper(self.admission)

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
            report: called with the number of rows done, rows in work counted by their tokens.

        Raises:
            RequestError: an empty prompt, one that does not fit the context, or an intervention
                that does not fit the model.
            RunError: one row alone runs out of memory.
        """
        encoded = [self.model.encode(row.prompt) for row in rows]
        # neighbours of one length need no padding, and equal prompts share their prefill
        order = sorted(range(len(rows)), key=lambda r: (len(encoded[r].ids), encoded[r].ids))
        needs = [
            working(self.model, len(one.ids), len(one.ids) + row.sampling.max_new_tokens)
            for one, row in zip(encoded, rows, strict=True)
        ]
        results: dict[int, Result] = {}

        def work(chunk: list[int]) -> None:
            for r in chunk:
                results.pop(r, None)  # of a larger batch that did not fit
            stepper = self.stepper()
            ids = {stepper.add(rows[r], taps): r for r in chunk}
            while stepper.busy:
                for event in stepper.step():
                    if event.finish:
                        results[ids[event.id]] = stepper.pop(event.id)
                if report:
                    report(len(results) + stepper.share)

        self._in_batches(order, needs, batch, work)
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
                if not event.finish and self.model.pending(tokens[number]):
                    continue  # the rest of a character is still to come
                text = self.model.decode(tokens[number], rows[number].prompt)
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
            RequestError: as for `generate`, for a reference of other tokens, and for a text that
                the tokenizer joins to its prompt's last token (see `SteeringModel.encode_after`).
        """
        model = self.model
        if len(continuations) != len(rows):
            raise RequestError(
                f"{len(rows)} rows need as many continuations, got {len(continuations)}"
            )
        pairs = zip(rows, continuations, strict=True)
        given = [self.ids(row.prompt, after) for row, after in pairs]
        lives = [
            self.admission.take(number, row, taps, given=len(after))
            for number, (row, after) in enumerate(zip(rows, given, strict=True))
        ]
        against = list(reference) if reference is not None else [None] * len(rows)
        if len(against) != len(rows) or any(not 0 <= (r or 0) < len(rows) for r in against):
            raise RequestError(
                f"reference needs a row number 0-{len(rows) - 1} or None for each row"
            )
        for mine, other in zip(range(len(rows)), against, strict=True):
            if other is None:
                continue
            if (lives[mine].prompt.ids, given[mine]) != (lives[other].prompt.ids, given[other]):
                raise RequestError(f"row {mine} and its reference {other} have different tokens")
        self.admission.judge(lives)
        sequences = [(*live.prompt.ids, *after) for live, after in zip(lives, given, strict=True)]
        # streams of reference rows are kept; their logits are formed again where they are needed
        wanted = {other for other in against if other is not None}
        kept: dict[int, Tensor] = {}
        early: list[int] = []  # rows that were read before the row that they are compared with
        found: dict[int, Score] = {}

        def work(chunk: list[int]) -> None:
            part = [lives[r] for r in chunk]
            for live in part:
                live.seen.clear()  # of a larger batch that did not fit
            with exactly():
                out = run(
                    model,
                    [live.steered for live in part],
                    [sequences[r] for r in chunk],
                    watch=Taps(part) if taps else None,
                )
                ends = [len(given[r]) + 1 for r in chunk]
                streams = [x[len(x) - n :] for x, n in zip(out, ends, strict=True)]
                kept.update({r: x for r, x in zip(chunk, streams, strict=True) if r in wanted})
                # in place: small results that stay between large ones that go would leave holes in
                # the heap, and a gigabyte of them
                wanting = len(chunk) if last_logits else 0
                room = partial(torch.empty, dtype=torch.float32)
                logprobs, kl = (room(sum(ends)).split(ends) for _ in range(2))
                finals = room(wanting, model.d_vocab)
                last: tuple[int, Tensor] | None = None
                for i, r in enumerate(chunk):
                    logits = model.unembed(streams[i]).float()
                    if last_logits:
                        finals[i] = logits[-1]
                    logits = logits.log_softmax(-1)
                    ids = torch.tensor(given[r], dtype=torch.long, device=model.device)
                    logprobs[i][:-1] = logits[:-1].gather(1, ids[:, None])[:, 0]
                    if (other := against[r]) is not None and other not in kept:
                        early.append(r)
                    elif other is not None:
                        if last is None or last[0] != other:
                            last = other, model.unembed(kept[other]).float().log_softmax(-1)
                        kl[i][:] = (last[1].exp() * (last[1] - logits)).sum(-1)
                    if report:
                        report(len(found) + i + 1)
                for i, r in enumerate(chunk):
                    found[r] = Score(
                        given[r],
                        logprobs[i][:-1].clone(),
                        finals[i].clone() if last_logits else None,
                        kl[i].clone() if against[r] is not None else None,
                        {site: torch.cat(parts) for site, parts in lives[r].seen.items()},
                    )

        needs = [working(model, len(s), 0) for s in sequences]
        order = sorted(range(len(rows)), key=lambda r: (len(sequences[r]), sequences[r]))
        # references first, so that their streams are there when they are asked for
        self._in_batches([r for r in order if r in wanted], needs, batch, work)
        for r in early:
            other, kl = against[r], found[r].kl
            assert other is not None and kl is not None
            with torch.no_grad():
                p, q = (model.unembed(kept[n]).float().log_softmax(-1) for n in (other, r))
                kl[:] = (p.exp() * (p - q)).sum(-1)
        self._in_batches([r for r in order if r not in wanted], needs, batch, work)
        return [found[r] for r in range(len(rows))]

    def ids(self, prompt: Prompt, continuation: Sequence[int] | str) -> tuple[int, ...]:
        """Token ids of a continuation: as given, or of a text that follows the prompt directly."""
        if isinstance(continuation, str):
            return self.model.encode_after(prompt, continuation)
        for token in continuation:
            if type(token) is not int or not 0 <= token < self.model.d_vocab:
                raise RequestError(
                    f"{token!r} is no token id of {self.model.name}: 0-{self.model.d_vocab - 1}"
                )
        return tuple(continuation)

    def _in_batches(
        self,
        order: list[int],
        needs: Sequence[int],
        batch: int | None,
        work: Callable[[list[int]], None],
    ) -> None:
        """Does `work` on as many rows at once as memory holds; halves what does not fit."""
        if batch is not None and batch < 1:
            raise RequestError(f"batch is {batch}, expected at least 1")
        if batch:
            some = [order[at : at + batch] for at in range(0, len(order), batch)]
        else:
            some = chunks(order, needs, free(self.model.device) // 2)
        for chunk in some:
            self._halving(chunk, work)

    def _halving(self, chunk: list[int], work: Callable[[list[int]], None]) -> None:
        try:
            work(chunk)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(chunk) == 1:
                raise RunError("out of memory with a single row; shorten its prompt") from error
        release(self.model.device)
        half = (len(chunk) + 1) // 2
        self._halving(chunk[:half], work)
        self._halving(chunk[half:], work)
