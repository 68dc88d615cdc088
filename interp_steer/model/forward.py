"""The unsteered forward pass, a block at a time, on the weights of a Hugging Face Llama."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_steer.errors import RequestError
from interp_steer.model.block import Attend, Change, block, causal, exactly, linear, normed, signed
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class Forward:
    """The forward pass of a Hugging Face module in parts, so that others can act between them.

    Attributes:
        hf: the module, whose weights are used.
        n_layers: how many blocks it has.
    """

    def __init__(self, hf: "LlamaForCausalLM", n_layers: int) -> None:
        self.hf = hf
        self.n_layers = n_layers

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.hf.model.embed_tokens.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format, also that of the residual stream."""
        dtype: torch.dtype = self.hf.model.embed_tokens.weight.dtype
        return dtype

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to compute with, and not their shapes alone."""
        return self.device.type != "meta"

    def embed(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before block 0."""
        out: Tensor = self.hf.model.embed_tokens(ids)
        return out

    def rotary(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "#batch pos"]
    ) -> tuple[Float[Tensor, "#batch 1 pos d_head"], Float[Tensor, "#batch 1 pos d_head"]]:
        """Cosines and sines of the rotary embedding at absolute positions, as `block` takes them:
        the first half of the sines is negated.
        """
        return signed(self.hf.model.rotary_emb(x, position_ids=positions))

    def block(
        self,
        layer: int,
        x: Float[Tensor, "batch pos d_model"],
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal,
        changes: Mapping[str, Change] = MappingProxyType({}),
    ) -> Float[Tensor, "batch pos d_model"]:
        """One block. Hooks that somebody registers on `hf` are not called here.

        Args:
            attend: attention; plain causal by default.
            changes: functions that `attn_out`, `mlp_out` `[batch pos d_model]` or `z`
                `[batch pos head d_head]` of this block pass through.
        """
        return block(self.hf.model.layers[layer], layer, x, rotary, attend, changes)

    def unembed(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm and unembedding: logits of a residual stream after the last block."""
        return linear(normed(x, self.hf.model.norm), self.hf.lm_head)

    def residuals(
        self,
        encoded: Sequence[Encoded],
        changes: Mapping[tuple[str, int], Change] = MappingProxyType({}),
    ) -> Iterator[tuple[int, Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]]]:
        """One unsteered pass over prompts as one right-padded batch: yields (layer, resid_post,
        which positions are real) block by block, so that all layers need the memory of one.
        The stream before block 0 comes first, as layer -1.

        Args:
            changes: as for `block`, by (component, layer).

        Raises:
            RequestError: the model has no weights.
        """
        if not self.has_weights:
            raise RequestError("activations need the model's weights, which are not here")
        ids, real = padded([one.ids for one in encoded], self.device)
        with exactly():
            x = self.embed(ids)
            rotary = self.rotary(x, torch.arange(ids.shape[1], device=self.device)[None])
        yield -1, x, real  # outside: what is switched off is so for the whole thread
        for layer in range(self.n_layers):
            with exactly():
                x = self.block(layer, x, rotary, changes=_inside(changes, layer))
            yield layer, x, real

    def read(
        self, site: Site, encoded: Sequence[Encoded]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]]:
        """Unsteered activations at one site of prompts as one right-padded batch, and which
        positions are real. Later blocks are not computed.

        Raises:
            RequestError: the site is a head's `z`.
        """
        if site.component == "z":
            raise RequestError(f"activations are read a stream at a time, not at {site}")
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x)
            return x

        between = site.component in ("resid_pre", "resid_post")
        last = site.layer - (site.component == "resid_pre")
        passes = self.residuals(encoded, {} if between else {(site.component, site.layer): keep})
        x, real = next((x, real) for layer, x, real in passes if layer == last)
        return (x if between else seen[0]), real

    def cross_entropy(
        self, one: Encoded, site: Site, change: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, " predicted"]:
        """-ln p of every token after the first, in nats, with the activations at one site (the
        first position's kept) passed through a function.
        """

        def changed(x: Tensor) -> Tensor:
            return x if change is None else torch.cat([x[:, :1], change(x[:, 1:]).to(x.dtype)], 1)

        between = site.component in ("resid_pre", "resid_post")
        ids = torch.tensor([one.ids], device=self.device)
        changes = {} if between else {(site.component, site.layer): changed}
        with exactly():
            x = self.embed(ids)
            rotary = self.rotary(x, torch.arange(len(one.ids), device=self.device)[None])
            for layer in range(self.n_layers):
                x = changed(x) if between and layer == site.block else x
                x = self.block(layer, x, rotary, changes=_inside(changes, layer))
            x = changed(x) if between and site.block == self.n_layers else x
            logprobs = self.unembed(x[0, :-1]).float().log_softmax(-1)
        return -logprobs.gather(1, ids[0, 1:, None])[:, 0]


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids as one left-aligned batch, zeros at the right end of shorter ones; and which
    positions are real.
    """
    longest = max(len(ids) for ids in sequences)
    whole = torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in sequences]).to(device)
    return whole.clamp_min(0), whole >= 0


def _inside(changes: Mapping[tuple[str, int], Change], layer: int) -> dict[str, Change]:
    return {component: one for (component, at), one in changes.items() if at == layer}
