import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from interp_steer.errors import RequestError, RunError
from interp_steer.report import page as pieces
from interp_steer.report import report
from interp_steer.report.findings import Findings
from interp_steer.report.run import Run
from interp_steer.results.roles import SETTING
from interp_steer.results.rows import FORMAT

HOSTILE = "</script><img src=x onerror=alert(1)>\x00\u202etxet \U0001f5fc سلام &amp; \"'\x1b[31m"
CELLS = [
    ("eiffel", "add", "resid_post 12", "0.4 dose", "prompt"),
    ("eiffel", "add", "resid_post 12", "0.6 dose", "prompt"),
    ("eiffel", "add", "resid_post 13", "0.4 dose", "prompt"),
    ("eiffel", "add", "resid_post 13", "0.6 dose", "prompt"),
]
BEST = CELLS[2]


def make_run(
    folder: Path,
    *,
    choose: int = 12,
    prove: int = 12,
    cells=CELLS,
    nulls=(("random", 9),),
    singles=("flip", "wrong_layer"),
    metrics=("concept", "surprise"),
    text: str | None = "An answer about {item} with Paris.",
    prompt: str = "Question {item}?",
    until: str = "prove",
    **manifest: object,
) -> Run:
    """A run's folder as `runs.run` leaves it, with numbers made up."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model": "0abeb9de0278115e", "dtype": "float32"}
    plan, rows = [], []
    items = {
        "choose": [f"c{i:07}" for i in range(choose)],
        "prove": [f"p{i:07}" for i in range(prove)],
    }

    def put(role: str, split: str, cell=("",) * 5, null=None, strength: float = 0.0) -> None:
        for i, item in enumerate(items[split]):
            key = f"{role}-{'|'.join(cell)}-{null}-{item}"
            setting = dict(zip(SETTING, cell, strict=True))
            layer = re.search(r"\d+", cell[2])
            dose = float(cell[3].split()[0]) if cell[3].endswith("dose") else None
            values = {
                "concept": float((i + 1) / len(items[split]) <= strength),
                "surprise": 1.0 + 0.01 * i + (1 + 0.3 * (i % 3)) * strength,
                "logit_difference": -0.5 + 0.1 * (i % 4) + (2 + i % 5) * strength,
            }
            stage = "unsteered" if role == "unsteered" else "grid" if role == "grid" else "prove"
            plan.append(
                {"stage": stage, "role": role, "null": null, **setting, "split": split,
                 "item": item, "seed": 0, "key": key}
            )  # fmt: skip
            said = None if text is None else f"{role}: {text.format(item=item)}"
            rows.append(
                {"key": key, "item": item, "prompt": prompt.format(item=item), "seed": 0,
                 "steer": None, "component": "resid_post" if cell[2] else None,
                 "layer": int(layer[0]) if layer else None, "head": None,
                 "coefficient": 50 * dose if dose else None, "dose": dose, "of_max": None,
                 "delta": 0.0, "text": said, "tokens": 8, "token_ids": [1], "finish": "length",
                 "metrics": {name: values[name] for name in metrics}, "chunk": key, "of": 1}
            )  # fmt: skip

    put("unsteered", "choose")
    put("unsteered", "prove")
    if until != "unsteered":
        for number, cell in enumerate(cells):
            if choose or len(cells) > 1:
                put("grid", "choose" if choose else "prove", cell, None, (number % 3) / 2.5)
        if until != "grid" and (choose or len(cells) == 1):
            mine = BEST if BEST in cells else cells[0]
            put("chosen", "prove", mine, None, 0.75)
            for role in singles:
                put(role, "prove", mine, None, 0.1)
            for role, count in nulls:
                for null in range(count):
                    put(role, "prove", mine, null, 0.012 * null)
    told = {
        "about": about, "question": "Does it steer?", "metrics": list(metrics),
        "choose_by": metrics[0], "limits": {},
        "controls": {"random": 30, "features": 0, "shuffled": 0, "flip": True,
                     "wrong_layer": True, "selected": None},
        "selected": 0, "cells": len(cells), "concept": ["Paris", "Eiffel"],
        "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.1,
                     "max_new_tokens": 24},
        "seeds": [0], "chunk": 32,
        "prompts": {"build": 48, "choose": choose, "prove": prove, "neutral": 0},
        "directions": {"eiffel": "9e4eb64f"}, "model": "starter", "revision": "",
        "dtype": "float32", "device": "cpu", "n_layers": 30, "threads": 2,
        "versions": {"interp-steer": "0.1.0", "torch": "2.13.0"},
        "machine": {"platform": "Linux", "processor": "x86_64", "cores": 2, "gpu": None},
        "arguments": ["interp-steer", "study", "run", "a.yaml"], "modules": [],
        "written_at": "2026-11-25T01:48:49+00:00", **manifest,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(told))
    (folder / "plan.jsonl").write_text("".join(json.dumps(one) + "\n" for one in plan))
    head = json.dumps({"format": FORMAT, **about})
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([head, *lines]) + "\n")
    (folder / "study.yaml").write_text("sites: [resid_post 12, resid_post 13]\nscopes: [prompt]\n")
    return Run(folder)


RENDER = Figure.savefig


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Pictures are drawn but not rendered, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """For what is about the words alone."""
    monkeypatch.setattr(report._Report, "_pictures", lambda *_: [])


class Page(HTMLParser):
    """What a browser would make of a page; fails on tags that do not match."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def row(self, *starts: str) -> list[str]:
        """The first table row whose cells begin so."""
        return next(
            r for r in self.cells if [c.split(" ")[0] for c in r[: len(starts)]] == [*starts]
        )

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def written(run: Run, **options: object) -> tuple[str, Page]:
    text = report.write(run, **options).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(done) -> Findings:
    return done.findings()


