"""Fields of a study as people write them, in the one form that a study keeps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.results.words import middle
from interp_steer.steering.grammar import Reader
from interp_steer.steering.intervention import sites_text
from interp_steer.steering.spread import spread


def listed(given: object) -> tuple[Any, ...]:
    """A single value as a tuple of one."""
    return tuple(given) if isinstance(given, (list, tuple, range)) else (given,)


def apart(given: Any) -> Sequence[Any]:
    """The values that a text with braces stands for; anything else is one."""
    return spread(given).lines if isinstance(given, str) else (given,)


def halved(item: Item) -> Item:
    """A neutral text without a continuation: its second half continues the first."""
    if item.continuation is not None or not isinstance(item.prompt, str):
        return item
    cut = middle(item.prompt)
    if cut is None:
        raise RequestError(f"the neutral text {item.prompt[:60]!r} has no second half")
    return replace(item, prompt=item.prompt[:cut], continuation=item.prompt[cut:])


def each(given: object) -> list[str]:
    """The sites of each cell as text: one cell, or one for each site behind the word `each`."""
    text = str(given).strip()
    word, _, rest = text.partition(" ")
    if word != "each":
        return [sites_text(Reader(text).only(Reader.sites))]
    return [sites_text((site,)) for site in Reader(rest).only(Reader.sites)]


def level(given: object) -> str:
    """A coefficient as text in one spelling."""
    if isinstance(given, bool) or not isinstance(given, (int, float, str)):
        raise RequestError(f"{given!r} is no coefficient; expected such as 8.5 or '0.4 dose'")
    value, unit = Reader(str(given)).only(Reader.coefficient)
    return f"{value!r} {unit}".strip()
