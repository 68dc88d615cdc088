"""The command line itself: which commands there are, and how errors end.

A command's module is imported when the command is asked for, and heavy libraries inside the
commands, so that `--help` answers at once.
"""

import contextlib
import importlib
import io
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from interp_steer.errors import RequestError, SteerError, SteerWarning, nearest
from interp_steer.util.console import safe

if TYPE_CHECKING:
    from typer.exceptions import TyperException

# name -> (module of this package, and :function or :group where its name is not the module's; what
# it does)
COMMANDS = {
    "demo": ("steering.demo", "Make the starter model talk about the Eiffel Tower."),
    "generate": (
        "steering.generate",
        "Answer prompts, unsteered and under every --steer.",
    ),
    "sweep": ("steering.sweep", "Answer prompts under many settings, by layer and strength."),
    "caa": (
        "steering.caa",
        "Contrastive activation addition: propensity by layer and multiple.",
    ),
    "chat": ("steering.chat", "Talk to the steered and to the unsteered model, side by side."),
    "direction": (
        "steering.direction:app",
        "Make directions from contrasting prompts, and show them.",
    ),
    "labels": ("labels:app", "Fetch the labels of SAE features, and search them offline."),
    "features": ("features:app", "Find SAE features of a concept, and save their directions."),
    "sae": ("features:saes", "Check how well a sparse autoencoder fits your model."),
    "tune": ("tune", "Find the strength of every line for one amount of damage."),
    "study": ("study:app", "Plan and run a study: a grid of steered answers with its controls."),
    "combine": ("combine", "Find strengths of several directions together, by Optuna."),
    "card": (
        "card",
        "Say of one direction whether it steers, how strongly, at what damage, beside asking.",
    ),
    "judge": (
        "judge",
        "Rate a run's held-out answers: concept, instruction, fluency, and their harmonic mean.",
    ),
    "export": (
        "export",
        "Write steering as a file that other tools read, exactly or not at all.",
    ),
    "serve": ("serve", "Serve the model to OpenAI's clients, each request steered as it asks."),
    "report": ("study:report", "Write one HTML page about a study's run."),
    "ablate": (
        "causal.ablate",
        "Find which parts of the model matter, and where steering acts.",
    ),
    "patch": (
        "causal.patch",
        "Find where an answer is kept, by position or by head.",
    ),
    "verify": ("verify", "Check that the toolkit computes your own model correctly."),
}
HELP = """Usage: interp-steer COMMAND [OPTIONS] [ARGS]...

  Steer large language models without fine-tuning, and study what steering does.
  `interp-steer COMMAND --help` says more of a command.

Options:
  -V, --version  Show the version.
  -h, --help     Show this message.
  --completion   Print what switches on completion: --completion bash, zsh or fish.

Commands:
"""
HELP_NAMES = ("--help", "-h")
OPTIONS = (*HELP_NAMES, "--version", "-V", "--completion")
LONGEST = 2000  # characters of an error


def main() -> None:
    """Runs the command line; every expected error is one line on stderr and an exit code."""
    # Spinning OpenMP threads make short decoding steps up to 30 times slower on a busy machine.
    # To be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except SteerError as error:
        code = fail(str(error), error.exit_code)
    except (EOFError, KeyboardInterrupt):
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


def run(words: Sequence[str]) -> int:
    """Runs the command that the words name; the exit code."""
    name, *rest = words or ["--help"]
    if name in HELP_NAMES:
        print(HELP + "\n".join(f"  {n:<9}  {about}" for n, (_, about) in COMMANDS.items()))
    elif name in ("--version", "-V"):
        from importlib.metadata import version

        print(f"interp-steer {version('interp-steer')}")
    elif name in ("--completion", "--complete"):
        from interp_steer.cli.terminal import completion

        shell, *typed = rest or [""]
        if name == "--completion":
            print(completion.script(shell))
        else:
            for line in completion.answer(shell, typed, COMMANDS, _command):
                print(line)
    elif name not in COMMANDS:
        if name.startswith("-"):
            raise RequestError(f"No such option: {name}{nearest(name, OPTIONS)}")
        raise RequestError(f"No such command {name!r}{nearest(name, COMMANDS)}")
    else:
        return _invoke(name, rest)
    return 0


def _command(name: str) -> Any:
    """A command as typer makes it."""
    import typer

    place, about = COMMANDS[name]
    module, _, attribute = place.partition(":")
    attribute = attribute or module.rpartition(".")[2]
    target = getattr(importlib.import_module(f"interp_steer.cli.{module}"), attribute)
    if isinstance(target, typer.Typer):
        group: Any = typer.main.get_group(target)
        group.help = about
        return group
    alone = typer.Typer(rich_markup_mode=None, add_completion=False)
    alone.command()(target)
    return typer.main.get_command(alone)


def _invoke(name: str, words: list[str]) -> int:
    """Runs one command. Typer's own way to run it turns an interrupt and a closed pipe into exit
    codes without a word.
    """
    from typer.exceptions import Abort, Exit, TyperException

    command = _command(name)
    try:
        names = {"help_option_names": list(HELP_NAMES)}
        with command.make_context(f"interp-steer {name}", list(words), **names) as context:
            command.invoke(context)
    except TyperException as error:
        return _misused(error, words)
    except Exit as error:
        return error.exit_code
    except Abort:
        raise KeyboardInterrupt from None
    return 0


def _misused(error: "TyperException", words: Sequence[str]) -> int:
    """A wrong call; a group of commands without one is a question, and its help the answer."""
    from interp_steer.cli.terminal import hints

    context = getattr(error, "ctx", None)
    if context is not None and error.format_message() == context.get_help():
        print(context.get_help())
        return 0
    return fail(hints.told(error, words), 2)


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