@pytest.fixture(scope="module")
def drawn(done) -> tuple[str, Page]:
    return written(done)


@pytest.fixture(scope="module")
def page(drawn) -> Page:
    return drawn[1]


# --- what it says ---------------------------------------------------------------------------------


def test_a_report_holds_the_claims_with_intervals_and_methods(found, page):
    assert found.verdict.text in page.text
    for claim in found.claims[found.claims["role"] == "chosen"].to_dict("records"):
        cells = page.row(claim["metric"], f"+{claim['effect']:.3f}")
        assert cells[2] == f"[+{claim['low']:.3f}, +{claim['high']:.3f}]"
        assert cells[3] == (f"{claim['p']:.3f}" if claim["p"] >= 0.001 else "< 0.001")
        assert cells[4:6] == [f"{claim['unsteered']:.3f}", f"{claim['mean']:.3f}"]
        assert cells[6] == f"[{claim['mean_low']:.3f}, {claim['mean_high']:.3f}]"
        assert cells[7] == "12" and cells[8] == claim["method"]
    assert "concept (decides)" in page.text
    assert "add(eiffel, 0.4 dose) at resid_post 13 on prompt" in page.text


def test_a_report_holds_the_controls_and_their_p(found, page):
    mine = found.p[found.p["metric"] == "concept"].iloc[0]
    cells = next(r for r in page.cells if r[0].startswith("random directions"))
    assert cells[1:4] == ["concept", "9", f"+{mine['mean']:.3f}"]
    assert cells[5] == f"{mine['p']:.3f}"
    flip = found.claims[(found.claims["role"] == "flip") & (found.claims["metric"] == "concept")]
    cells = next(r for r in page.cells if "sign turned" in r[0])
    assert cells[3] == f"+{flip['effect'].iloc[0]:.3f}"
    assert any(r[1] == "surprise" and r[2] == "9" for r in page.cells if len(r) == 6)


