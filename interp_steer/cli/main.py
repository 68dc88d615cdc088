"""The command line: assembles the other files and prints.

Heavy imports wait inside the commands, so that `--help` answers at once.
"""

import contextlib
import io
import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, Exit, TyperException

from interp_steer.cli.ablate import ablate
from interp_steer.cli.common import Date, Device, Dtype, Json, Model, load
from interp_steer.cli.features import app as features
from interp_steer.cli.features import saes
from interp_steer.cli.labels import app as labels
from interp_steer.cli.study import app as study
from interp_steer.cli.study import report
from interp_steer.errors import RequestError, SteerError, SteerWarning, nearest, note
from interp_steer.util.console import progress, safe

app = typer.Typer(
    help="Steer large language models without fine-tuning, and study what steering does.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(labels, name="labels")
app.add_typer(features, name="features")
app.add_typer(saes, name="sae")
app.add_typer(study, name="study")
app.command()(report)
app.command()(ablate)
direction = typer.Typer(help="Make and show directions.", no_args_is_help=True)
app.add_typer(direction, name="direction")

Named = Annotated[
    list[str] | None,
    typer.Option(
        "--direction",
        help="NAME=FILE, for --steer. Names in the cache and files need no such option.",
    ),
]

HARDLY = 0.02  # share of the stream below which a difference of means hardly steers
LONGEST = 2000  # characters of an error


def main() -> None:
    """Runs the command line; every expected error is one line on stderr and an exit code."""
    if sys.stderr is None:  # closed by the caller; print would write to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.exit(fail("cannot write the output: stdout is closed", 1))
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 gets question marks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    shown = warnings.showwarning
    warnings.showwarning = _noting(shown)
    try:
        code = _invoke(sys.argv[1:])
        sys.stdout.flush()
    except SteerError as error:
        code = fail(str(error), error.exit_code)
    except TyperException as error:
        code = _misused(error)
    except Exit as error:
        code = error.exit_code
    except (Abort, EOFError, KeyboardInterrupt):
        code = fail("stopped", 130)
        if threading.active_count() > 1:  # Python would wait for those that wait for a server
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stdout.flush()
            os._exit(code)
    except BrokenPipeError:  # the reader (`head`, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        what = error.filename or "cannot write the output"
        code = fail(f"{what}: {error.strerror or error}", 1)
        if not error.filename:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        warnings.showwarning = shown
    sys.exit(code)


def _invoke(words: list[str]) -> int:
    """Runs one command. Typer's own way to run it turns an interrupt and a closed pipe into exit
    codes without a word.
    """
    command = typer.main.get_command(app)
    with command.make_context("interp-steer", words) as context:
        command.invoke(context)
    return 0


def _misused(error: TyperException) -> int:
    """A wrong call; a group of commands without one is a question, and its help the answer."""
    context = getattr(error, "ctx", None)
    if context is not None and error.format_message() == context.get_help():
        print(context.get_help())
        return 0
    return fail(error.format_message(), 2)


def _noting(other: Callable[..., None]) -> Callable[..., None]:
    """Shows this package's own warnings as one line, and other ones as they were."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, SteerWarning):
            print("note: " + safe(" ".join(str(message).split())), file=sys.stderr)
        else:
            other(message, category, *where, **more)

    return show


def fail(message: str, code: int) -> int:
    """Says in one line what went wrong."""
    line = safe(" ".join(message.split()))
    if len(line) > LONGEST:  # somebody's own text is in it
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    return code


def _writable(out: Path | None) -> None:
    """Refuses what cannot be a file, before any work is done."""
    if out is None:
        return
    if out.is_dir():
        raise RequestError(f"--out {out} is a folder; give a file")
    if not out.resolve().parent.is_dir():
        raise RequestError(f"--out {out}: there is no folder {out.resolve().parent}")


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for the plot and the records.")] = None,
) -> None:
    """Talk about the Eiffel Tower: builds a direction, chooses its strength, shows what it does."""
    model = load("starter", None, None)
    from interp_steer.cli import demo as show
    from interp_steer.util.files import cache_dir

    show.run(model, out or cache_dir("runs", "demo"))


@app.command()
def generate(
    model: Model = "starter",
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt, .json, .jsonl or .csv file; FILE.csv:COLUMN.")
    ] = None,
    steer: Annotated[
        list[str] | None,
        typer.Option(help="Interventions, such as 'add(eiffel, 0.3 dose) at 15'; may be repeated."),
    ] = None,
    named: Named = None,
    system: Annotated[str | None, typer.Option(help="System prompt; '' is an empty one.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Plain text, no chat template.")] = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    batch: Annotated[
        int | None, typer.Option(help="Rows at once; default fits the memory.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the records to a .json file.")] = None,
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
    date: Date = None,
) -> None:
    """Answer prompts, each unsteered and under every --steer, in one batch."""
    from interp_steer.util.console import side_by_side

    if not prompt and not prompts:
        raise RequestError("nothing to answer: give --prompt or --prompts")
    if any(not line.strip() for line in steer or []):
        raise RequestError("--steer is empty; leave it out for the unsteered model")
    _writable(out)
    from interp_steer.prompts.file import PromptFile, numbered

    file = PromptFile.read(prompts) if prompts else None
    loaded = load(model, dtype, device, date=date)
    from interp_steer.engine.engine import Engine
    from interp_steer.engine.row import Row, Sampling, record
    from interp_steer.prompts.item import Item
    from interp_steer.steering.directions import Directions
    from interp_steer.steering.grammar import parse
    from interp_steer.steering.intervention import resolve
    from interp_steer.steering.scale import Scale
    from interp_steer.util.files import whole

    known = Directions(named or [])
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    as_chat = loaded.is_chat and not text
    asked = [Item.of(one, as_chat=as_chat, system=system).prompt for one in prompt or []]
    encoded = [loaded.encode(p) for p in asked]
    for number, item in enumerate(file.items(as_chat=as_chat, system=system) if file else [], 1):
        with numbered(prompts or "", number):
            encoded.append(loaded.encode(item.prompt))
        asked.append(item.prompt)
    scale = Scale.of(loaded, encoded) if any(len(one.ids) > 1 for one in encoded) else None
    settings = [(), *(parse(line, known) for line in steer or [])]
    rows = [Row(p, resolve(setting, scale), sampling, seed) for p in asked for setting in settings]
    engine = Engine(loaded)
    if len(rows) <= 3 and len(asked) == 1 and sys.stdout.isatty() and not as_json and not out:
        side_by_side(engine.stream(rows), [_title(row, scale) for row in rows])
        return
    with progress("generating", len(rows)) as report:
        results = engine.generate(rows, batch=batch, report=report)
    records = [record(result, scale) for result in results]
    if out:
        with whole(out) as part:
            part.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    if as_json:
        print(json.dumps(records, ensure_ascii=False, indent=1))
    elif not out:
        for result in results:
            if not result.row.steer:
                said = result.row.prompt
                print("\n# " + safe(said if isinstance(said, str) else said[-1][1]))
            print(f"\n[{safe(_title(result.row, scale))}]\n{safe(result.text)}")


def _title(row: Any, scale: Any) -> str:
    """A row's interventions with every form of their strength."""
    if not row.steer:
        return "unsteered"
    titles = []
    for one in row.steer:
        forms = []
        for s in one.strengths(scale):
            form = f"{s['coefficient']:.4g}"
            form += f" = {s['dose']:.2f} dose" if s["dose"] is not None else ""
            form += f" = {s['max']:.2f} max" if s["max"] is not None else ""
            forms.append(form)
        titles.append(f"{one}: {', '.join(dict.fromkeys(forms))}")
    return "; ".join(titles)


@app.command()
def chat(
    model: Model = "starter",
    steer: Annotated[str, typer.Option(help="Interventions, as for generate.")] = "",
    named: Named = None,
    system: Annotated[str | None, typer.Option(help="System prompt; '' is an empty one.")] = None,
    max_new_tokens: int = 128,
    temperature: float = 0.5,
    top_p: float = 1.0,
    repetition_penalty: float = 1.1,
    seed: int = 0,
    dtype: Dtype = None,
    device: Device = None,
    date: Date = None,
) -> None:
    """Talk to the steered model beside its unsteered self. `/steer LINE`, `/reset`, `/quit`."""
    loaded = load(model, dtype, device, date=date)
    from interp_steer.cli import chat as conversation
    from interp_steer.engine.row import Sampling
    from interp_steer.steering.directions import Directions

    sampling = Sampling(temperature, top_p, 0, repetition_penalty, max_new_tokens)
    conversation.hold(loaded, steer, Directions(named or []), system, sampling, seed)


@direction.command("make")
def make(
    positive: Annotated[Path, typer.Option(help="Prompts with the concept.")],
    negative: Annotated[Path, typer.Option(help="Prompts without it.")],
    name: Annotated[str, typer.Option(help="What lines of text will call it.")] = "direction",
    method: Annotated[
        str,
        typer.Option(help="mean-difference, principal-component, logistic-probe or actadd."),
    ] = "mean-difference",
    position: Annotated[str, typer.Option(help="mean, last or answer.")] = "mean",
    layer: Annotated[int | None, typer.Option(help="Only this layer; default all.")] = None,
    as_chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--text",
            help="Texts as the user's messages of a chat, or prompts with answers as plain text; "
            "default: texts stay texts, and what has an answer, a system prompt or messages is a "
            "chat.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File; default in the cache.")] = None,
    model: Model = "starter",
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
    date: Date = None,
) -> None:
    """A direction from contrasting prompts, for every layer from one pass.

    One file with both sides of each pair, such as CAA's, may be given as both.
    """
    from interp_steer.util.files import cache_dir

    methods = ("mean-difference", "principal-component", "logistic-probe", "actadd")
    if method not in methods:
        raise RequestError(f"unknown method {method!r}{nearest(method, methods)}")
    from interp_steer.prompts.file import PromptFile
    from interp_steer.steering.direction import is_name

    _writable(out)
    if not is_name(name):
        raise RequestError(f"{name!r} cannot name a direction: use letters, digits, '_', '.', '-'")
    files = {"positive": PromptFile.read(positive), "negative": PromptFile.read(negative)}
    for side, file in files.items():
        file.side(side)  # typos are told before a model loads
    loaded = load(model, dtype, device, date=date)
    from interp_steer.steering.contrast import Contrast, act_add, template
    from interp_steer.steering.scale import Scale

    if as_chat is None and not loaded.is_chat:
        as_chat = False
    up, down = (file.side(side, as_chat) for side, file in files.items())
    if layer is not None and not 0 <= layer < loaded.n_layers:
        raise RequestError(
            f"layer {layer} is out of range: {loaded.name} has layers 0-{loaded.n_layers - 1}"
        )
    if method == "actadd":
        if len(up) != 1 or len(down) != 1:
            raise RequestError("actadd takes one positive and one negative prompt")
        made = act_add(loaded, up[0], down[0], name)
    else:
        asked = [prompt for side, file in files.items() for prompt in file.asked(side)]
        contrast = Contrast.measure(loaded, up, down, position, asked=asked)
        made = [contrast.directions(method, name)]
    scale = Scale.of(loaded, [loaded.encode(prompt) for prompt in (*up, *down)])
    target = out or cache_dir("directions") / f"{name}.safetensors"
    table: list[dict[str, Any]] = []
    there = {str(path) for path in target.parent.glob(f"{target.stem}*")}
    for one in made:
        suffix = one.name.removeprefix(name)
        path = target.with_name(f"{target.stem}{suffix}{target.suffix or '.safetensors'}")
        (one if layer is None else one[layer]).save(path)
        for member in one:
            if layer in (None, member.site.layer):
                dose = member.norm / scale.at(member.site)
                table.append(
                    {
                        "name": one.name,
                        "sha": member.sha,
                        "layer": member.site.layer,
                        "norm": member.norm,
                        "dose": dose,
                        "file": str(path),
                    }
                )
    if as_json:
        print(json.dumps(table, indent=1))
        return
    print(f"{'layer':>5}  {'norm':>9}  {'of |x|':>6}  direction")
    for line in table:
        numbers = f"{line['layer']:>5}  {line['norm']:>9.3f}  {line['dose']:>6.2f}"
        print(f"{numbers}  {line['name']}@{line['sha']}")
    print(f"\nread as {template([*up, *down])}")
    written = sorted({line["file"] for line in table})
    print(f"saved {', '.join(written)}")
    if over := [file for file in written if file in there]:
        note(f"{', '.join(over)} was there; it holds the new direction now")
    if position == "mean" and max(line["dose"] for line in table) < HARDLY:
        note(
            f"the sides hardly differ: at most {max(line['dose'] for line in table):.1%} of the "
            "stream. Where a pair is one question with two answers, --position answer reads where "
            "they part"
        )
    at = layer if layer is not None else loaded.n_layers // 2
    called = made[0].name if out is None else table[0]["file"]
    line_of_it = f"add({called}, 0.5 dose) at {at} on prompt"
    print(f"try   interp-steer generate --model {model} --prompt '...' --steer '{line_of_it}'")


