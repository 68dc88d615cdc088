"""Texts side by side: drawn at the width of a terminal, read as a person would."""

import pytest
from rich.cells import cell_len
from rich.console import Console

from interp_steer.util.console import _panels

TEXTS = [
    "The seasons are a never-ending cycle of changing colours and emotions.",
    "A walk \x1b[31min the rain 你好你好你好你好你好你好你好你好你好你好你好 🎉🎉 is long.",
    "short",
]
TITLES = ["unsteered", "add(joy, 0.4 dose) at 15", "[bold]x[/bold]"]


@pytest.mark.parametrize(("width", "across"), [(40, 1), (80, 2), (120, 3), (200, 3)])
def test_panels_fit_the_width_and_break_at_words(width, across):
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as got:
        console.print(_panels(TEXTS, TITLES, width))
    lines = got.get().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].count("╭") == across
    shown = got.get()
    assert "\x1b[31m" not in shown and "[bold]x" in shown
    inside = [line.strip("│ ").split("││")[0].split() for line in lines if line.startswith("│")]
    words = [word for part in inside for word in part]
    assert words[:4] == TEXTS[0].split()[:4]
    broken = [w for w in words if w not in " ".join(TEXTS).split() and w.isascii() and w.isalpha()]
    assert not broken  # no word is cut in two


@pytest.mark.parametrize(("width", "across"), [(40, 1), (80, 2)])
def test_texts_that_grow_beyond_the_screen_show_their_end(width, across):
    """A terminal cannot redraw what has left its screen; word n is still told from word n + 1."""
    texts = [" ".join(f"{name}{n}" for n in range(200)) for name in ("left", "right")]
    console = Console(width=width, height=24, force_terminal=True, color_system=None)
    with console.capture() as got:
        console.print(_panels(texts, ["one", "two"], width, 23))
    shown = got.get()
    assert len(shown.splitlines()) <= 23 and shown.splitlines()[0].count("╭") == across
    assert "left199" in shown and "right199" in shown and "left0 " not in shown


def test_a_title_that_is_too_long_says_so():
    console = Console(width=40, force_terminal=True, color_system=None)
    with console.capture() as got:
        console.print(_panels(["a"], ["add(eiffel, 0.6 dose) at 13 on prompt+first"], 40))
    assert "add(eiffel, 0.6 dose) at 13" in got.get() and "…" in got.get()
