"""`interp-steer judge`: three ratings of a run's held-out answers, arm by arm."""

import json
import os
from pathlib import Path
from typing import Annotated

from interp_steer.cli import common
from interp_steer.errors import RequestError
from interp_steer.util.console import progress, safe

KEY = "INTERP_STEER_JUDGE_KEY"  # of the environment
NOISY = 0.8  # share of the anchors below which a judge should not be believed


def judge(
    folder: Annotated[Path, common.arg("Folder of a study's or a sweep's run.")],
    concept: Annotated[
        str, common.opt("What the answers should be about, in words, such as 'the Eiffel Tower'.")
    ],
    judge_url: Annotated[
        str | None,
        common.opt(
            "Address of an OpenAI-compatible server, such as http://localhost:8000/v1. A key is "
            f"read from {KEY}."
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        common.opt(
            "The judge: as the server knows it; without --judge-url a model that is loaded here, "
            "whose probabilities of the ratings are read."
        ),
    ] = None,
    rubrics: Annotated[
        Path | None,
        common.opt("Folder with concept.txt, instruction.txt and fluency.txt of your own."),
    ] = None,
    scale: Annotated[
        int | None,
        common.opt(
            "Read the probabilities of a rating from 0 to so many (9, or 100 where the judge has "
            "these numbers as one token) in place of what a server says."
        ),
    ] = None,
    workers: Annotated[int, common.opt("Requests at a time.", min=1)] = 8,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Rate a run's held-out answers: concept, instruction, fluency, and their harmonic mean.

    Ratings lie in the run's folder: the same command asks only for what is missing.
    """
    if not judge_model:
        raise RequestError("which judge? give --judge-model NAME, with --judge-url for a server")
    if scale is not None and not judge_url:
        raise RequestError("--scale is for a server; a local model's probabilities are always read")
    with progress("starting", every=5):
        from interp_steer.report.run import Run
        from interp_steer.tune.arms import judge_run
        from interp_steer.tune.endpoint import Endpoint, WeightedEndpoint
        from interp_steer.tune.judge import LocalJudge
        from interp_steer.tune.ratings import Rubrics

    told = Rubrics.read(rubrics) if rubrics else None
    run = Run(folder)
    by: Endpoint | LocalJudge
    key = os.environ.get(KEY)
    if judge_url and scale is not None:
        by = WeightedEndpoint(judge_url, judge_model, key, workers=workers, top=scale)
    elif judge_url:
        by = Endpoint(judge_url, judge_model, key, workers=workers)
    else:
        by = LocalJudge(common.load(judge_model, dtype, device))
    with progress("judging", None, unit="ratings") as report:
        found = judge_run(run, by, concept, rubrics=told, report=report)
    right, anchors = found.judged.right
    noise, twice = found.judged.noise
    if as_json:
        common.print_json(
            {
                "judge": found.judged.judge, "rubric": found.judged.rubric,
                "anchors_right": right, "anchors": anchors, "noise": noise, "judged_twice": twice,
                "arms": json.loads(found.table.to_json(orient="records")),
                "answers": json.loads(found.answers.to_json(orient="records")),
            }
        )  # fmt: skip
        return
    heads = ("arm", "concept", "instruction", "fluency", "score", "low", "high", "n")
    lost = ("missing", "missing_zero") if found.table["missing"].any() else ()
    common.table((*heads, *lost), found.table[[*heads, *lost]].itertuples(index=False, name=None))
    print("\nratings 0 to 2; score: harmonic mean of an answer's three, a mean over prompts")
    if lost:
        print("missing: answers without a rating; missing_zero: the mean score with them as 0")
    print(safe(f"judge {found.judged.judge}, rubrics {found.judged.rubric}"))
    print(f"anchors: {right:.0%} of {anchors} known ratings came out right")
    if twice:
        print(f"noise: {twice} ratings given twice differ by {noise:.2f} on average")
    if right < NOISY:
        print("A judge that misses so many anchors says little: take another one.")
