"""Rows in, rows out: many rows in one batch, every row with its own everything.

    engine = Engine(SteeringModel.load("starter"))
    results = engine.generate([Row(prompt), Row(prompt, steer=parse(text, directions))])

`Stepper` is the machine; `generate` and `stream` wrap it. `score` reads given continuations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.engine.admission import Admission, Live, watching
from interp_steer.engine.bank import Operands
from interp_steer.engine.forward import read
from interp_steer.engine.memory import chunks, free, is_out_of_memory, release, working
from interp_steer.engine.row import Result, Results, Row, Score
from interp_steer.engine.stepper import Stepper
from interp_steer.errors import RequestError, RunError
from interp_steer.model.block import exactly
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Given
from interp_steer.steering.encoder import Encoders
from interp_steer.util.console import Report, watched

ALONE = "out of memory with a single row; shorten its prompt"
LOGITS = 2**24
"""Logits that are formed at once, of scores."""


class Engine:
    """Runs rows on a model."""

    def __init__(self, model: SteeringModel, encoders: Encoders | None = None) -> None:
        """`encoders` gives the SAEs of latent clamps, such as `SaeStore(budget).encoder`; None is
        the store that all share.
        """
        self.model = model
        self.admission = Admission(model, encoders=encoders)

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
    ) -> Results:
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
            working(self.model, n := len(one.ids), n + row.sampling.max_new_tokens)
            for one, row in zip(encoded, rows, strict=True)
        ]
        results: dict[int, Result] = {}
        with watched("generating", len(rows), report) as told:
            work = partial(self._finish, rows, taps, results, told)
            self._in_batches(order, needs, batch, work)
        return Results(results[r] for r in range(len(rows)))

    def _finish(
        self,
        rows: Sequence[Row],
        taps: Sequence[Site],
        results: dict[int, Result],
        report: Report | None,
        chunk: list[int],
    ) -> None:
        """Runs some of the rows to their end."""
        for r in chunk:
            results.pop(r, None)  # of a larger batch that did not fit
        stepper = self.stepper()
        ids = {stepper.add(rows[r], taps): r for r in chunk}
        while stepper.busy:
            for event in stepper.step():
                if event.finish == "memory":
                    raise RunError(ALONE)
                if event.finish:
                    results[ids[event.id]] = stepper.pop(event.id)
            if report:
                report(len(results) + stepper.share)

    def stream(self, rows: Sequence[Row]) -> Iterator[tuple[int, str, str | None]]:
        """Runs rows in one batch and yields (row number, new text, finish) as text appears.

        Leaving the loop early leaves nothing behind.
        """
        stepper = self.stepper()
        ids = {stepper.add(row): number for number, row in enumerate(rows)}
        texts = [self.model.running_text(row.prompt) for row in rows]
        shown = [0] * len(rows)
        while stepper.busy:
            for event in stepper.step():
                number = ids[event.id]
                if event.token_id is not None:
                    texts[number].add(event.token_id)
                if not event.finish and texts[number].pending:
                    continue  # the rest of a character is still to come
                text = texts[number].text
                yield number, text[shown[number] :], event.finish
                shown[number] = len(text)

    def score(
        self,
        rows: Sequence[Row],
        continuations: Sequence[Sequence[int] | str],
        *,
        reference: Sequence[int | None] | None = None,
        last_logits: bool = False,
        among: Sequence[int] = (),
        taps: Sequence[Site] = (),
        batch: int | None = None,
        report: Report | None = None,
    ) -> list[Score]:
        """Reads given continuations, teacher-forced; sampling settings play no part.

        Args:
            rows: prompts and interventions; scope `generated` covers the continuation.
            continuations: token ids (may be none), or text that follows the prompt directly.
            reference: for each row the number of the row that it is compared with by KL; both
                need the same continuation; their prompts may differ.
            last_logits: whether to return the logits after the last token.
            among: token ids whose probability together is told at every position.
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
            self.admission.take(number, row, taps, len(after))
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
            if given[mine] != given[other]:
                raise RequestError(
                    f"row {mine} and its reference {other} have different continuations"
                )
        self.admission.judge(lives)
        scoring = _Scoring(model, lives, given, against, Asked(last_logits, tuple(among)))
        needs = [working(model, len(ids), 0) for ids in scoring.sequences]
        order = sorted(
            range(len(rows)), key=lambda r: (len(scoring.sequences[r]), scoring.sequences[r])
        )
        chained = [r for r in order if r in scoring.wanted and against[r] is not None]
        with watched("scoring", len(rows), report) as told:
            work = partial(scoring.read, told)
            # references first, so that their streams are there when they are asked for
            self._in_batches([r for r in order if r in scoring.wanted], needs, batch, work)
            self._in_batches(chained, needs, batch, scoring.compare)
            self._in_batches([r for r in order if r not in scoring.wanted], needs, batch, work)
        return [scoring.found[r] for r in range(len(rows))]

    def ids(self, prompt: Given, continuation: Sequence[int] | str) -> tuple[int, ...]:
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
        """Does `work` on as many rows at once as half of the free memory holds; halves what does
        not fit after all.
        """
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
                raise RunError(ALONE) from error
        release(self.model.device)
        half = (len(chunk) + 1) // 2
        self._halving(chunk[:half], work)
        self._halving(chunk[half:], work)


