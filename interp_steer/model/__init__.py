"""A Llama's weights, seen twice: as a Hugging Face module and as a HookedTransformer.

model        `SteeringModel`: loading, text to tokens and back, both views
forward      the unsteered pass over the Hugging Face module, a block at a time
block        the arithmetic of one block
hooked       the HookedTransformer around the same weights, and a folded copy of them
shape        layers, widths and rotary embeddings, read from the configuration
loading      from a name to weights in memory, and what is refused on the way
device       where a model goes and in which number format
starter      the small chat model that arrives through pip
site         places in a model that can be read and changed
fingerprint  a short hash that tells one set of weights from another

Start from `SteeringModel.load(name)`.
"""