def test_a_report_holds_the_grid(found, page):
    for line in found.grid.to_dict("records"):
        start = [line["direction"], line["operator"], line["site"], line["level"], line["scope"]]
        cells = next(r for r in page.cells if r[:6] == [*start, line["metric"]])
        assert cells[7] == f"{line['mean']:.3f}"
        assert cells[10] == "12" and cells[12] == ("not excluded" if line["best"] else "")


def test_a_report_says_how_it_was_done(done, page):
    for said in (
        "4 settings were run on 12 selection prompts", "best mean effect in concept",
        "on 12 held-out prompts",
        "made from 48 prompts", "paired Newcombe (Newcombe 1998", "Bonferroni over the 4 settings",
        "missing: not zero", "eiffel@9e4eb64f", "resid_post 12, resid_post 13", "torch 2.13.0",
        "the most likely token, at most 24 tokens", "One model, and prompts of one origin",
    ):  # fmt: skip
        assert said in page.text
    assert f"interp-steer study run {done.folder}/study.yaml --out NEW" in page.text
    assert "rows are missing" not in page.text and "seeds are averaged" not in page.text


def test_a_report_draws_what_there_is(page):
    captions = [attrs["alt"] for attrs in page.all("img")]
    usual = ["Effect", "Effect", "The"]
    assert [c.split(" ")[0] for c in captions] == ["Effect", *usual, *usual]
    assert sum("concept" in c for c in captions) == 4 and "against damage" in captions[2]
    assert sum("surprise" in c for c in captions) == 3


