"""How values show themselves in a notebook: small HTML tables, escaped, without styles."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from interp_steer.util.console import safe

if TYPE_CHECKING:
    import pandas as pd


SHOWN = 60  # rows of a table in a notebook


def frame(data: "pd.DataFrame", caption: str = "") -> str:
    """The first rows of a pandas table."""
    cut = data.head(SHOWN)
    rows = [{str(k): v for k, v in r.items()} for r in cut.to_dict("records")]
    more = f"the first {SHOWN} of {len(data)} rows" if len(data) > SHOWN else ""
    return table(rows, "; ".join(filter(None, (caption, more))))


def table(rows: Sequence[Mapping[str, object]], caption: str = "") -> str:
    """Rows as an HTML table; the first row names the columns."""
    head = "".join(f"<th>{shown(name)}</th>" for name in rows[0]) if rows else ""
    body = "".join("<tr>" + "".join(map(_cell, row.values())) + "</tr>" for row in rows)
    title = f"<caption>{shown(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    """A cell; text begins at its left, where notebooks put everything at the right."""
    side = ' style="text-align:left"' if isinstance(value, str) else ""
    return f"<td{side}>{shown(value)}</td>"


def shown(value: object) -> str:
    """One value as escaped text."""
    if value is None or value != value:
        return ""
    return html.escape(safe(f"{value:.4g}" if isinstance(value, float) else str(value)))


def bars(values: Mapping[object, float], what: str) -> str:
    """A bar for each value, in SVG."""
    top = max([*values.values(), 1e-12])
    wide, high = 12, 60
    drawn = "".join(
        f'<rect x="{i * wide}" y="{high - high * value / top:.1f}" width="{wide - 2}" '
        f'height="{high * value / top:.1f}" fill="currentColor" opacity="0.6">'
        f"<title>{shown(key)}: {shown(value)}</title></rect>"
        for i, (key, value) in enumerate(values.items())
    )
    label = f'<text x="0" y="{high + 14}" font-size="11" fill="currentColor">{shown(what)}</text>'
    size = f'width="{max(len(values) * wide, 220)}" height="{high + 18}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{drawn}{label}</svg>'
