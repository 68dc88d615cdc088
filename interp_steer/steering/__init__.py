"""What is done to a model: directions, and the interventions that use them. All are values.

    direction      Direction, DirectionSet: unit vectors with a home and an origin
    directions     Directions: which file a name stands for
    file           directions on disk
    contrast       directions from contrasting prompts, one pure function a method
    separation     how well a contrast's layers tell its sides apart
    jacobian       directions of words, by the Jacobian lens
    lens           JacobianLens: whole lenses, and the files that hold them
    scale          Scale: the residual stream's median length, the unit of a relative coefficient
    operators      what an intervention computes
    intervention   Intervention: operator, directions, coefficient, sites, scope and gate
    grammar        an intervention as one line of text: `parse`, and `steer` for Python
    spread         many lines of one text: what braces stand for
    encoder        what is asked of a sparse autoencoder, wherever it comes from

Start at `steer` or `parse`. (The package is not called `steer`: that is the function.)
"""