def test_a_picture_lies_inside_the_page(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", RENDER)
    picture = pieces.Picture.of(Figure((3, 2)), "a <b>")
    brief = pieces.render("brief.html", picture=picture, verdict="", claims=None, notes=[])
    (image,) = Page(brief).all("img")
    kind, _, data = image["src"].partition(";base64,")
    assert kind == "data:image/svg+xml" and b"<svg" in base64.b64decode(data)
    assert image["alt"] == "a <b>" and "width:288px" in image["style"]


# --- texts ----------------------------------------------------------------------------------------


def articles(text: str) -> list[str]:
    return re.findall(r"<article>.*?</article>", text, re.DOTALL)


def test_samples_are_random_best_and_worst_each_beside_its_unsteered_answer(drawn):
    text, page = drawn
    shown = articles(text)
    tags = [re.search(r'class="dim">([^<]*)<', one)[1] for one in shown]
    assert sum("drawn at random" in t for t in tags) == 4
    assert sum("best by concept" in t for t in tags) == 2
    assert sum("worst by concept" in t for t in tags) == 2
    for one, tag in zip(shown, tags, strict=True):
        (item,) = set(re.findall(r"p\d{7}", one))  # one prompt, twice answered
        assert "unsteered: An answer" in one and "chosen: An answer" in one
        steers = int(item[1:]) + 1 <= 9  # as the numbers were made
        assert "best" not in tag or steers
        assert "worst" not in tag or not steers
        assert ("concept 0 → 1" in one) == steers
    assert "4 of 12 answers" in page.text and "seed 16" in page.text


@pytest.mark.usefixtures("undrawn")
def test_at_another_level_the_intervals_change_and_the_samples_do_not(done, drawn, tmp_path):
    low = done.findings(level=0.8).claims["low"].iloc[0]
    text, page = written(done, path=tmp_path / "a.html", level=0.8)
    assert "Intervals at 80%" in page.text and f"[+{low:.3f}," in text
    assert articles(text) == articles(drawn[0])  # the draw is fixed


@pytest.mark.usefixtures("undrawn")
def test_words_of_the_concept_are_marked_as_whole_words(tmp_path):
    run = make_run(tmp_path, text="paris & Parisian miniparis <Eiffel>", nulls=())
    shown = articles(written(run)[0])[0]
    assert "<mark>paris</mark> &amp; Parisian miniparis &lt;<mark>Eiffel</mark>&gt;" in shown


@pytest.mark.usefixtures("undrawn")
def test_few_answers_are_all_shown(tmp_path):
    text, page = written(make_run(tmp_path, prove=3, choose=3))
    assert len(articles(text)) == 3 and "All 3 answers" in page.text
    assert "drawn at random" not in page.text


@pytest.mark.usefixtures("undrawn")
def test_empty_and_missing_answers(tmp_path):
    run = make_run(tmp_path, text="", prove=3)
    lines = (tmp_path / "rows.jsonl").read_text().replace('"concept": 1.0', '"concept": null')
    (tmp_path / "rows.jsonl").write_text(lines.replace('"chosen: "', '" "'))
    text, page = written(Run(run.folder))
    assert "(nothing)" in page.text and "values are missing" in page.text
    assert len(articles(text)) == 3


# --- safety ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[str, Page]:
    run = make_run(
        tmp_path_factory.mktemp("hostile"), choose=3, prove=3, nulls=(("random", 2),),
        text=HOSTILE, prompt=HOSTILE, question=HOSTILE, model=HOSTILE,
        directions={HOSTILE: HOSTILE}, concept=["img", "(", HOSTILE], arguments=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        cells=[("<b>x</b>", "add", "resid_post 12", "0.4 dose", "<i>"), *CELLS[2:]],
    )  # fmt: skip
    return written(run)


def test_hostile_text_is_text(hostile):
    text, page = hostile
    assert page.all("script") == []
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), tag
        assert tag not in ("iframe", "object", "embed", "link", "base", "form", "b", "i")
    for attrs in page.all("img"):
        assert attrs["src"].startswith("data:image/")
    assert "</script><img src=x onerror=alert(1)>" in page.text
    assert "\U0001f5fc سلام &amp;" in page.text  # emoji, Arabic; an entity stays as written
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e]", text)
    assert 'dir="auto"' in text


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(hostile):
    text, page = hostile
    loads = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "data", "action", "background", "poster")
    ]
    assert loads and all(value.startswith(("data:image/", "#")) for value in loads)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert style and "url(" not in style and "@import" not in style
    policy = next(a["content"] for a in page.all("meta") if "content" in a and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script" not in policy
    assert not any("style" in a and "url" in a["style"] for _, a in page.tags)


def test_a_report_is_written_whole_or_not_at_all(done, found, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "findings", lambda *_, **__: found)
    monkeypatch.setattr(report._Report, "html", lambda page: "<p>whole</p>")
    path = report.write(done, tmp_path / "deep" / "a.html")
    before = path.read_bytes()
    monkeypatch.setattr(report._Report, "html", lambda page: "<p>another</p>")

    def half(part, *_, **__):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(RunError, match="full"):
            report.write(done, path)
    assert path.read_bytes() == before and [f.name for f in path.parent.iterdir()] == ["a.html"]
    assert report.write(done) == done.folder / "report.html"


# --- small and unfinished runs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says", "not_says"),
    [
        ({"choose": 0}, "No prompts were set apart to choose", "Intervals at 95% for effects"),
        ({"choose": 0, "cells": CELLS[:1]}, "one setting, fixed beforehand", "settings were run"),
        (
            {"choose": 4, "prove": 4, "nulls": (("random", 2),)},
            "p cannot fall below 1.000",
            "hold at 95%",
        ),
        ({"nulls": ()}, "no random directions were run", "Davison"),
        ({"nulls": (), "singles": ()}, "No controls were run", "sign turned"),
        (
            {"metrics": ("logit_difference",), "text": None},
            "No text was generated",
            "Sample texts 4 of",
        ),
        ({"until": "unsteered"}, "Only unsteered rows were run", "Davison"),
        (
            {"cells": [("paris", "latent_clamp", "resid_post 13", "120.0", "all")]},
            "latent_clamp(paris, 120.0) at resid_post 13",
            " dose",
        ),
        (
            {"cells": [("add(a, 1.0) at 12", "", "", "", ""), ("clamp(a, 2.0) at 3", *[""] * 4)]},
            "The chosen setting is add(a, 1.0) at resid_post 12",
            " dose",
        ),
    ],
)
def test_small_runs(tmp_path, options, says, not_says):
    page = written(make_run(tmp_path, **options))[1]
    assert says in page.text and not_says not in page.text
    assert page.all("h1") and "nan" not in page.text.lower().replace("unanswered", "")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("role", "says"), [("flip", "planned rows"), ("chosen", "No setting is")])
