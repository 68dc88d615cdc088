"""What values show of themselves in a notebook."""

from html.parser import HTMLParser

import torch

from interp_steer.engine.row import Result, Row
from interp_steer.labels.label import Label, Labels
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.util.html import bars, table

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e"


class Balanced(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_everything_is_a_table_and_harmless():
    direction = Direction.of(torch.ones(8), "blocks.1.hook_resid_post", "d", {"label": HOSTILE})
    several = DirectionSet([direction, direction.at("blocks.2.hook_resid_post")])
    labels = Labels([Label("m", "1-res", 7, HOSTILE)])
    result = Result(Row(HOSTILE), (1,), HOSTILE, "stop")
    for value in (direction, several, labels, result):
        page = Balanced(value._repr_html_())
        assert "table" in page.tags and "img" not in page.tags
        assert not any(c in "".join(page.texts) for c in "\x1b\u202e")
    assert "2.828" in Balanced(direction._repr_html_()).texts  # its norm
    assert len([t for t in Balanced(several._repr_html_()).tags if t == "rect"]) == 2
    assert "7" in Balanced(labels._repr_html_()).texts


def test_an_empty_table_and_bars():
    assert Balanced(table([])).tags == ["table", "thead", "tr", "tbody"]
    page = bars({0: 1.0, 1: 0.5}, "norm")
    assert 'height="60.0"' in page and 'height="30.0"' in page


def test_what_a_user_holds_shows_itself(tiny):
    """Results, rows, interventions, units, the model, what causal studies find: each as HTML."""
    from interp_steer.causal.ablate import ablate
    from interp_steer.causal.patch import patch
    from interp_steer.engine.engine import Engine
    from interp_steer.engine.row import Results, Sampling
    from interp_steer.prompts.item import Item
    from interp_steer.prompts.prompt import chat
    from interp_steer.report import maps
    from interp_steer.steering.grammar import steer
    from interp_steer.steering.scale import Scale

    one = Direction.of(torch.ones(64), "blocks.1.hook_resid_post", "d")
    step = steer("add", one, coefficient=3, at=1)
    rows = [Row(chat(HOSTILE), (step,), Sampling(max_new_tokens=2)), Row("I love")]
    results = Engine(tiny).generate(rows[:1])
    assert isinstance(results, Results) and results == list(results)
    pair = Item("I love the tower", " fox", " dog", corrupted="I hate the tower")
    patching = patch(tiny, [pair], layers=[1])
    for value, expected in (
        (results, "add(d, 3.0) at 1"),
        (rows[0], "add(d, 3.0) at 1"),
        (rows[1], "unsteered"),
        (step, "add(d@"),
        (tiny, "6"),
        (ablate(tiny, [pair], ["mlp_out"], layers=[1]), "mlp_out"),
        (patching, "resid_pre"),
    ):
        page = Balanced(value._repr_html_())
        assert expected in " ".join(page.texts) and "img" not in page.tags
    assert Scale((1.0, 2.0))._repr_html_().count("<rect") == 2
    # a figure is a picture where no `%matplotlib inline` was said
    assert maps.patching(patching.summary())._repr_png_().startswith(b"\x89PNG")
