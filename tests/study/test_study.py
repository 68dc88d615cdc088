"""A study is its design with a call that runs it: one value, whatever is done with it."""

import inspect
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from interp_steer.study.design import Design
from interp_steer.study.study import Study
from tests.study.samples import four_cells, study


def test_a_study_is_a_value():
    made = four_cells()
    assert made == four_cells() != four_cells(chunk=3)
    for copy in (replace(made), pickle.loads(pickle.dumps(made))):
        assert type(copy) is Study and copy == made and copy.settings == made.settings
    assert repr(made).startswith("Study(choose=(Item(prompt='The quick brown fox'")
    for name in ("chunk", "anything"):
        with pytest.raises(FrozenInstanceError):
            setattr(made, name, 3)


def test_its_arguments_are_the_designs_fields():
    names = [field.name for field in fields(Design)]
    assert list(inspect.signature(Study).parameters) == names
    for name in names:  # `help(Study)` explains each
        assert name in Study.__doc__


def test_run_runs_the_study_and_not_its_model_bound_copy(tiny, tmp_path):
    made = study(choose=[], sites=[2], coefficients=["0.3 dose"])
    before = pickle.dumps(made)
    run = made.run(tiny, tmp_path, arguments=["some", "words"])
    assert pickle.dumps(made) == before  # its prompts are still texts
    assert run.folder == tmp_path and run.manifest["arguments"] == ["some", "words"]
    assert set(run.table()["prompt"]) == {item.text for item in made.prove}
