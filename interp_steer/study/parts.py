"""The parts that prompts play in a study, kept apart by what they ask."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item, asked, digest
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction, DirectionSet

PARTS = ("build", "choose", "prove", "neutral")


def check_apart(
    parts: Mapping[str, Sequence[Item]],
    directions: Mapping[str, Direction | DirectionSet | Contrast],
) -> None:
    """Refuses what is asked in two parts, and what a direction was made from and is run on.

    What is compared is what the user asks (`item.asked`): system prompts, answers, white space and
    capitals are left out. Of a text with a continuation its beginning and its whole are compared.

    Raises:
        RequestError: it names the prompt and both parts.
    """
    before: dict[str, str] = {}
    shown: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        for item in parts[part]:
            for text in _asked(item):
                if part != "build":
                    shown[digest(text)] = (item.text[:60], part)
                first = before.setdefault(text, part)
                if first != part:
                    raise RequestError(
                        f"{item.text[:60]!r} is asked in both {first} and {part}; what is shown "
                        "must not also be used to choose"
                    )
            if part != "build" and parts[part].count(item) > 1:
                raise RequestError(f"{part} holds {item.text[:60]!r} twice")
    for name, given in directions.items():
        made = next(iter(given)) if isinstance(given, DirectionSet) else given
        for one in made.source.get("asked", "").split():
            if one in shown:
                text, part = shown[one]
                raise RequestError(
                    f"direction {name!r} was made from {text!r}, which is asked in {part} too; "
                    "give it other prompts"
                )


def split_items(
    items: Sequence[Any], share: float = 0.5, seed: int = 16
) -> tuple[list[Any], list[Any]]:
    """(choose, prove) of one list, shuffled; those that ask the same stay together.

    Raises:
        RequestError: either part would be empty.
    """
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    cut = round(share * len(shuffled))
    if not 0 < cut < len(shuffled):
        raise RequestError(f"{len(shuffled)} prompts cannot be split into {share} to choose")
    groups: dict[str, list[Any]] = {}
    for one in shuffled:
        groups.setdefault(_asked(Item.of(one))[-1], []).append(one)
    choose: list[Any] = []
    prove: list[Any] = []
    for group in groups.values():
        # to where it leaves `choose` nearer to its share
        (choose if len(choose) + len(group) / 2 <= cut else prove).extend(group)
    if not choose or not prove:
        raise RequestError(
            f"{len(shuffled)} prompts ask {len(groups)} questions, which cannot be split into "
            f"{share} to choose"
        )
    return choose, prove


def _asked(item: Item) -> list[str]:
    """What an item asks; of a text that goes on, its beginning and its whole."""
    if item.continuation is None or not isinstance(item.prompt, str):
        return [asked(item.prompt)]
    return [asked(item.prompt), asked(item.prompt + item.continuation)]
