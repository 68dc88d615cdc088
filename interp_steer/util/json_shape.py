"""Whether what was read from a file has the shape that it must have."""

from typing import Any

NUMBER = (int, float)
COUNT = range(1_000_001)
NONE = type(None)


def misfit(value: object, shape: Any, at: str = "") -> str | None:
    """Where a value read from JSON does not have a shape, and what is there; None where it has.

    Args:
        shape: a type, which must be the value's own; a range of whole numbers; a tuple of shapes,
            one of which must fit; `[shape]`, a list of such; `{str: shape}`, a mapping to such; or
            a mapping with names, each of which must be there (not where it ends in `?`) and fit.
            `object` is anything.
        at: what the value is called.
    """
    if isinstance(shape, tuple):
        return None if any(misfit(value, one) is None for one in shape) else _said(value, at)
    if isinstance(shape, list):
        if type(value) is not list:
            return _said(value, at)
        found = (misfit(one, shape[0], f"{at}[{i}]") for i, one in enumerate(value))
        return next(filter(None, found), None)
    if isinstance(shape, dict):
        if type(value) is not dict:
            return _said(value, at)
        begin = f"{at}." if at else ""
        if str in shape:
            found = (misfit(one, shape[str], f"{begin}{name}") for name, one in value.items())
            return next(filter(None, found), None)
        if lost := [name for name in shape if name not in value and not name.endswith("?")]:
            return f"{begin}{lost[0]} is missing"
        known = {name.removesuffix("?"): one for name, one in shape.items()}
        there = ((name, one) for name, one in known.items() if name in value)
        found = (misfit(value[name], one, f"{begin}{name}") for name, one in there)
        return next(filter(None, found), None)
    if isinstance(shape, range):
        if type(value) is not int:
            return _said(value, at)
        return None if value in shape else f"{at[:80]} is {str(value)[:40]}"
    if shape is int and type(value) is int and not -(2**63) <= value < 2**63:
        return f"{at[:80]} is a number of {value.bit_length()} bits"
    return None if shape is object or type(value) is shape else _said(value, at)


def _said(value: object, at: str) -> str:
    if isinstance(value, (str, float, bool, NONE)):
        return f"{at[:80] or 'it'} is {str(value)[:40]!r}"
    return f"{at[:80] or 'it'} is of type {type(value).__name__}"
