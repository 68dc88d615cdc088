"""Features of sparse autoencoders as steering vectors.

    feature    `feature`: a decoder row as a Direction; `locate`: where an SAE is
    decoder    one decoder row out of an SAE's files, in each layout that SAELens reads
    hub        files of the Hugging Face hub: cached, whole, or a few bytes of one
    sae        Sae: a whole SAE beside the model, to encode and decode; SaeStore loads each once
    at_hand    what steering asks of features: encoders, largest activations
    contexts   where features fire over texts
    screen     which features move an output when they are steered
    fit        whether an SAE fits a model
    matched    features alike in density and largest activation, as controls

Start at `feature("starter", index=1136)`.
"""