class _Scoring:
    """Given continuations of rows, read in batches.

    Attributes:
        sequences: token ids of each row's prompt and continuation.
        wanted: rows that others are compared with.
        found: scores of the rows that were read.
    """

    def __init__(
        self,
        model: SteeringModel,
        lives: Sequence[Live],
        given: Sequence[tuple[int, ...]],
        against: Sequence[int | None],
        asked: "Asked",
    ) -> None:
        self.model, self.lives, self.given, self.against = model, lives, given, against
        self.asked = asked
        self.sequences = [(*x.prompt.ids, *after) for x, after in zip(lives, given, strict=True)]
        self.wanted = {other for other in against if other is not None}
        self.found: dict[int, Score] = {}
        self._kept: dict[int, Tensor] = {}  # streams of rows that others are compared with

    @exactly()
    def read(self, report: Report | None, chunk: list[int]) -> None:
        """Reads some of the rows."""
        part = [self.lives[r] for r in chunk]
        watch = watching(part)
        operands, rows = Operands(self.model.device), [live.steered for live in part]
        flat = read(self.model, operands, rows, [self.sequences[r] for r in chunk], watch=watch)
        streams = flat.split([len(self.given[r]) + 1 for r in chunk])
        self._kept |= {r: x for r, x in zip(chunk, streams, strict=True) if r in self.wanted}
        others = [None if r in self.wanted else self.against[r] for r in chunk]
        compared = [None if other is None else self._kept[other] for other in others]
        given = [self.given[r] for r in chunk]
        values = readings(self.model, streams, given, compared, self.asked)
        seen: dict[int, dict[Site, Tensor]] = {}
        for live, site, x in watch.take() if watch else ():
            sites = seen.setdefault(live.id, {})
            sites[site] = torch.cat([sites[site], x]) if site in sites else x.clone()
        for r, (logprobs, last, kl, among) in zip(chunk, values, strict=True):
            self.found[r] = Score(self.given[r], logprobs, last, kl, among, seen.get(r, {}))
        if report:
            report(len(self.found))

    @exactly()
    def compare(self, chunk: list[int]) -> None:
        """KL of rows that others are compared with themselves, after all of them were read."""
        others = [self.against[r] for r in chunk]
        compared = [None if other is None else self._kept[other] for other in others]
        streams, given = [self._kept[r] for r in chunk], [self.given[r] for r in chunk]
        for r, (_, _, kl, _) in zip(
            chunk, readings(self.model, streams, given, compared), strict=True
        ):
            self.found[r] = replace(self.found[r], kl=kl)


@dataclass(frozen=True)
class Asked:
    """What is read of logits beside the given tokens; see `Engine.score`."""

    last_logits: bool = False
    among: tuple[int, ...] = ()


NOTHING = Asked()


def readings(
    model: SteeringModel,
    streams: Sequence[Float[Tensor, "_ d_model"]],
    given: Sequence[Sequence[int]],
    references: Sequence[Float[Tensor, "_ d_model"] | None],
    asked: Asked = NOTHING,
) -> list[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Of each row the log probabilities of given tokens, the last logits if asked for, KL from its
    reference if it has one, and ln of the probability of the tokens asked for; on the CPU.

    Args:
        streams: after the last block, from the last position of the prompt on: one position more
            than tokens.
        references: streams that rows are compared with.
    """
    ends = [len(x) for x in streams]
    known = {id(x): x for x in references if x is not None}
    flat = torch.cat([*streams])
    every = torch.cat([*known.values()]) if known else flat[:0]
    begins = dict(zip(known, accumulate(map(len, known.values()), initial=0), strict=False))
    numbers = range(len(flat))
    tokens = [token for ids in given for token in (*ids, 0)]
    rows = [row for row, n in enumerate(ends) for _ in range(n)]
    lasts = {n - 1: row for row, n in enumerate(accumulate(ends))}
    # positions that are compared with the same one are neighbours: its logits are formed once
    against = [
        -1 if x is None else begins[id(x)] + position
        for x, n in zip(references, ends, strict=True)
        for position in range(n)
    ]
    order = sorted(numbers, key=lambda n: (against[n], rows[n]))
    size = (len(ends) if asked.last_logits else 0, model.d_vocab)
    finals = torch.empty(size, dtype=torch.float32, device=flat.device)
    logprobs, kl, mass = finals.new_zeros(3, len(flat))
    among = torch.tensor(asked.among, device=flat.device)
    together = max(1, LOGITS // model.d_vocab)
    for start in range(0, len(order), together):
        some = order[start : start + together]
        others = {other: i for i, other in enumerate(dict.fromkeys(against[n] for n in some))}
        table = [(n, tokens[n], others[against[n]]) for n in some]
        here, token, which = torch.tensor(table).T.to(flat.device)
        logits = model.unembed(flat[here]).float()
        ended = (
            [(i, lasts[n]) for i, n in enumerate(some) if n in lasts] if asked.last_logits else []
        )
        if ended:
            i, row = torch.tensor(ended).T.to(flat.device)
            finals[row] = logits[i]
        logits = logits.log_softmax(-1)
        logprobs[here] = logits.gather(1, token[:, None])[:, 0]
        if len(among):
            mass[here] = logits[:, among].logsumexp(-1)
        if max(others) >= 0:
            index = torch.tensor([max(0, other) for other in others]).to(flat.device)
            reference = model.unembed(every[index]).float().log_softmax(-1)[which]
            kl[here] = (reference.exp() * (reference - logits)).sum(-1)
    parts = zip(*(x.cpu().split(ends) for x in (logprobs, kl, mass)), strict=True)
    last = [x.clone() for x in finals.cpu()] if asked.last_logits else [None] * len(ends)
    return [
        (
            logprob[:-1].clone(),
            final,
            divergence.clone() if reference is not None else None,
            ln.clone() if asked.among else None,
        )
        for (logprob, divergence, ln), final, reference in zip(parts, last, references, strict=True)
    ]
