"""The arithmetic of a Llama block, on the weights of transformers' own modules.

Formulas and rounding are transformers' (`LlamaDecoderLayer`, which tests and `verify` compare it
with). What differs is the cost: heads that share keys read them once instead of repeating them,
float32 products on a CPU go to the faster library, and changes inside the block are called where
they act, so that no hook is ever registered on a module.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

Change = Callable[[Tensor], Tensor]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a block: from its number, queries [batch head pos d], keys and values
[batch kv_head pos d] to z [batch pos head d]. Keys and values are rotated and new: what they are
kept in, and what else is attended to, is the function's own affair."""


@contextmanager
def exactly() -> Iterator[None]:
    """In the model's own number format and without gradients, whatever the caller has switched on:
    autocast would round a row that is stored as one of that format, and a batch that was begun
    inside `torch.inference_mode` could not go on outside.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def linear(x: Float[Tensor, "*rows d_in"], module: torch.nn.Linear) -> Float[Tensor, "*rows d_out"]:
    """x W' without a bias.

    torch gives float32 products on a CPU to MKL; oneDNN, which it carries too, is 1.1 to 3 times as
    fast on an AMD processor, most at a few rows (`scripts/benchmarks/speed.py products`).
    """
    weight = module.weight
    if (
        weight.dtype == x.dtype == torch.float32
        and weight.device.type == "cpu"
        and _ONEDNN is not None
        and not torch.is_grad_enabled()
    ):
        out: Tensor = _ONEDNN(x, weight, None, "none", [], "")
        return out
    return functional.linear(x, weight)


def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's product: the operation that torch.compile emits, under no public name."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN = _onednn()


def normed(x: Float[Tensor, "*rows d_model"], norm: Any) -> Float[Tensor, "*rows d"]:
    """x / rms(x), formed in float32, times the weight of a `LlamaRMSNorm`."""
    weight: Tensor = norm.weight
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return weight * (wide * scale).to(x.dtype)


def rotated(x: Float[Tensor, "batch head pos d"], rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x cos + (x with its halves swapped, the first negated) sin.

    `rotary` carries the sign in its sines: (cos, sin), `[batch 1 pos d]` each.
    """
    cos, sin = rotary
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def signed(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[batch pos d]` as `rotated` takes them."""
    cos, sin = rotary
    half = sin.shape[-1] // 2
    return cos[:, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, None]


def causal(
    layer: int,
    q: Float[Tensor, "batch head pos d"],
    k: Float[Tensor, "batch kv_head pos d"],
    v: Float[Tensor, "batch kv_head pos d"],
) -> Float[Tensor, "batch pos head d"]:
    """softmax(q k' / sqrt(d)) v over each position and those before it; heads share keys in groups.

    Right padding needs no mask: it comes after every real token.
    """
    shared = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2)


def attention(
    q: Float[Tensor, "batch head pos d"],
    k: Float[Tensor, "batch kv_head key_pos d"],
    v: Float[Tensor, "batch kv_head key_pos d"],
    mask: Shaped[Tensor, "#batch 1 #pos key_pos"] | None = None,
) -> Float[Tensor, "batch pos head d"]:
    """softmax(q k' / sqrt(d) + mask) v, without a mask over all keys.

    The heads of a group become queries of one head: the keys, most of what a decoding step reads
    beside the weights, are read once, and no kernel has to know of groups.
    """
    batch, heads, new, width = q.shape
    group = heads // k.shape[1]
    if mask is not None and new > 1:
        mask = mask.repeat(1, 1, group, 1)
    q = q.reshape(batch, k.shape[1], group * new, width)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.reshape(batch, heads, new, width).transpose(1, 2)


def block(
    layer: Any,
    number: int,
    x: Float[Tensor, "batch pos d_model"],
    rotary: tuple[Tensor, Tensor],
    attend: Attend,
    changes: Mapping[str, Change],
) -> Float[Tensor, "batch pos d_model"]:
    """A `LlamaDecoderLayer`; `changes` act on `z`, `attn_out`, `mlp_out`; `rotary` is `signed`."""
    own, mlp = layer.self_attn, layer.mlp
    h = normed(x, layer.input_layernorm)
    q, k, v = (
        linear(h, part).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
        for part in (own.q_proj, own.k_proj, own.v_proj)
    )
    z = _changed(changes, "z", attend(number, rotated(q, rotary), rotated(k, rotary), v))
    x = x + _changed(changes, "attn_out", linear(z.flatten(2), own.o_proj))
    h = normed(x, layer.post_attention_layernorm)
    gate = functional.silu(linear(h, mlp.gate_proj), inplace=True)
    down = linear(gate.mul_(linear(h, mlp.up_proj)), mlp.down_proj)
    return x + _changed(changes, "mlp_out", down)


def _changed(changes: Mapping[str, Change], component: str, x: Tensor) -> Tensor:
    return changes[component](x) if component in changes else x
