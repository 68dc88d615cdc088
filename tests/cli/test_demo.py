"""The demo's study file: its grid, and the features that it names. The demo itself is slow."""

import itertools

from interp_steer.cli.steering.demo import FILE, _answers
from interp_steer.study.file import StudyFile
from tests.study.samples import four_cells


def test_the_grid_crosses_what_the_demo_says():
    file = StudyFile.read(FILE)
    assert {part: len(items) for part, items in file.parts().items()} == {"choose": 8, "prove": 8}
    features = [name for name in file.spec["directions"] if name != "eiffel"]
    contrast = itertools.product(["eiffel"], ["add"], (11, 13, 15), (0.5, 0.6, 0.7))
    others = itertools.product(features, ("add", "clamp"), (13,), (0.4, 0.5, 0.6))
    assert file.spec["lines"] == [
        f"{operator}({name}, {dose} dose) at {layer} on prompt"
        for name, operator, layer, dose in (*contrast, *others)
    ]


def test_the_features_are_those_whose_labels_name_the_concept_and_screen_best(starter):
    """As `features rank` finds them, and as the file says."""
    from interp_steer.features.sae import Sae
    from interp_steer.features.screen import screen

    spec = StudyFile.read(FILE).spec
    named = {one["index"] for name, one in spec["directions"].items() if name != "eiffel"}
    scores = screen(Sae.load("starter"), starter, [1136, 2652, 3637])
    best = sorted(scores, key=lambda one: -one.output_score)[:2]
    assert {one.index for one in best} == named


def test_answers_have_the_line_of_their_setting(tiny, tmp_path):
    """The demo looks its answers up by their lines, of which a run's table has the parts."""
    lines = [f"add(d, {dose} dose) at 2 on prompt" for dose in (0.3, 0.5)]
    made = four_cells(choose=(), lines=lines, sites=(), coefficients=())
    answers = _answers(made.run(tiny, tmp_path / "RUN"))
    assert (
        set(answers["setting"]) == {"", *(setting[0] for setting in made.settings)} == {"", *lines}
    )
