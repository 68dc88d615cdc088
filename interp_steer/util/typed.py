"""Whether a value is of the kind that its field holds: asked before it is used."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from interp_steer.errors import RequestError

KINDS: dict[str, Callable[[object], bool]] = {
    "text": lambda value: isinstance(value, str),
    "true or false": lambda value: isinstance(value, bool),
    "a whole number": lambda value: type(value) is int and _fits(value),
    "a number": lambda value: (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (_fits(value) if isinstance(value, int) else abs(value) < 1e300)
    ),
}

OF_TYPES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}


def expect(name: str, value: object, *kinds: str, several: bool = False) -> None:
    """Refuses a value of another kind.

    Args:
        name: of the field, for the error.
        kinds: of `KINDS`.
        several: whether a list of such values will do as well.

    Raises:
        RequestError: it is of none of the kinds; told with what was given.
    """
    values: Sequence[object] = value if several and isinstance(value, list) else [value]
    for one in values:
        if any(KINDS[kind](one) for kind in kinds):
            continue
        shown = repr(one[:60]) if isinstance(one, str) else str(one)[:60]
        said = f"{name} is {shown}" if one is value else f"{name} hold {shown}"
        listed = ", or several" if several and one is value else ""
        raise RequestError(f"{said}, expected {' or '.join(kinds)}{listed}{_hint(one, kinds)}")


def expect_fields(made: type, given: Mapping[str, object], where: str) -> None:
    """Refuses values of another kind than a dataclass's fields hold; see `expect`."""
    for one in fields(made):
        if one.name in given and not (given[one.name] is None and one.type == int | None):
            kind = OF_TYPES[int if one.type == int | None else one.type]
            expect(f"{where}: {one.name}", given[one.name], kind)


def _fits(value: int) -> bool:
    """Whether other programs read it: into 64 bits."""
    return -(2**63) <= value < 2**63


def _hint(value: object, kinds: Sequence[str]) -> str:
    if isinstance(value, bool):
        return "; in YAML an unquoted yes, no, on or off is true or false"
    if isinstance(value, str) and "true or false" in kinds and value.lower() in ("yes", "no"):
        return ", without quotes"
    if isinstance(value, int) and {"a number", "a whole number"} & set(kinds):
        return "; of at most 64 bits"
    if isinstance(value, float) and "a whole number" in kinds and value.is_integer():
        return f": {int(value)}"
    if "text" in kinds and value is not None and not isinstance(value, (str, list, dict)):
        return "; put it in quotes"
    if isinstance(value, str) and {"a number", "a whole number"} & set(kinds):
        try:
            return f"; written as {float(value)!r} it would be one"
        except ValueError:
            return ""
    return ""
