"""What people see: text made safe for a terminal, and progress with the time left, on stderr."""

import html
import importlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

NARROWEST = 38  # columns of a panel, if the terminal has so many

# C0 and C1 controls (escape codes among them) and the marks that reorder text on a terminal.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@runtime_checkable
class Report(Protocol):
    """Called with the amount done so far, and perhaps a word on it."""

    def __call__(self, done: float, note: str = "") -> None: ...


def safe(text: str) -> str:
    """`text` with control and direction-changing characters shown as the replacement character."""
    return _UNSAFE.sub("\ufffd", text)


@contextmanager
def progress(
    what: str, total: float | None = None, *, unit: str = "", every: float = 10.0
) -> Iterator[Report]:
    """Shows how far a long task is: a bar on a terminal, a line every `every` seconds elsewhere.

    Args:
        what: the task, in a few words.
        total: the amount of work, or None if unknown.
        unit: what the amount counts; if given, the amounts are shown too.

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

            def show(done: float, note: str = "") -> None:
                said = ", ".join(filter(None, (what, _amount(done, total, unit), note)))
                bar.update(task, completed=done, description=said)

            yield show
        return

    if in_notebook():
        with _in_cell(what, total, unit) as report:
            yield report
        return
    start = said = time.monotonic()

    def told(done: float, note: str = "") -> None:
        nonlocal said
        now = time.monotonic()
        if now - said < every:
            return
        said = now
        print(f"{what}: {_told(done, total, unit, note, now - start)}", file=sys.stderr, flush=True)

    yield told


@contextmanager
def watched(what: str, total: float, report: Report | None) -> Iterator[Report | None]:
    """What a call from Python tells of its progress: to whoever asks, and in a notebook by itself.

    Args:
        report: the caller's own, which is used as it is.
    """
    if report is not None or not in_notebook():
        yield report
        return
    with progress(what, total) as shown:
        yield shown


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    return "ipykernel" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


@contextmanager
def _in_cell(what: str, total: float | None, unit: str) -> Iterator[Report]:
    """Progress as a line below a notebook's cell, from the first second on; it goes at the end."""
    display: Any = importlib.import_module("IPython.display")
    start = said = time.monotonic()
    handle: Any = None

    def report(done: float, note: str = "") -> None:
        nonlocal said, handle
        now = time.monotonic()
        if now - start < 1 or now - said < 0.3:
            return
        said = now
        text = f"{what}: {_told(done, total, unit, note, now - start)}"
        line = display.HTML(f"<small>{html.escape(safe(text))}</small>")
        if handle is None:
            handle = display.display(line, display_id=True)
        else:
            handle.update(line)

    try:
        yield report
    finally:
        if handle is not None:
            handle.update(display.HTML(""))


def _told(done: float, total: float | None, unit: str, note: str, took: float) -> str:
    # the first few percent say little about the rest
    enough = total and done >= 0.05 * total
    left = f", {took * (total - done) / done:.0f} s left" if total and enough else ""
    share = f"{done / total:.0%}" if total else f"{done:g}"
    return ", ".join(filter(None, (share, _amount(done, total, unit), note))) + left


def _amount(done: float, total: float | None, unit: str) -> str:
    if not unit:
        return ""
    return f"{done:.1f} of {total:.1f} {unit}" if total else f"{done:.1f} {unit}"


def side_by_side(pieces: Iterable[tuple[int, str, str | None]], titles: Sequence[str]) -> list[str]:
    """Shows texts as they appear, each in a column (one below the other if stdout is no terminal).

    Args:
        pieces: (column, new text, finish), as `Engine.stream` yields them.
        titles: one for each column.

    Returns:
        The whole texts.
    """
    texts = [""] * len(titles)
    if not sys.stdout.isatty():
        for column, piece, _ in pieces:
            texts[column] += piece
        for title, text in zip(titles, texts, strict=True):
            print(f"[{safe(title)}]\n{safe(text)}\n")
        return texts
    from rich.console import Console
    from rich.live import Live

    console = Console()
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for column, piece, _ in pieces:
                texts[column] += piece
                live.update(_panels(texts, titles, console.width, console.height - 1), refresh=True)
    finally:  # a terminal redraws only what is on its screen: the whole texts come at the end
        if any(texts):
            print_panels(texts, titles)
    return texts


def print_panels(texts: Sequence[str], titles: Sequence[str]) -> None:
    """Shows whole texts side by side on a terminal, as far as its width allows."""
    from rich.console import Console

    console = Console()
    console.print(_panels(texts, titles, console.width))


def _panels(
    texts: Sequence[str], titles: Sequence[str], width: int, height: int | None = None
) -> "RenderableType":
    """Panels in rows of as many as have `NARROWEST` columns each.

    Args:
        width, height: of all together; of texts too long for the height, the last lines.
    """
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    across = max(1, min(len(texts), width // NARROWEST))
    room = width // across
    shown = [Text(safe(text)) for text in texts]
    if height is not None:
        lines = height // -(-len(texts) // across) - 2  # the frame takes two
        shown = [_last(text, room - 4, max(1, lines)) for text in shown]
    panels = [
        Panel(text, title=Text(safe(title), overflow="ellipsis"), title_align="left", width=room)
        for title, text in zip(titles, shown, strict=True)
    ]
    return Columns(panels, padding=0)


def _last(text: "Text", width: int, lines: int) -> "Text":
    """A text's last lines, once it is wrapped at words."""
    from rich.console import Console
    from rich.text import Text

    wrapped = text.wrap(Console(width=width), width)
    return text if len(wrapped) <= lines else Text("\n").join(wrapped[-lines:])
