"""How strong: strengths that do equal damage, found on selection prompts, shown on held-out ones.

    curve     Curve: which dose to try next, from the KL of those tried
    equal     equal_kl: every line's dose for one KL, its brackets read as one batch

Start at `equal_kl`.
"""
