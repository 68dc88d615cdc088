"""What pages are made of: templates, tables, pictures, numbers as they are read.

Nothing in a page is loaded from elsewhere and nothing in it runs: there is no script. Templates
escape whatever is put into them.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup, escape

from interp_steer.results.words import spans
from interp_steer.util.console import safe

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

COLUMN = 540  # pixels; wider pictures take the whole width


def render(template: str, **parts: object) -> str:
    """A template of the folder `templates` with its parts."""
    return _templates().get_template(template).render(**parts)


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("interp_steer.report"),
        autoescape=True,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def escaped(value: object) -> Markup:
    """Anything as HTML text: escaped, control and direction-changing characters made visible."""
    if isinstance(value, Markup):
        return value
    encodable = str(value).encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair
    return escape(safe(encodable))


@dataclass(frozen=True)
class Table:
    """A table; its first `words` columns are words, the others numbers."""

    heads: Sequence[str]
    rows: Iterable[Sequence[object]]
    caption: str = ""
    words: int = 1
    last_words: bool = False

    def kind(self, i: int) -> Markup:
        """The class of a column."""
        last = len(self.heads) - 1
        if i < self.words or (self.last_words and i == last):
            return Markup(' class="w"' if i in (0, last) else "")
        return Markup(' class="n"')


@dataclass(frozen=True)
class Picture:
    """A figure as an image inside the page, so that ids of several SVGs do not meet.

    Attributes:
        alt: what it shows.
        data: its address.
        width: pixels; below `least` its small print would be too small, so that it scrolls.
    """

    alt: str
    data: str
    width: int

    @classmethod
    def of(cls, drawn: "Figure", alt: str, kind: str = "svg") -> "Picture":
        """A figure as "svg" or "png"."""
        from matplotlib import rc_context

        written = io.BytesIO()
        dated: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 144}
        with rc_context({"svg.hashsalt": "interp-steer"}):  # else one picture is written many ways
            drawn.savefig(written, format=kind, **dated)
        data = base64.b64encode(written.getvalue()).decode()
        mime = "image/svg+xml" if kind == "svg" else "image/png"
        # 96 is CSS's inch
        return cls(alt, f"data:{mime};base64,{data}", round(96 * drawn.get_figwidth()))

    @property
    def least(self) -> int:
        return round(0.75 * self.width)

    @property
    def wide(self) -> bool:
        return self.width > COLUMN


def pieces(text: str, words: Sequence[str]) -> list[tuple[str, bool]]:
    """A text cut at the words of the concept, as `words.names` finds them: (piece, is one)."""
    cut, at = [], 0
    for start, stop in spans(text, words):
        cut += [(text[at:start], False), (text[start:stop], True)]
        at = stop
    return [(piece, named) for piece, named in [*cut, (text[at:], False)] if piece]


def plain(value: Any) -> str:
    """Three decimals; more where there would be nothing but zeros."""
    if pd.isna(value):
        return "missing"
    text = f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"
    return text.replace("-", "−")


def signed(value: Any) -> str:
    """The same with its sign."""
    if pd.isna(value):
        return "missing"
    return ("+" if value > 0 else "") + plain(value)


def chance(p: Any) -> str:
    """A p-value."""
    if pd.isna(p):
        return "none"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def span(low: Any, high: Any, sign: str = "+") -> str:
    """An interval."""
    if pd.isna(low) or pd.isna(high):
        return "none"
    ends = (signed(low), signed(high)) if sign else (plain(low), plain(high))
    return f"[{ends[0]}, {ends[1]}]"


def as_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as mappings."""
    return [{str(k): v for k, v in r.items()} for r in table.to_dict("records")]
