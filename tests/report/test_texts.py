"""The text browser of a page: from a setting to its texts, without a script."""

import re

import pytest

from interp_steer.report import report, texts
from interp_steer.report.texts import browser
from tests.report.test_report import BEST, CELLS, HOSTILE, Page, make_run, quick  # noqa: F401

LINES = [(f"add(joy, {dose} dose) at {n}", "", "", "", "") for n in (8, 10) for dose in (0.2, 0.4)]


def page(run):
    return report.write(run).read_text()


def test_every_number_leads_to_the_texts_of_its_setting(tmp_path):
    run = make_run(tmp_path, choose=0, prove=3, nulls=(), singles=())
    made = browser(run.findings())
    table = run.table()
    (matrix,) = made.matrices
    assert matrix.columns == ["0.4 dose", "0.6 dose"]
    sections = {one.anchor: one for one in made.answers}
    for (site, links), layer in zip(matrix.rows, (12, 13), strict=True):
        assert site == str(layer)
        for link, level in zip(links, matrix.columns, strict=True):
            rows = table[(table["site"] == f"resid_post {layer}") & (table["level"] == level)]
            assert link.number == f"{rows['concept'].mean():.3f}"
            shown = sections[link.anchor].samples
            assert [s["prompt"] for s in shown] == rows["prompt"].tolist()
            for sample, text in zip(shown, rows["text"], strict=True):
                assert "".join(piece for piece, _ in sample["after"]) == text
                assert "".join(p for p, _ in sample["before"]) == "unsteered: " + text[6:]
                assert ("Paris", True) in sample["after"]


def test_the_page_has_a_part_for_every_link(tmp_path):
    run = make_run(tmp_path, choose=0, prove=3, nulls=(), singles=())
    html = page(run)
    Page(html)
    ids = re.findall(r' id="(t\d+)"', html)
    linked = re.findall(r'<a href="#(t\d+)"', html)
    assert sorted(ids) == sorted(set(linked)) and len(ids) == len(CELLS)
    assert "<script" not in html


def test_arrows_lead_to_what_is_beside(tmp_path):
    made = browser(make_run(tmp_path, choose=0, prove=3, nulls=(), singles=()).findings())
    ((_, top), (_, bottom)) = made.matrices[0].rows
    sections = {one.anchor: one for one in made.answers}
    assert sections[top[0].anchor].beside == [
        ("↓", "13", bottom[0].anchor),
        ("→", "0.6 dose", top[1].anchor),
    ]


def test_whole_lines_are_in_their_places(tmp_path):
    made = browser(
        make_run(tmp_path, choose=0, prove=3, cells=LINES, nulls=(), singles=()).findings()
    )
    (matrix,) = made.matrices
    assert matrix.name == "add(joy)" and matrix.columns == ["0.2 dose", "0.4 dose"]
    assert [site for site, _ in matrix.rows] == ["8", "10"]


def test_a_study_that_claims_opens_at_its_chosen_setting(tmp_path):
    run = make_run(tmp_path, choose=3)
    made = browser(run.findings())
    first = next(one for one in made.answers if one.anchor == made.first)
    assert first.title == f"add(eiffel, {BEST[3]}) at {BEST[2]} on prompt"
    assert {s["prompt"] for s in first.samples} == {f"Question c{i:07}?" for i in range(3)}
    html = page(run)
    assert html.index("Sample texts") < html.index("Texts of the grid")


def test_odd_text_stays_text(tmp_path):
    run = make_run(tmp_path, choose=0, prove=2, text=HOSTILE, prompt=HOSTILE, nulls=(), singles=())
    html = page(run)
    Page(html)
    assert "<img src=x" not in html and "</script" not in html and "\u202e" not in html


@pytest.mark.parametrize("shown", [1, 3])
def test_of_many_prompts_some_are_drawn(tmp_path, monkeypatch, shown):
    monkeypatch.setattr(texts, "MOST", 4 * shown + 1)
    made = browser(make_run(tmp_path, choose=0, prove=9, nulls=(), singles=()).findings())
    asked = [tuple(s["prompt"] for s in one.samples) for one in made.answers]
    assert len(set(asked)) == 1 and len(asked[0]) == shown
    assert f"{shown} drawn at random" in made.about
    monkeypatch.setattr(texts, "MOST", 3)  # fewer than there are settings
    assert browser(make_run(tmp_path, choose=0, prove=9, nulls=(), singles=()).findings()) is None


def test_without_texts_there_is_no_browser(tmp_path):
    run = make_run(tmp_path, text=None, choose=0, prove=3, nulls=(), singles=())
    assert browser(run.findings()) is None and 'class="answers' not in page(run)
