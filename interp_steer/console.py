"""What people see: text made safe for a terminal, and progress with the time left, on stderr."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# C0 and C1 controls (escape codes among them) and the marks that reorder text on a terminal.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

Report = Callable[[float], None]
"""Called with the amount done so far."""


def safe(text: str) -> str:
    """`text` with control and direction-changing characters shown as the replacement character."""
    return _UNSAFE.sub("\ufffd", text)


@contextmanager
def progress(what: str, total: float | None = None, *, every: float = 10.0) -> Iterator[Report]:
    """Shows how far a long task is: a bar on a terminal, a line every `every` seconds elsewhere.

    Args:
        what: the task, in a few words.
        total: the amount of work, or None if unknown.

    Yields:
        A function to call with the amount done so far.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
        with Progress(
            *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
        ) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return

    start = said = time.monotonic()

    def report(done: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < every:
            return
        said = now
        left = f", {(now - start) * (total - done) / done:.0f} s left" if total and done else ""
        share = f"{done / total:.0%}" if total else f"{done:g}"
        print(f"{what}: {share}{left}", file=sys.stderr, flush=True)

    yield report
