"""Fields of a study as people write them, in the one form that a study keeps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from interp_steer.results.words import middle
from interp_steer.steering.grammar import Reader
from interp_steer.steering.intervention import sites_text
from interp_steer.steering.spread import spread

LETTERS = "ABCDEFGHIJ"  # by which choices are called


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


def questioned(name: str, given: Sequence[Any]) -> tuple[Item, ...]:
    """The questions of a set.

    Raises:
        RequestError: there are none, or one has no choices or too many.
    """
    if isinstance(given, str) or not given:
        raise RequestError(f"capability {name!r} is {str(given)[:60]!r}, expected questions")
    items = tuple(map(Item.of, given))
    for item in items:
        if not 2 <= len(item.choices) <= len(LETTERS):
            raise RequestError(
                f"capability {name!r}: {item.text[:60]!r} has {len(item.choices)} choices, "
                f"expected 2 to {len(LETTERS)} and which is correct"
            )
    return items


def lettered(item: Item, as_chat: bool = False, system: str | None = None) -> Item:
    """A question as MMLU asks it (Hendrycks et al. 2021, arXiv 2009.03300):

        What is the capital of France?
        A. Rome
        B. Paris
        Answer:

    The answers are the letters. In a chat the user asks this, and the answer begins with the
    letter. A question whose choices are letters already, or that is a chat, stays as it is. What it
    is judged by is given, so that nothing is generated.
    """
    correct = item.correct or 0
    if not isinstance(item.prompt, str) or all(c.strip(" ().") in LETTERS for c in item.choices):
        prompt = (
            chat(item.text, system) if as_chat and isinstance(item.prompt, str) else item.prompt
        )
        return replace(item, prompt=prompt, continuation=item.choices[correct])
    listed = "\n".join(f"{LETTERS[n]}. {text.strip()}" for n, text in enumerate(item.choices))
    text = f"{item.prompt.strip()}\n{listed}\nAnswer:"
    before = "" if as_chat else " "
    letters = tuple(f"{before}{LETTERS[n]}" for n in range(len(item.choices)))
    prompt = chat(text, system) if as_chat else text
    return Item(prompt, choices=letters, correct=correct, continuation=letters[correct])
