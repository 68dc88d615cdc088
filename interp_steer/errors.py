"""What goes wrong, said in one line for a person.

The command line prints the message alone and exits with `exit_code`; in Python both kinds are
ordinary exceptions, and a `RequestError` is also a `ValueError`.
"""

import difflib
import warnings
from collections.abc import Iterable


class SteerError(Exception):
    """Base of every error that interp-steer raises on purpose."""

    exit_code = 1


class RequestError(SteerError, ValueError):
    """The request was wrong: asking again in the same words fails again (exit 2)."""

    exit_code = 2


class RunError(SteerError, RuntimeError):
    """The request was right but it failed: network, disk, memory, a damaged file (exit 1)."""


class SteerWarning(UserWarning):
    """What a person should know of a result that stands. The command line prints `note: ...`."""


def note(message: str) -> None:
    """Warns with a `SteerWarning` in the name of the caller's caller."""
    warnings.warn(message, SteerWarning, stacklevel=3)


def first_line(error: Exception) -> str:
    """What another library's error says first; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(given: object, choices: Iterable[object]) -> str:
    """The choices most like what was given, as the end of an error message: `; nearest: a, b`."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    close = close or [name for name in names if str(given) and str(given) in name][:3]
    if close:
        return "; nearest: " + ", ".join(close)
    return "; choices: " + ", ".join(names) if 0 < len(names) <= 12 else ""
