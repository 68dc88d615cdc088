"""The second view: a HookedTransformer around the weights of the first, without a copy.

TransformerLens's `W_Q`, `W_in`, ... become transposed or reshaped views of the checkpoint's
matrices. Nothing is folded or centred, so activations and directions mean the same in both views.
`folded_copy` has TransformerLens's standard processing instead, and weights of its own.
"""

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

from interp_steer.errors import RequestError, RunError
from interp_steer.model.shape import Shape

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


class SharedTransformer(HookedTransformer):
    """A HookedTransformer whose weights another module uses too: they stay as they are.

    Raises:
        RequestError: a call that would change the weights, or give this view others.
    """

    def to(self, *where: Any, print_details: bool = True, **named: Any) -> "SharedTransformer":
        """The model itself, if it is there already."""
        return self._apply(lambda weight: weight.to(*where, **named))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SharedTransformer":
        weight = self.embed.W_E
        found = fn(weight.new_empty(0))
        if (found.dtype, found.device) != (weight.dtype, weight.device):
            raise RequestError(
                f"model.hooked shares its weights with model.hf and stays {weight.dtype} on "
                f"{weight.device}; choose with SteeringModel.load(..., dtype=..., device=...)"
            )
        return self


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: SharedTransformer, *given: object, **named: object) -> None:
        raise RequestError(
            f"model.hooked.{name} would change the weights that model.hf shares: both views would "
            "compute something else; model.folded() is a copy with TransformerLens's standard "
            "processing (norms folded, unembedding centred)"
        )

    return refuse


for _name in (
    "process_weights_",
    "load_and_process_state_dict",
    "load_state_dict",
    "fold_layer_norm",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
    "init_weights",
):
    setattr(SharedTransformer, _name, _refusing(_name))


def hooked_view(
    hf: "LlamaForCausalLM", shape: Shape, tokenizer: "PreTrainedTokenizerBase", name: str = ""
) -> HookedTransformer:
    """The weights of a Hugging Face module as a HookedTransformer.

    Args:
        shape: of `hf`.
        name: what TransformerLens calls the model.

    Raises:
        RunError: another TransformerLens than the one this was written for.
    """
    weight: Tensor = hf.lm_head.weight
    hooked = _empty(SharedTransformer, shape, weight.dtype, weight.device, name, "RMS")
    with torch.no_grad():
        return _filled(hooked, convert_llama_weights(hf, hooked.cfg), shape, tokenizer)


def folded_copy(
    hf: "LlamaForCausalLM",
    shape: Shape,
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    dtype: torch.dtype,
) -> HookedTransformer:
    """A copy of the weights as TransformerLens processes them: see `SteeringModel.folded`."""
    from transformer_lens.weight_processing import ProcessWeights

    device = hf.lm_head.weight.device
    hooked = _empty(HookedTransformer, shape, dtype, device, name, "RMSPre")
    with torch.no_grad():
        shared = convert_llama_weights(hf, hooked.cfg)
        state = {name: weight.to(torch.float32, copy=True) for name, weight in shared.items()}
        state = ProcessWeights.process_weights(
            state,
            hooked.cfg,
            fold_ln=True,
            center_writing_weights=False,  # right for LayerNorm alone: RMSNorm keeps the mean
            center_unembed=True,
            fold_value_biases=True,
        )
        state = {name: weight.to(dtype) for name, weight in state.items()}
        return _filled(hooked, state, shape, tokenizer)


def _empty(
    kind: type[HookedTransformer],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
    normalization: str,
) -> HookedTransformer:
    """A HookedTransformer of this shape, without weights."""
    fields: dict[str, Any] = {
        "model_name": name or "llama",
        "original_architecture": "LlamaForCausalLM",
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "d_head": shape.d_head,
        "d_mlp": shape.d_mlp,
        "d_vocab": shape.d_vocab,
        "n_ctx": shape.n_ctx,
        "n_key_value_heads": None if shape.n_kv_heads == shape.n_heads else shape.n_kv_heads,
        "eps": shape.norm_eps,
        "act_fn": shape.activation,
        "normalization_type": normalization,
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": shape.d_head,
        "rotary_base": shape.rope.base,
        "tie_word_embeddings": shape.tied,
        "dtype": dtype,
        "device": str(device),
        "init_weights": False,
    }
    if scaling := shape.rope.scaling:
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": scaling.factor,
            "NTK_by_parts_low_freq_factor": scaling.low_freq_factor,
            "NTK_by_parts_high_freq_factor": scaling.high_freq_factor,
            "NTK_original_ctx_len": scaling.original_n_ctx,
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # version 3 is pinned, see pyproject
        settings = HookedTransformerConfig.from_dict(fields)
        with torch.device("meta"):  # no second set of weights, not even for a moment
            return kind(settings, move_to_device=False)


def _filled(
    hooked: HookedTransformer,
    state: dict[str, Tensor],
    shape: Shape,
    tokenizer: "PreTrainedTokenizerBase",
) -> HookedTransformer:
    """Gives it these weights, the small buffers of attention, and a copy of the tokenizer."""
    device = state["unembed.W_U"].device
    # the class's own: SharedTransformer refuses it
    HookedTransformer.load_state_dict(hooked, state, strict=False, assign=True)
    first = hooked.blocks[0].attn
    sin, cos = first.calculate_sin_cos_rotary(
        shape.d_head,
        min(shape.n_ctx, first.ROTARY_INITIAL_CACHE_SIZE),
        base=shape.rope.base,
        dtype=hooked.cfg.dtype,
    )
    for block in hooked.blocks:  # small buffers, shared by all blocks
        block.attn.mask = torch.empty((0, 0), dtype=torch.bool, device=device)
        block.attn.IGNORE = torch.tensor(-torch.inf, device=device)
        block.attn.rotary_sin, block.attn.rotary_cos = sin.to(device), cos.to(device)
    left = [name for name, weight in hooked.named_parameters() if weight.device != device]
    if left:
        raise RunError(f"this TransformerLens left {left[0]} without weights; expected 3.9")
    begins = tokenizer("a")["input_ids"][:1]  # others put an EOS behind a text
    own = copy.deepcopy(tokenizer)
    # TransformerLens loads the tokenizer again, by name, unless this says that it adds BOS
    own.init_kwargs["add_bos_token"] = True
    own.init_kwargs.setdefault("name_or_path", "")  # one that was made in memory has none
    hooked.set_tokenizer(own, default_padding_side="left")
    hooked.cfg.default_prepend_bos = begins == [tokenizer.bos_token_id]
    return hooked.eval()
