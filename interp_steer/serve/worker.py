"""One thread owns the model: jobs wait in a queue, join its batch and leave it at any step."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from interp_steer.engine.engine import ALONE, Engine
from interp_steer.engine.memory import is_out_of_memory, release
from interp_steer.engine.row import Result, Row
from interp_steer.engine.stepper import Event, Stepper
from interp_steer.errors import RunError, SteerError
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.codec import RunningText

T = TypeVar("T")


class Full(RunError):
    """The queue holds as many requests as it may."""


class OutOfMemory(RunError):
    """A request does not fit the memory beside the others, or at all."""


@dataclass(frozen=True)
class Piece:
    """New text of a job, and at its end everything else.

    Attributes:
        text: what is new; may be empty.
        finish: None while the job goes on; "stop", "length", "overflow", "cancelled".
        prompt_tokens, tokens: how many were read and generated; at the end.
        found: what the job reads of its result; at the end.
    """

    text: str
    finish: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    found: Any = None


Deliver = Callable[[Piece | Exception], None]


@dataclass(eq=False)
class Job:
    """A row with what its client wants to know.

    Attributes:
        row: what is run.
        deliver: called in the worker's thread with every piece; an exception is the end, too.
        stops: texts that end the answer, and are no part of it.
        taps: sites whose activations are kept.
        read: makes of the result what its client wants to know beside the text.
    """

    row: Row
    deliver: Deliver
    stops: tuple[str, ...] = ()
    taps: tuple[Site, ...] = ()
    read: Callable[[Result], Any] | None = None
    id: int | None = None
    text: RunningText = field(init=False)
    tokens: int = 0
    shown: int = 0
    left: bool = False


class Worker:
    """Runs jobs as one batch; `submit` and `cancel` may be called from any thread.

    Attributes:
        most: rows in the batch at once.
        waiting: jobs that may wait for a place.
        generated: tokens since the beginning.
    """

    def __init__(self, model: SteeringModel, most: int = 64, waiting: int = 256) -> None:
        self.model, self.most, self.waiting = model, most, waiting
        self.generated = 0
        self._engine = Engine(model)
        self._stepper: Stepper = self._engine.stepper()
        self._queue: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="interp-steer", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Jobs in the batch, and those that wait."""
        return len(self._running), len(self._queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes jobs in, all or none.

        Raises:
            Full: too many wait already.
        """
        with self._changed:
            if len(self._queue) + len(jobs) > self.waiting + self.most - len(self._running):
                raise Full(f"{len(self._queue)} requests wait already; try again later")
            self._queue.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs whose client has left; nothing more is delivered of them."""
        with self._changed:
            for job in jobs:
                job.left = True
            self._changed.notify()

    def run(self, task: "Callable[[], T]") -> "Future[T]":
        """Does something else with the model between two steps; the batch waits meanwhile."""
        future: Future[T] = Future()
        with self._changed:
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends the thread after the step that it is in."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    # --- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._running or self._tasks or self._ends):
                    self._changed.wait()
                if self._ends:
                    return
                self._queue = deque(job for job in self._queue if not job.left)
                room = self.most - len(self._running)
                arriving = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
                task = self._tasks.popleft() if self._tasks else None
            if task and task[1].set_running_or_notify_cancel():
                try:
                    task[1].set_result(task[0]())
                except Exception as error:
                    task[1].set_exception(error)
            for job in arriving:
                self._admit(job)
            for id, job in list(self._running.items()):
                if job.left:
                    self._drop(id)
            try:
                events = self._stepper.step() if self._running else []
            except Exception as error:
                self._failed(error)
                continue
            for event in events:
                self._took(event)

    def _admit(self, job: Job) -> None:
        try:
            job.id = self._stepper.add(job.row, job.taps)
            job.text = self.model.running_text(job.row.prompt)
        except Exception as error:  # of this request alone
            job.deliver(error)
            return
        self._running[job.id] = job

    def _drop(self, id: int) -> None:
        """Takes a row out of the batch."""
        del self._running[id]
        self._stepper.cancel(id)
        self._stepper.pop(id)

    def _failed(self, error: Exception) -> None:
        """A step failed: the newest row makes room if memory ran out, else all are told."""
        if is_out_of_memory(error):
            release(self.model.device)
            newest = max(self._running)
            job = self._running[newest]
            self._drop(newest)
            job.deliver(OutOfMemory("out of memory; ask for fewer tokens, or again later"))
            return
        for job in self._running.values():
            job.deliver(error if isinstance(error, SteerError) else RunError(f"failed: {error}"))
        self._running, self._stepper = {}, self._engine.stepper()

    def _took(self, event: Event) -> None:
        job = self._running.get(event.id)
        if job is None:
            return
        if event.token_id is not None:
            job.text.add(event.token_id)
            job.tokens += 1
            self.generated += 1
        finish = event.finish
        if finish == "memory":
            del self._running[event.id]
            self._stepper.pop(event.id)
            job.deliver(OutOfMemory(ALONE))
            return
        if not finish and job.text.pending:
            return  # the rest of a character is still to come
        text = job.text.text
        end = min((at for at in map(text.find, job.stops) if at >= 0), default=-1)
        if end >= 0:
            text, finish = text[:end], "stop"
            self._stepper.cancel(event.id)
        sure = len(text) if finish else len(text) - _held_back(text, job.stops)
        new, job.shown = text[job.shown : sure], max(job.shown, sure)
        if not finish:
            if new:
                job.deliver(Piece(new))
            return
        del self._running[event.id]
        result = self._stepper.pop(event.id)
        read = len(self.model.encode(job.row.prompt).ids)
        try:
            found = job.read(result) if job.read else None
        except Exception as error:
            job.deliver(error)
            return
        job.deliver(Piece(new, finish, read, job.tokens, found))


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
