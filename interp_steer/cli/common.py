"""What the commands share: options with one meaning everywhere, output files, tables, the model."""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from interp_steer.errors import RequestError
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    from interp_steer.model.model import SteeringModel
    from interp_steer.steering.intervention import Intervention


def opt(text: str, *names: str, **more: Any) -> Any:
    """An option with its help."""
    return typer.Option(*names, help=text, **more)


def arg(text: str, **more: Any) -> Any:
    """An argument with its help."""
    return typer.Argument(help=text, **more)


Model = Annotated[str, opt("'starter', a folder, or the name of a model on the Hugging Face hub.")]
Dtype = Annotated[str | None, opt("float32, bfloat16 or float16.")]
Device = Annotated[str | None, opt("cpu, cuda:0 and so on.")]
Date = Annotated[
    str | None, opt("Today's date, for a chat template that asks for it; default 2024-07-26.")
]
Json = Annotated[bool, opt("Print JSON.", "--json")]
Text = Annotated[bool, opt("Give prompts as plain text, without the chat template.", "--text")]
System = Annotated[str | None, opt("System prompt; '' is an empty one. By default none.")]
Named = Annotated[
    list[str] | None,
    typer.Option(
        "--direction",
        metavar="NAME=FILE",
        help="A name by which --steer calls a direction's file. May be repeated. Stored directions "
        "have a name already.",
    ),
]
MaxNewTokens = Annotated[int, opt("An answer has at most so many tokens.")]
Temperature = Annotated[float, opt("At 0 the likeliest token is taken.")]
TopP = Annotated[float, opt("Draw from the likeliest tokens, of this share together.")]
Penalty = Annotated[float, opt("Above 1, tokens that were there already become less likely.")]
Seed = Annotated[int, opt("Seed of the random draws.")]
Batch = Annotated[int | None, opt("Rows computed at once; by default as many as fit the memory.")]
Layers = Annotated[str | None, opt("Only these layers, such as 3,7,12-20 or 8-20/4.")]
Positive = Annotated[Path, opt("File of texts or prompts with the concept.")]
Negative = Annotated[Path, opt("File of texts or prompts without the concept.")]
Name = Annotated[str, opt("The direction's name, for --steer.")]
Saved = Annotated[Path | None, opt("File to save to; by default NAME.safetensors in the cache.")]

WRAPPED = {"label", "explainers", "promoted", "rises", "prompt", "interval", "steer"}
_NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?%?|nan|")


def group() -> typer.Typer:
    """Commands under one name; what it is for stands in `main.COMMANDS`."""
    return typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )


def load(
    name: str,
    dtype: str | None,
    device: str | None,
    revision: str | None = None,
    *,
    date: str | None = None,
    weights: bool = True,
) -> "SteeringModel":
    """The model, its imports announced; raises as `SteeringModel.load` does."""
    with progress("starting", every=5):
        from interp_steer.model.model import SteeringModel

    return SteeringModel.load(
        name, dtype=dtype, device=device, revision=revision, date=date, weights=weights
    )


def check_fits(
    model: str, settings: "Iterable[Sequence[Intervention]]", revision: str | None = None
) -> None:
    """Refuses interventions at sites that the model has not, before its weights are read."""
    from interp_steer.model.loading import glance

    if bounds := glance(model, revision):
        for setting in settings:
            for step in setting:
                step.check(bounds)


def run_folder(name: str, content: object) -> Path:
    """A folder of the cache for a run: the same for the same content, as JSON tells it."""
    from interp_steer.util.files import cache_dir

    text = json.dumps(content).encode(errors="surrogatepass")
    return cache_dir("runs") / f"{name}-{hashlib.sha256(text).hexdigest()[:8]}"


def words(text: str | None) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def at_least_one(**options: float | None) -> None:
    """Refuses an option below 1; None is an option that was not given."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise RequestError(f"--{name} is {value}, expected at least 1")


def indices(option: str, text: str, sign: str = "") -> list[int]:
    """`3,7,12-20/2` as numbers; with the sign "-?" negative ones too."""
    numbers: list[int] = []
    whole = rf"\s*({sign}\d{{1,9}})(?:-({sign}\d{{1,9}})(?:/([1-9]\d{{0,8}}))?)?\s*"
    for part in text.split(","):
        bounds = re.fullmatch(whole, part)
        low, high = map(int, (bounds[1], bounds[2] or bounds[1])) if bounds else (1, 0)
        if not low <= high < low + 100_000:
            such = " or -1" if sign else ""
            raise RequestError(f"--{option} is {text!r}, expected such as 3,7,12-20{such}")
        numbers += range(low, high + 1, int(bounds[3] or 1) if bounds else 1)
    return numbers


def check_name(name: str) -> None:
    """Refuses a name that no line of interventions could hold."""
    from interp_steer.steering.direction import is_name

    if not is_name(name):
        raise RequestError(f"{name!r} cannot name a direction: use letters, digits, '_', '.', '-'")


def writable(
    option: str, path: Path | None, suffixes: Sequence[str] = (), new_folders: bool = False
) -> None:
    """Refuses a file that cannot be written, before any work is done."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise RequestError(f"{path.name}: expected a {' or '.join(suffixes)} file")
    if path.is_dir():
        raise RequestError(f"{option} {path} is a folder; give a file")
    folder = path.absolute().parent
    if not folder.exists() and not new_folders:
        raise RequestError(f"{option} {path}: there is no folder {folder}")
    _try(option, path)


def writable_folder(option: str, path: Path | None) -> None:
    """Refuses a folder in which nothing can be written, before any work is done."""
    if path is not None:
        if path.exists() and not path.is_dir():
            raise RequestError(f"{option} {path} is a file; give a folder")
        _try(option, path / "any")


def _try(option: str, path: Path) -> None:
    """Writes a file without a name in the nearest folder that is there."""
    there = next(one for one in path.absolute().parents if one.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RequestError(f"{option} {path} cannot be written: {error.strerror}") from None


def print_json(value: object) -> None:
    """For programs; every character beyond ASCII is escaped, so that none reaches a terminal."""
    print(json.dumps(value, indent=1))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table: aligned on a terminal, without empty columns; elsewhere tabs between cells.

    None and NaN are empty cells. Columns of numbers are aligned on the right.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for line in (columns, *cells):
            print("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    filled = [i for i in range(len(columns)) if any(row[i] for row in cells)]
    room = 0
    for i in filled:
        column, wrapped = [row[i] for row in cells], columns[i] in WRAPPED
        side: Literal["left", "right"] = "left"
        if all(_NUMBER.fullmatch(cell) for cell in column):
            side = "right"
        shown.add_column(columns[i], justify=side, no_wrap=not wrapped, overflow="fold")
        width = max(map(len, [*columns[i].split("\n"), *column]))
        room += 2 + (min(24, width) if wrapped else width)
    for row in cells:
        shown.add_row(*(Text(row[i]) for i in filled))  # Text: a label is not markup
    console = Console()
    Console(width=max(console.width, room)).print(shown)


def _cell(value: Any) -> str:
    """A value as the text of a cell, safe for a terminal and on one line."""
    if value is None or value != value:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(one) for one in value[:6])
    text = safe(str(value).replace("\n", "\\n").replace("\t", " ")).strip()
    return text if len(text) <= 300 else text[:299] + "…"
