"""The second view: a HookedTransformer around the weights of the first, without a copy.

TransformerLens's `W_Q`, `W_in`, ... become transposed or reshaped views of the checkpoint's
matrices. Nothing is folded or centred, so activations and directions mean the same in both views.
"""

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch

from interp_steer.errors import RunError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from interp_steer.model import SteeringModel


def hooked_view(model: "SteeringModel") -> "HookedTransformer":
    """The model's weights as a HookedTransformer.

    Raises:
        RunError: another TransformerLens than the one this was written for.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

    config, rope = model.hf.config, model.hf.config.rope_parameters
    fields: dict[str, Any] = {
        "model_name": model.name or "llama",
        "original_architecture": "LlamaForCausalLM",
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "d_head": model.d_head,
        "d_mlp": config.intermediate_size,
        "d_vocab": model.d_vocab,
        "n_ctx": model.n_ctx,
        "n_key_value_heads": None if model.n_kv_heads == model.n_heads else model.n_kv_heads,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": model.d_head,
        "rotary_base": rope["rope_theta"],
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "dtype": model.dtype,
        "device": str(model.device),
        "init_weights": False,
    }
    if rope["rope_type"] == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # version 3 is pinned, see pyproject
        settings = HookedTransformerConfig.from_dict(fields)
        with torch.device("meta"):  # no second set of weights, not even for a moment
            hooked = HookedTransformer(settings, move_to_device=False)
    with torch.no_grad():
        state = convert_llama_weights(model.hf, settings)
        hooked.load_state_dict(state, strict=False, assign=True)
        first = hooked.blocks[0].attn
        sin, cos = first.calculate_sin_cos_rotary(
            model.d_head,
            min(model.n_ctx, first.ROTARY_INITIAL_CACHE_SIZE),
            base=rope["rope_theta"],
            dtype=model.dtype,
        )
        for block in hooked.blocks:  # small buffers, shared by all blocks
            block.attn.mask = torch.empty((0, 0), dtype=torch.bool, device=model.device)
            block.attn.IGNORE = torch.tensor(-torch.inf, device=model.device)
            block.attn.rotary_sin, block.attn.rotary_cos = (
                sin.to(model.device),
                cos.to(model.device),
            )
    left = [name for name, p in hooked.named_parameters() if p.device != model.device]
    if left:
        raise RunError(f"this TransformerLens left {left[0]} without weights; expected 3.9")
    tokenizer = copy.deepcopy(model.tokenizer)
    # TransformerLens loads the tokenizer again, by name, unless this says that it adds BOS
    tokenizer.init_kwargs["add_bos_token"] = True
    hooked.set_tokenizer(tokenizer, default_padding_side="left")
    hooked.cfg.default_prepend_bos = bool(model.tokenizer("")["input_ids"])
    return hooked.eval()
