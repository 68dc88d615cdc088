"""How strong, and how good: strengths that do equal damage, and answers that a judge rates.

    curve      Curve: which dose to try next, from the KL of those tried
    equal      equal_kl: every line's dose for one KL, its brackets read as one batch
    lines      what lines of a sweep do to every prompt, beside the unsteered answers
    place      best_place: layer and strength for a concept
    search     search: strengths of several directions together, by Optuna
    card       card: one page for one direction
    ratings    rubrics, how a rating is read, and how three become one score
    endpoint   Endpoint: a judge at an OpenAI-compatible address
    judge      judge: ratings by content, asked once; LocalJudge: a model of our own engine
    arms       judge_run: the arms of a run, as a judge rates them

Start at `card`, `equal_kl` or `judge_run`.
"""