def test_missing_rows_are_named_by_their_part(tmp_path, role, says):
    make_run(tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    kept = [line for line in lines if f'"key": "{role}' not in line]
    (tmp_path / "rows.jsonl").write_text("\n".join(kept) + "\n")
    page = written(Run(tmp_path))[1]
    assert f"rows are missing (12 {role})" in page.text and says in page.text


def without(run: Run, begins: str, keep: int = 0) -> Run:
    """The run without rows whose key begins so, but for the first few."""
    path = run.folder / "rows.jsonl"
    lines = path.read_text().splitlines()
    lost = [line for line in lines if f'"key": "{begins}' in line][keep:]
    path.write_text("\n".join(line for line in lines if line not in lost) + "\n")
    return Run(run.folder)


DESIGN = "4 settings {} run on 12 selection prompts"
PROVED = "nothing else {} run on 12 held-out prompts"
BEYOND = "No setting stayed within the limits, so none was chosen"
UNRUN = "The grid was run; the chosen setting and its controls were not"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("options", "lost", "says", "not_says"),
    [
        ({"until": "unsteered"}, None, [DESIGN.format("are to be"), "Only unsteered rows"],
         [DESIGN.format("were"), PROVED.format("were"), BEYOND, UNRUN]),
        ({"until": "grid"}, ("grid", 20),
         [DESIGN.format("are to be"), PROVED.format("are to be"), "rows of the grid are missing"],
         ["Layers not excluded", BEYOND, UNRUN]),
        ({"until": "grid"}, None,
         [DESIGN.format("were"), PROVED.format("are to be"), UNRUN, "setting was not run"],
         [BEYOND, "the one with the best mean effect in concept was chosen"]),
        ({"until": "grid", "limits": {"surprise": 0.0}}, None,
         [DESIGN.format("were"), BEYOND, "no setting stayed within the limits"], [UNRUN]),
        ({"until": "grid", "limits": {"surprise": 9.0}}, None, [UNRUN], [BEYOND]),
        ({}, ("chosen", 5), ["effects on 5 of 12 held-out prompts", PROVED.format("were")],
         ["effects on 12 held-out prompts", UNRUN]),
        ({}, ("chosen", 0), ["the chosen setting was not run", "12 chosen", "No chosen setting"],
         ["No setting was chosen", "no setting stayed"]),
        ({}, ("unsteered-||||-None-p", 0), ["stands beside an unsteered one"],
         ["No text was generated"]),
        ({"choose": 0, "cells": CELLS[:1]}, None, ["Only concept decides", "nothing is chosen"],
         ["chose and decides", "was chosen"]),
        ({"choose": 0}, None, ["there are no selection prompts", "none is claimed"],
         ["12 prompts chose", "Layers not excluded"]),
        ({"choose": 0, "prove": 6}, None, ["no selection prompts", "the grid has 6 prompts"],
         ["6 prompts chose"]),
        ({"cells": [("add(a, 1.0) at 12", "", "", "", ""), ("clamp(a, 2.0) at 3", *[""] * 4)],
          "until": "grid"}, None, [UNRUN], [BEYOND, "Layers not excluded"]),
        ({"selected": 7, "nulls": (), "limits": {"surprise": 9.0}}, None,
         ["p 0.125", "7 random directions made the same choice among 4 settings, of which none"],
         ["no random directions were run", "No random direction went", "nan"]),
    ],
)  # fmt: skip
def test_what_is_said_is_true_of_how_far_the_run_has_come(tmp_path, options, lost, says, not_says):
    run = make_run(tmp_path, **options)
    page = written(without(run, *lost) if lost else run)[1]
    for one in says:
        assert one in page.text
    for one in not_says:
        assert one not in page.text


