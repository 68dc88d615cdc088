"""One text that stands for many: every value in braces makes a line of its own.

    add(joy, {0.2,0.4} dose) at {8-20/4}      # 2 x 4 lines; 8-20/4 is 8, 12, 16, 20
    add({joy,calm}, 0.4 dose) at 12           # 2 lines
    {add,clamp}(joy, {0.2-0.6/0.2} dose) at 12 on {prompt,generated}

Without braces `8-20/4` is one line that steers four layers together.
"""

import itertools
import math
import re
from dataclasses import dataclass
from decimal import Decimal

from interp_steer.errors import RequestError

MOST = 100_000  # lines of one text
_RANGE = re.compile(r"([+-]?\d+(?:\.\d+)?)-([+-]?\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Spread:
    """A text in parts.

    Attributes:
        text: as it was written.
        between: what stands before, between and behind the braces; one more than there are braces.
        axes: the values of each pair of braces.
    """

    text: str
    between: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]

    @property
    def lines(self) -> list[str]:
        """Every line in order; the values of the last braces change first."""
        return [
            self.between[0] + "".join(v + t for v, t in zip(values, self.between[1:], strict=True))
            for values in itertools.product(*self.axes)
        ]


def spread(text: str) -> Spread:
    """Reads the braces of a text; what stands outside them is not read.

    Raises:
        RequestError: braces that do not close, are nested, hold nothing or a value twice, or stand
            for more than `MOST` lines.
    """
    between, axes = [""], []
    read = 0
    for piece in re.split(r"(\{[^{}]*\})", text):
        if piece.startswith("{") and piece.endswith("}"):
            axes.append(_values(piece, text))
            between.append("")
        elif lone := re.search(r"[{}]", piece):
            column = read + lone.start() + 1
            raise RequestError(
                f"cannot read {text!r} at column {column}: {lone[0]!r} without its other brace; "
                "braces hold values, as in {0.2,0.4}, and do not nest"
            )
        else:
            between[-1] += piece
        read += len(piece)
    count = math.prod(map(len, axes))
    if count > MOST:
        raise RequestError(f"{text!r} stands for {count:,} lines, more than {MOST:,}")
    return Spread(text, tuple(between), tuple(axes))


def _values(piece: str, text: str) -> tuple[str, ...]:
    """What one pair of braces holds: values between commas, ranges of numbers as each of them."""
    values: list[str] = []
    for part in map(str.strip, piece[1:-1].split(",")):
        if not part:
            raise RequestError(f"{piece} in {text!r} lacks a value; expected such as {{0.2,0.4}}")
        values += _range(part, text) if _RANGE.fullmatch(part) else [part]
    if twice := [v for i, v in enumerate(values) if v in values[:i]]:
        raise RequestError(f"{piece} in {text!r} holds {twice[0]} twice")
    return tuple(values)


def _range(part: str, text: str) -> list[str]:
    """`8-20/4` or `0.2-0.6/0.2` as its numbers, both ends included where the stride meets them."""
    matched = _RANGE.fullmatch(part)
    assert matched
    low, high = Decimal(matched[1]), Decimal(matched[2])
    if matched[3] is None and "." in part:
        raise RequestError(
            f"{{{part}}} in {text!r} has no stride; write {{{part}/0.1}}, or the values"
        )
    stride = Decimal(matched[3] or 1)
    if high < low or not stride:
        raise RequestError(
            f"{{{part}}} in {text!r} is no range: give the lower end first and a stride above 0"
        )
    count = int((high - low) / stride) + 1
    if count > MOST:
        raise RequestError(f"{{{part}}} in {text!r} stands for {count:,} values")
    return [str(low + i * stride) for i in range(count)]
