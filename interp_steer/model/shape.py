"""The numbers that say what a Llama is, read from its configuration. They need no weights."""

from dataclasses import dataclass
from typing import Any

from interp_steer.errors import RequestError
from interp_steer.model.site import Site


@dataclass(frozen=True)
class Scaling:
    """How Llama 3 stretches its rotary frequencies to a longer context (Grattafiori et al. 2024,
    "The Llama 3 Herd of Models").

    Attributes:
        factor: slow frequencies are divided by it.
        low_freq_factor, high_freq_factor: between these numbers of turns within the original
            context the division fades out.
        original_n_ctx: tokens of the context before it was stretched.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_n_ctx: int


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (Su et al. 2021, "RoFormer").

    Attributes:
        base: pair i of d_head / 2 turns by base^(-2i / d_head) radians a token.
        scaling: Llama 3's; None for frequencies as they are.
    """

    base: float
    scaling: Scaling | None


@dataclass(frozen=True)
class Shape:
    """A Llama without its weights.

    Attributes:
        n_layers: blocks.
        d_model: width of the residual stream.
        n_heads, n_kv_heads: query heads, and the heads of keys and values that they share.
        d_head, d_mlp: width of a head, and of the hidden layer of an MLP.
        d_vocab: rows of the embeddings.
        n_ctx: longest context in tokens.
        norm_eps: what an RMS norm adds to the mean square.
        activation: of the MLP, as transformers names it.
        tied: whether the unembedding is the embedding's own matrix.
        rope: the rotary position embeddings.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm_eps: float
    activation: str
    tied: bool
    rope: Rope

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Reads a `LlamaConfig` of a supported kind (see `loading.refuse_unsupported`)."""
        rope = config.rope_parameters
        scaling = None
        if rope["rope_type"] == "llama3":
            scaling = Scaling(
                rope["factor"],
                rope["low_freq_factor"],
                rope["high_freq_factor"],
                rope["original_max_position_embeddings"],
            )
        return cls(
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            d_head=config.head_dim or config.hidden_size // config.num_attention_heads,
            d_mlp=config.intermediate_size,
            d_vocab=config.vocab_size,
            n_ctx=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            tied=bool(config.tie_word_embeddings),
            rope=Rope(rope["rope_theta"], scaling),
        )

    def bounds(self, name: str) -> "Bounds":
        """Which sites a model of this shape has; `name` is for messages."""
        return Bounds(name, self.n_layers, self.n_heads, self.d_model, self.d_head)


@dataclass(frozen=True)
class Bounds:
    """Which sites a model has, and how wide they are.

    Attributes:
        name: the model's, for messages.
    """

    name: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int

    def check(self, site: Site, width: int) -> None:
        """Whether a vector of that width fits at a site.

        Raises:
            RequestError: no such layer or head, or another width.
        """
        if site.layer >= self.n_layers:
            raise RequestError(
                f"layer {site.layer} is out of range: {self.name} has layers 0-{self.n_layers - 1}"
            )
        if (site.head or 0) >= self.n_heads:
            raise RequestError(
                f"head {site.head} is out of range: {self.name} has heads 0-{self.n_heads - 1}"
            )
        wide = self.d_model if site.head is None else self.d_head
        if width != wide:
            raise RequestError(
                f"the direction is {width} wide; {self.name} at {site} is {wide} wide"
            )
