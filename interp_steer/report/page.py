"""A page of HTML in pieces: text escaped, tables, pictures inside, numbers as they are read.

Nothing in a page is loaded from elsewhere and nothing in it runs: there is no script.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_steer.results.words import spans
from interp_steer.util.console import safe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 540  # pixels; wider pictures take the whole width


class Markup(str):
    """Text that is HTML already."""


def document(title: str, body: str) -> str:
    """A whole page with its style."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # a second lock: even if something slipped through, nothing would load or run
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body><main>{body}"
        "</main></body></html>\n"
    )


def folded(summary: str, inner: str) -> str:
    """What is shown on a click."""
    return f"<details><summary>{escaped(summary)}</summary>{inner}</details>"


def figure(drawn: "Figure", caption: str) -> str:
    """A picture with its caption."""
    width = round(96 * drawn.get_figwidth())  # 96 is CSS's inch
    return (
        f'<figure class="{"wide" if width > COLUMN else ""}" style="width:{width}px">'
        f"{_scroll(image(drawn, caption), caption)}"
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    caption: str = "",
    words: int = 1,
    last_words: bool = False,
) -> str:
    """A table; its first `words` columns are words, the others numbers."""

    def kind(i: int) -> str:
        if i < words or (last_words and i == len(heads) - 1):
            return ' class="w"' if i in (0, len(heads) - 1) else ""
        return ' class="n"'

    head = "".join(f'<th scope="col"{kind(i)}>{escaped(name)}</th>' for i, name in enumerate(heads))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{escaped(v)}</td>" for i, v in enumerate(row)) + "</tr>"
        for row in rows
    )
    said = f"<caption>{escaped(caption)}</caption>" if caption else ""
    inner = f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return _scroll(inner, caption or "table")


def _scroll(inner: str, name: str) -> str:
    """What may be wider than the page scrolls by itself, from the keyboard too."""
    label = escaped(name)
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{inner}</div>'


def image(drawn: "Figure", alt: str, kind: str = "svg") -> str:
    """A figure inside the page. As an image, so that ids of several SVGs do not meet."""
    from matplotlib import rc_context

    written = io.BytesIO()
    dated: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 144}
    with rc_context({"svg.hashsalt": "interp-steer"}):  # else one picture is written in many ways
        drawn.savefig(written, format=kind, **dated)
    data = base64.b64encode(written.getvalue()).decode()
    mime = "image/svg+xml" if kind == "svg" else "image/png"
    # below three quarters of its size the small print would be too small: then it scrolls
    width = round(96 * drawn.get_figwidth())
    style = f"width:{width}px;max-width:100%;min-width:{round(0.75 * width)}px"
    return f'<img alt="{escaped(alt)}" style="{style}" src="data:{mime};base64,{data}">'


def escaped(value: object) -> str:
    """Anything as HTML text: escaped, control and direction-changing characters made visible."""
    if isinstance(value, Markup):
        return value
    encodable = str(value).encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair
    return html.escape(safe(encodable))


def marked(text: str, words: Sequence[str]) -> str:
    """Text with the words of the concept marked, as `words.names` finds them."""
    said, at = [], 0
    for start, stop in spans(text, words):
        said += [escaped(text[at:start]), f"<mark>{escaped(text[start:stop])}</mark>"]
        at = stop
    return "".join([*said, escaped(text[at:])])


def plain(value: Any) -> str:
    """Three decimals; more where there would be nothing but zeros."""
    if pd.isna(value):
        return "missing"
    text = f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}"
    return text.replace("-", "−")


def signed(value: Any) -> str:
    if pd.isna(value):
        return "missing"
    return ("+" if value > 0 else "") + plain(value)


def chance(p: Any) -> str:
    if pd.isna(p):
        return "none"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def span(low: Any, high: Any, sign: str = "+") -> str:
    if pd.isna(low) or pd.isna(high):
        return "none"
    ends = (signed(low), signed(high)) if sign else (plain(low), plain(high))
    return f"[{ends[0]}, {ends[1]}]"


STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1f; --paper: #fdfdfc; --dim: #5d646c;
  --line: #d9dce0; --soft: #f1f2f4; --yes: #1f6f43; --no: #9a3412; --open: #6b5b1e;
  --mark: #ffe58a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #16181b; --dim: #9aa2ab;
  --line: #353a40; --soft: #212429; --yes: #6fcf97; --no: #f2a074; --open: #d8c36a;
  --mark: #6b5410; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: .2rem 0 1.2rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
h4 { font-size: .8rem; margin: 0 0 .2rem; color: var(--dim); font-weight: 600; }
p, ul, dl { margin: .6rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.dim { color: var(--dim); font-size: .85rem; margin: .2rem 0; }
.verdict { font-size: 1.1rem; padding: .8rem 1rem; background: var(--soft);
  border-left: 5px solid var(--open); border-radius: 3px; }
.verdict.yes { border-color: var(--yes); }
.verdict.no { border-color: var(--no); }
.warn { padding: .6rem 1rem; border: 1px solid var(--no); border-radius: 3px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; margin: .8rem 0;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--dim); padding-bottom: .3rem; }
th, td { padding: .32rem .6rem; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
th { color: var(--dim); font-weight: 600; white-space: normal; vertical-align: bottom; }
.n { text-align: right; }
td.w { white-space: normal; min-width: 7.5rem; max-width: 26rem; }
.figures { columns: 28rem auto; column-gap: 1.6rem; }
figure { margin: 0; padding: .4rem 0 1rem; max-width: 100%; break-inside: avoid; }
figure.wide { column-span: all; }
figcaption { font-size: .85rem; color: var(--dim); margin-top: .3rem; }
img { display: block; background: #fff; border-radius: 4px; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
article { border: 1px solid var(--line); border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0; }
article h3 { margin: .2rem 0 .6rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  gap: .6rem 1.6rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin-top: 0; }
mark { background: var(--mark); color: inherit; border-radius: 2px; padding: 0 .1em; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1.2rem; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .9em; }
code { overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: 4px; overflow-x: auto; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .6rem; }
  h1 { font-size: 1.4rem; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --dim: #444;
  --line: #bbb; --soft: #f4f4f4; --mark: #e8e8e8; }
  body { font-size: 10pt; } main { max-width: none; padding: 0; } .scroll { overflow: visible; }
  .figures { columns: 17rem auto; }
  figure, article, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  th, td { white-space: normal; padding: .2rem .4rem; } img { min-width: 0 !important; } }
"""
