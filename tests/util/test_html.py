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