@direction.command("show")
def show(
    file: Annotated[str, typer.Argument(help="A file, or the name of a stored direction.")],
    as_json: Json = False,
) -> None:
    """What a direction file holds, and where it came from."""
    from interp_steer.steering.direction import Direction
    from interp_steer.steering.directions import Directions

    known = Directions()
    try:
        found = known[file]
    except KeyError:
        raise RequestError(f"no direction file {file}{nearest(file, known)}") from None
    members = [found] if isinstance(found, Direction) else list(found)
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": m.name,
                        "sha": m.sha,
                        "hook_point": m.hook_point,
                        "norm": m.norm,
                        "max_activation": m.max_activation,
                        "source": dict(m.source),
                    }
                    for m in members
                ],
                indent=1,
            )
        )
        return
    print(safe(found.label))
    for key, value in members[0].source.items():
        shown = f"digests of {len(value.split())} prompts" if key == "asked" else safe(value)
        print(f"  {key}: {shown}")
    for m in members:
        print(f"  {m.hook_point}  norm {m.norm:.4g}  {m.sha}")


@app.command()
def verify(
    model: Model = "starter", as_json: Json = False, dtype: Dtype = None, device: Device = None
) -> None:
    """Check the toolkit's contract on your own model; exit 1 if a check fails."""
    loaded = load(model, dtype, device)
    from interp_steer.engine.verify import CHECKS
    from interp_steer.engine.verify import verify as run

    with progress("checking", len(CHECKS)) as report:
        checks = run(loaded, report)
    passed = all(check.passed for check in checks)
    if as_json:
        found = [
            {
                "name": c.name,
                "passed": c.passed,
                "difference": c.difference if math.isfinite(c.difference) else None,
                "tolerance": c.tolerance,
            }
            for c in checks
        ]
        print(json.dumps({"model": model, "passed": passed, "checks": found}, indent=1))
    else:
        print(loaded)
        for c in checks:
            word = "ok  " if c.passed else "FAIL"
            print(f"{word} {c.name}: {c.difference:.2g} (at most {c.tolerance:.2g})")
    raise Exit(0 if passed else 1)
