"""The command line: assembles the other files and prints. Heavy imports wait inside the commands."""

import os
import sys

import typer
from typer.exceptions import Abort, Exit, TyperException

from interp_steer.errors import SteerError
from interp_steer.labels.cli import app as labels

app = typer.Typer(
    help="Steer large language models without fine-tuning, and study what steering does.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(labels, name="labels")


def main() -> None:
    """Runs the command line; every expected error is one line on stderr and an exit code."""
    try:
        code = app(standalone_mode=False)
    except SteerError as error:
        code = fail(str(error), error.exit_code)
    except TyperException as error:
        code = fail(error.format_message(), 2)
    except Exit as error:
        code = error.exit_code
    except (Abort, KeyboardInterrupt):
        code = fail("stopped", 130)
    except BrokenPipeError:  # the reader (`head`, a pager) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> int:
    """Says in one line what went wrong."""
    from interp_steer.console import safe

    print("error: " + safe(" ".join(message.split())), file=sys.stderr)
    return code
