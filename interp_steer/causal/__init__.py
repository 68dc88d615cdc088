"""What breaks without a part of the model, and where in it steering acts.

    branch     Trunk: passes that branch off an unchanged one and share what is equal
    scores     what is read at the end: losses, logit differences, words
    ablate     `ablate`: parts taken out layer by layer (zero, mean, resample, directional)
    attribution `attribute`: what `patch` would find, to first order, from two passes
    patch      `patch`: activations of clean prompts put into corrupted ones
    trace      `propagation` and `mediation`: where a steering vector's effect passes through
    select     `select_direction`: the best of the directions of all layers

Start at `ablate.ablate(model, items)`.
"""
