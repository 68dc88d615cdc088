"""Several strengths at once, by Optuna: a planted best is found, and a killed search goes on."""

import numpy as np
import pytest

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError, RunError
from interp_steer.steering.direction import Direction
from interp_steer.tune.search import search

LINE = "add(good, ? dose) at 2; add(bad, ? dose) at 2"
CHOOSE = [f"Say something about number {n}." for n in range(4)]
PROVE = [f"What follows the number {n}?" for n in range(10, 22)]


@pytest.fixture(scope="module")
def directions(tiny):
    """One direction that raises what is asked for, and a random one."""
    yes, no = (tiny.tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in ("yes", "no"))
    rows = tiny.hf.lm_head.weight.detach()
    good = Direction.of(rows[yes] - rows[no], "blocks.2.hook_resid_post", "good")
    return {"good": good, "bad": good.random(1).named("bad")}


def pairs(texts):
    return [{"prompt": text, "positive": " yes", "negative": " no"} for text in texts]


def found(tiny, directions, folder, **more):
    fields = {"trials": 24, "batch": 6, "choose_by": "propensity", "limits": {"kl_mean": 0.6},
              "sampling": Sampling(max_new_tokens=4), "prove": pairs(PROVE), **more}  # fmt: skip
    return search(tiny, LINE, pairs(CHOOSE), directions, folder, **fields)


def test_the_direction_that_helps_is_found_within_the_limit(tiny, directions, tmp_path):
    best = found(tiny, directions, tmp_path)
    trials = best.trials
    assert list(trials["number"]) == list(range(24))
    passing = trials[trials["passes"]]
    assert best.best == passing.loc[passing["effect"].idxmax(), "line"]
    assert "good" in best.best and "good" in best.single
    # candidates after the first, random ones, are better than those: the sampler has learned
    later, first = trials[12:]["effect"].mean(), trials[:12]["effect"].mean()
    assert later > first
    # by hand: the paired gain on held-out prompts
    assert best.gain.n == len(PROVE) and best.gain.low <= best.gain.estimate <= best.gain.high
    shown = best.shown.set_index("arm")["propensity"]
    assert best.gain.estimate == pytest.approx(shown["together"] - shown["single"])
    inside = best.gain.low <= 0 <= best.gain.high
    assert ("within noise" in best.verdict) == inside
    assert np.isfinite(shown).all()


def test_the_same_again_runs_nothing(tiny, directions, tmp_path):
    one = found(tiny, directions, tmp_path)
    before = (tmp_path / "selection" / "rows.jsonl").read_bytes()
    two = found(tiny, directions, tmp_path)
    assert (tmp_path / "selection" / "rows.jsonl").read_bytes() == before
    assert two.trials.equals(one.trials) and two.best == one.best
    more = found(tiny, directions, tmp_path, trials=30)
    assert more.trials[:24].equals(one.trials) and len(more.trials) == 30


@pytest.mark.parametrize(
    ("line", "more", "expected"),
    [
        ("add(good, ? dose) at 2", {}, "has 1 unknown strengths"),
        (LINE, {"trials": 0}, "trials is 0"),
        (LINE, {"most": 0}, "most is 0"),
        (LINE, {"choose_by": ""}, "give concept words, or choose_by"),
        (LINE, {"prove": pairs(CHOOSE)}, "asked in both selection and held out"),
        (LINE.replace("good", "none"), {}, "none"),
    ],
)
def test_what_cannot_be_searched_is_refused(tiny, directions, tmp_path, line, more, expected):
    fields = {"choose_by": "propensity", "prove": pairs(PROVE), **more}
    with pytest.raises(RequestError, match=expected):
        search(tiny, line, pairs(CHOOSE), directions, tmp_path, **fields)


def test_no_candidate_within_the_limits_is_said(tiny, directions, tmp_path):
    with pytest.raises(RunError, match="no candidate stays within"):
        found(tiny, directions, tmp_path, limits={"kl_mean": -1.0}, trials=6)
