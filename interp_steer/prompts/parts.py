"""The parts that prompts play, such as selection and held-out: no question stands in two."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item, asked


def check_apart(parts: Mapping[str, Iterable[Any]]) -> None:
    """Refuses a question that is asked in two parts, of texts, chats, mappings or `Item`s.

    Raises:
        RequestError: it names the prompt and both parts.
    """
    part_of: dict[str, str] = {}
    for part, items in parts.items():
        for item in map(Item.of, items):
            for question in questions(item):
                other = part_of.setdefault(question, part)
                if other != part:
                    raise RequestError(
                        f"{item.text[:60]!r} is asked in both {other} and {part}; a prompt plays "
                        "one part only"
                    )


def split_items(
    items: Sequence[Any], share: float = 0.5, seed: int = 16
) -> tuple[list[Any], list[Any]]:
    """(choose, prove): a shuffled list in two. Prompts that ask the same question stay together.

    Args:
        items: texts, chats, mappings or `Item`s.
        share: of the prompts that come to `choose`, between 0 and 1.
        seed: of the shuffling.

    Raises:
        RequestError: either part would be empty.
    """
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    cut = round(share * len(shuffled))
    if not 0 < cut < len(shuffled):
        raise RequestError(f"{len(shuffled)} prompts cannot be split into {share} to choose")
    groups: dict[str, list[Any]] = {}
    for given in shuffled:
        groups.setdefault(questions(Item.of(given))[-1], []).append(given)
    choose: list[Any] = []
    prove: list[Any] = []
    for group in groups.values():
        # a group goes to `choose` if that brings `choose` nearer to its share
        (choose if len(choose) + len(group) / 2 <= cut else prove).extend(group)
    if not choose or not prove:
        raise RequestError(
            f"{len(shuffled)} prompts ask {len(groups)} questions, which cannot be split into "
            f"{share} to choose"
        )
    return choose, prove


def questions(item: Item) -> list[str]:
    """What an item asks, as `item.asked` spells it: system prompts, answers, white space and
    capitals are left out. A plain text with a continuation asks two: its beginning and its whole.
    """
    if item.continuation is None or not isinstance(item.prompt, str):
        return [asked(item.prompt)]
    return [asked(item.prompt), asked(item.prompt + item.continuation)]
