"""The documentation's own examples: studies can be planned, links and paths lead somewhere."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from interp_steer.model.model import SteeringModel
from interp_steer.study.file import StudyFile
from interp_steer.study.plan import Plan
from interp_steer.study.study import Study
from tests.conftest import make_llama
from tests.test_imports import ORDER

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "interp_steer" / "data" / "starter_sae" / "README.md",
]
BLOCKS = [
    (f"{page.name}-{number}", block)
    for page in PAGES
    for number, block in enumerate(re.findall(r"```ya?ml\n(.*?)```", page.read_text(), re.S))
]
STUDIES = [(name, block) for name, block in BLOCKS if "directions:" in block]


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> SteeringModel:
    """As many layers as the starter has, of a size that costs nothing."""
    folder = make_llama(tmp_path_factory.mktemp("deep"), num_hidden_layers=30)
    return SteeringModel.load(str(folder))


def test_every_block_is_yaml():
    assert STUDIES
    for name, block in BLOCKS:
        assert isinstance(yaml.safe_load(block), dict), name


@pytest.mark.parametrize(("name", "block"), STUDIES, ids=[name for name, _ in STUDIES])
def test_every_study_can_be_planned_and_could_declare(deep, tmp_path, monkeypatch, name, block):
    monkeypatch.chdir(ROOT)
    (tmp_path / "s.yaml").write_text(block)
    study: Study = StudyFile.read(tmp_path / "s.yaml").study(deep)
    plan = Plan.of(study, deep, timed=False)
    told = " ".join(plan.notes)
    assert "nothing will be declared" not in told and "without intervals" not in told
    # Bonferroni over cells, or random directions that made the choice themselves
    tried = study.selected or study.controls.random
    cells = 1 if study.selected else len(study.settings)
    assert cells / (1 + tried) <= 0.05
    assert min(len(study.choose), len(study.prove)) >= 10


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"\b(?:scripts|interp_steer|tests|docs)/[\w./]*\w", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`interp_steer((?:\.[a-z_]\w*)+)`", text):
        *module, last = name[1:].split(".")
        home = import_module(".".join(["interp_steer", *module]))
        assert hasattr(home, last) or import_module(f"interp_steer{name}"), name


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", PAGES[0].read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_readme_names_every_package_in_import_order():
    table = PAGES[0].read_text().split("## How it is built")[1]
    packages = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert packages == [name for name in ORDER if name != "errors"]


@pytest.mark.slow
def test_the_readmes_python_prints_what_it_shows(capsys):
    section = PAGES[0].read_text().split("## Use it")[1]
    code, shown = section.split("```python\n")[1].split("```")[0], section.split("```\n")[2]
    exec(code, {})
    printed = capsys.readouterr().out.split()
    assert " ".join(printed) == " ".join(shown.split())
