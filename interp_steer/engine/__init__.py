"""The engine: rows in, rows out, in one batch whose every row is steered in its own way.

    row        Row: one prompt under interventions, with one seed; Result and Score come back
    engine     Engine: generate, stream and score rows
    stepper    Stepper: a decoding step at a time, for rows that come and go
    admission  rows in work: checked, gated, watched
    forward    whole sequences through the model, what is equal computed once
    decoding   keys and values in slots, and a step of rows of any lengths
    bank       the interventions of a batch at one hook point, each vector kept once
    sampler    the next token of many rows, each with its own setting and seed
    memory     how much rows need, and how much there is
    hooks      the same rows as hooks of TransformerLens
    verify     the contract, checked on a user's own model
    bench      the prompts, rows and references that these checks share

Start at `Engine.generate`.
"""
