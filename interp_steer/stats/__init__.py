"""How sure a number is. The prompt is the unit: what is drawn is prompts.

    intervals      means, rates and differences over prompts, with intervals
    simultaneous   many settings at once: bands that hold together, the set of the best
    chance         p-values: random controls, McNemar's test, sign flips
    shares         a ratio of two means, with Fieller's interval
    interval       Interval, and what all of them are made of
    resampling     the studentised bootstrap of whole prompts

Start at `intervals.mean`.
"""
