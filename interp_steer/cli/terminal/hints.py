"""A wrong call in one line, with what was probably meant.

Typer says what is wrong, but names options that hardly resemble what was given.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp_steer.errors import nearest

if TYPE_CHECKING:
    from typer.exceptions import TyperException

IN_STEER = {
    "--layer",
    "--layers",
    "--dose",
    "--strength",
    "--coefficient",
    "--at",
    "--on",
    "--scope",
}
"""What a person may take for an option, and the text of --steer says."""
QUOTE = "put the whole text of --steer in quotes: --steer 'add(joy, 0.4 dose) at 15'"


def told(error: "TyperException", words: Sequence[str]) -> str:
    """The error as one line.

    Args:
        words: what was given after the command's name.
    """
    message = error.format_message()
    command = getattr(getattr(error, "ctx", None), "command", None)
    given = getattr(error, "option_name", None)
    if message.startswith("No such option") and given:
        if given in IN_STEER and "--steer" in _options(command):
            return (
                f"No such option: {given}; it stands in --steer 'add(joy, 0.4 dose) at 15 on all'"
            )
        known = [name for name in _options(command) if name.startswith("--")]
        return f"No such option: {given}{nearest(given, known)}"
    members: Mapping[str, Any] = getattr(command, "commands", {})
    if message.startswith("No such command"):
        wrong = next((word for word in words if not word.startswith("-")), "")
        return f"No such command {wrong!r}{nearest(wrong, members)}"
    return message + (_extra(_options(command), words) if "extra argument" in message else "")


def _options(command: Any) -> list[str]:
    """Every name of a command's options."""
    params = command.params if command else ()
    kept = [one for one in params if one.param_type_name == "option"]
    return [name for one in kept for name in (*one.opts, *one.secondary_opts)]


def _extra(options: Sequence[str], words: Sequence[str]) -> str:
    """What was probably meant by words that belong to no option."""
    steered = any(word.partition("=")[0] == "--steer" for word in words)
    if "--steer" in options and steered:
        return f"; {QUOTE}"
    if "--prompt" in options:
        return "; put a prompt of several words in quotes"
    return ""