@pytest.mark.parametrize("role", ["grid", "unsteered", "chosen"])
def test_a_run_whose_values_are_missing(tmp_path, role):
    make_run(tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    for row in rows:
        if row["key"].startswith(role):
            row["metrics"] = dict.fromkeys(row["metrics"])
    text = "\n".join([lines[0], *map(json.dumps, rows)])
    (tmp_path / "rows.jsonl").write_text(text + "\n")
    page = written(Run(tmp_path))[1]
    assert page.all("h1")
    assert not any("nan" in cell for row in page.cells for cell in row)


def test_a_run_without_rows_has_no_report(tmp_path):
    make_run(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(RequestError, match="no rows yet"):
        report.write(Run(tmp_path))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_report_without_the_study_file(tmp_path):
    run = make_run(tmp_path, nulls=())
    (tmp_path / "study.yaml").unlink()
    (tmp_path / "directions").mkdir()
    (tmp_path / "directions" / "eiffel.safetensors").write_bytes(b"damaged")
    assert "eiffel@9e4eb64f" in written(run)[1].text


@pytest.mark.usefixtures("undrawn")
def test_slopes_are_told_of_the_chosen_site_first(tmp_path):
    cells = [
        ("eiffel", "add", site, f"{dose} dose", "prompt")
        for site in ("resid_post 12", "resid_post 13")
        for dose in (0.2, 0.4, 0.6)
    ]
    run = make_run(tmp_path, cells=cells, metrics=("logit_difference",), nulls=())
    found = run.findings().slopes
    page = written(run)[1]
    cells = [r for r in page.cells if len(r) == 10 and r[0] == "eiffel"]
    assert [r[2] for r in cells] == ["resid_post 13", "resid_post 12"]
    slope = found[found["site"] == "resid_post 13"]["slope"].iloc[0]
    assert cells[0][5] in (f"+{slope:.3f} per dose", f"−{-slope:.3f} per dose")
    assert "Tan et al. 2024" in page.text


# --- notebooks ------------------------------------------------------------------------------------


def test_the_short_form_for_a_notebook(found, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", RENDER)
    shown = Page(found._repr_html_())
    assert found.verdict.text in shown.text
    assert shown.row("surprise")[1].startswith("+")
    (image,) = shown.all("img")
    assert image["src"].startswith("data:image/png;base64,iVBOR") and shown.all("script") == []


def test_the_short_form_of_what_is_not_finished(tmp_path):
    start = Page(make_run(tmp_path / "a", until="unsteered").findings()._repr_html_())
    assert "Nothing is declared" in start.text and start.all("img") == []
    shown = Page(make_run(tmp_path / "b", choose=0).findings()._repr_html_())
    assert len(shown.all("img")) == 1 and shown.all("table") == []


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [
        (0.0, "0.000", "0.000"), (0.75, "0.750", "+0.750"), (-1.25, "−1.250", "−1.250"),
        (0.00042, "0.00042", "+0.00042"), (float("nan"), "missing", "missing"),
        (None, "missing", "missing"),
    ],
)  # fmt: skip
def test_numbers(value, plain, signed):
    assert pieces.plain(value) == plain and pieces.signed(value) == signed
    assert pieces.span(value, None) == "none"


def test_text_survives_escaping():
    assert html.unescape(pieces.escaped('a<b & "c" \'')) == 'a<b & "c" \''
    assert pieces.escaped("\ud800\x00") == "?\ufffd"
    parts = {"verdict": "<td>", "claims": pieces.Table(("a",), [["<td>"]]), "picture": None}
    assert pieces.render("brief.html", **parts, notes=["<td>"]).count("<td") == 1
