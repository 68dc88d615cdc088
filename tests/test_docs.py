"""The documentation's own examples: every study in YAML can be planned, and could declare."""

import re
from pathlib import Path

import pytest
import yaml

from interp_steer.model.model import SteeringModel
from interp_steer.study.file import StudyFile
from interp_steer.study.plan import Plan
from interp_steer.study.study import Study
from tests.conftest import make_llama

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
