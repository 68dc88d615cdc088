"""One set of weights seen twice: a Hugging Face module to decode with, a HookedTransformer to study.

This is the only file that touches the insides of transformers' Llama and of TransformerLens. It
knows nothing of steering. Both views share every large tensor, so the second one costs no memory:
TransformerLens's `W_Q`, `W_in`, ... are transposed or reshaped views of the checkpoint's matrices.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_steer.errors import RequestError, RunError, nearest
from interp_steer.loading import find_folder, pick_device, pick_dtype, read, refuse_unsupported

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Message = tuple[str, str]
"""A chat message: (role, content)."""

Prompt = str | tuple[Message, ...]
"""Plain text, or the messages of a chat."""

COMPONENTS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")
"""What can be read and changed in a block, named as TransformerLens does."""

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model: component x layer x head. Heads exist at `z` alone, and are needed there."""

    component: str
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise RequestError(
                f"unknown component {self.component!r}{nearest(self.component, COMPONENTS)}"
            )
        if self.layer < 0 or (self.head or 0) < 0:
            raise RequestError(f"layers and heads count from 0, got {self}")
        if (self.component == "z") != (self.head is not None):
            raise RequestError("a site at z names a head, such as 'z 15h3'; no other site does")

    @property
    def hook_name(self) -> str:
        """TransformerLens's hook name; `z` is one hook for all heads of a block."""
        return f"blocks.{self.layer}.{_HOOKS[self.component]}"

    @property
    def hook_point(self) -> str:
        """The hook name, with the head's number after it at `z`."""
        return self.hook_name + ("" if self.head is None else f".{self.head}")

    @classmethod
    def parse(cls, hook_point: str) -> "Site":
        """From `blocks.15.hook_resid_post`; raises RequestError for anything else."""
        for component, hook in _HOOKS.items():
            found = re.fullmatch(rf"blocks\.(\d+)\.{re.escape(hook)}(?:\.(\d+))?", hook_point)
            if found:
                layer, head = found.groups()
                return cls(component, int(layer), None if head is None else int(head))
        raise RequestError(
            f"unknown hook point {hook_point!r}; expected such as 'blocks.15.hook_resid_post'"
        )

    def __str__(self) -> str:
        return f"{self.component} {self.layer}" + ("" if self.head is None else f"h{self.head}")


def chat(user: str, system: str | None = None, answer: str | None = None) -> tuple[Message, ...]:
    """The messages of a one-turn chat.

    Args:
        user: what the user says.
        system: the system prompt; None leaves the template's own default.
        answer: the beginning of the assistant's answer, to be continued or scored.
    """
    said = [("system", system), ("user", user), ("assistant", answer)]
    return tuple((role, content) for role, content in said if content is not None)


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids, with what is known of every token.

    Attributes:
        ids: token ids; the first one is the model's attention sink, whatever it is.
        content: whether the token is the user's own text, not template or special token.
        answer: index of the first token of the assistant's given answer, or None.
    """

    ids: tuple[int, ...]
    content: tuple[bool, ...]
    answer: int | None = None


class SteeringModel:
    """A Llama-architecture model with its tokenizer, in both views.

    Attributes:
        hf: the Hugging Face `LlamaForCausalLM`, used for decoding.
        tokenizer: its fast tokenizer.
        name: hub id, folder or `"starter"`, as asked for.
        revision: the hub's commit, or "" for a folder.
        n_layers, d_model, n_heads, n_kv_heads, d_head, d_vocab, n_ctx: the model's shape.
    """

    def __init__(
        self,
        hf: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        name: str = "",
        revision: str = "",
    ) -> None:
        """Wraps a model that is already in memory.

        Raises:
            RequestError: the model is of a kind that the two views would not agree on.
        """
        refuse_unsupported(hf.config, name or "this model")
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.name, self.revision = name, revision
        config = hf.config
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = config.num_key_value_heads
        self.d_head: int = config.head_dim or self.d_model // self.n_heads
        self.d_vocab: int = config.vocab_size
        self.n_ctx: int = config.max_position_embeddings

    @classmethod
    def load(
        cls,
        name: str = "starter",
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        device_map: object = None,
        quantization: object = None,
    ) -> "SteeringModel":
        """Loads `"starter"`, a folder, or a hub id such as `"meta-llama/Llama-3.1-8B-Instruct"`.

        Args:
            name: what to load; a hub id is downloaded once and later read offline.
            dtype: default bfloat16 on a GPU, float32 on a CPU. Converting later would
                break the sharing of the weights.
            device: default the first CUDA GPU if there is one, else the CPU.
            revision: the hub's branch, tag or commit.
            device_map, quantization: refused, with the reason.

        Raises:
            RequestError: an unknown model, or one that would be computed wrongly.
            RunError: no network, a gated repository, damaged files, no memory.
        """
        if device_map is not None:
            raise RequestError(
                "device_map is not supported: the HookedTransformer view and the engine need all "
                "weights on one device; choose it with device='cuda:0'"
            )
        if quantization is not None:
            raise RequestError(
                "4- and 8-bit weights are not supported: they cannot be seen as TransformerLens "
                "matrices without a second copy; load with dtype='bfloat16'"
            )
        place = pick_device(device)
        kind = pick_dtype(dtype, place)
        folder, commit = find_folder(name, revision)
        return cls(*read(folder, name, kind, place), name=name, revision=commit)

    def __repr__(self) -> str:
        return (
            f"SteeringModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format, also that of the residual stream."""
        return self.hf.model.embed_tokens.weight.dtype

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of the configuration and of a sample of every weight matrix."""
        digest = hashlib.sha256(repr(sorted(self.hf.config.to_diff_dict().items())).encode())
        for weight in self.hf.parameters():
            sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // 64)][:64]
            digest.update(sample.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, site: Site, width: int) -> None:
        """Whether a vector of that width fits at a site of this model.

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

    # --- text ---------------------------------------------------------------------------------

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: the list of `generation_config`, else the tokenizer's."""
        told = self.hf.generation_config.eos_token_id
        if told is None:
            told = self.tokenizer.eos_token_id
        if told is None:
            return ()
        return tuple(told) if isinstance(told, list) else (int(told),)

    def encode(self, prompt: Prompt) -> Encoded:
        """Tokens of a text, or of a chat under the model's template with one BOS.

        A chat that ends with an assistant message is left open after it, to be continued.

        Raises:
            RequestError: the prompt is empty or longer than the context, or the model has no
                chat template.
        """
        if isinstance(prompt, str):
            spans = [(0, len(prompt))]
            text, begins, special = prompt, None, True
        else:
            text, spans = self._render(prompt)
            begins = spans[-1][0] if prompt[-1][0] == "assistant" else None
            special = False  # the template's text holds BOS already
        if not "".join(text[start:end] for start, end in spans).strip():
            raise RequestError("the prompt is empty")
        tokens = self.tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids = tuple(tokens["input_ids"])
        if len(ids) >= self.n_ctx:
            raise RequestError(
                f"the prompt is {len(ids)} tokens long and the context of {self.name} holds "
                f"{self.n_ctx}, the answer included"
            )
        special_ids = set(self.tokenizer.all_special_ids)
        content = tuple(
            token not in special_ids
            and begin < end
            and any(begin < stop and start < end for start, stop in spans)
            for token, (begin, end) in zip(ids, tokens["offset_mapping"], strict=True)
        )
        answer = None
        if begins is not None:
            ends = [end for _, end in tokens["offset_mapping"]]
            answer = next((i for i, end in enumerate(ends) if end > begins), None)
        return Encoded(ids, content, answer)

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, and where in it each message's own content stands."""
        if not messages:
            raise RequestError("the prompt is empty")
        if not self.is_chat:
            raise RequestError(f"{self.name} has no chat template; give the prompt as plain text")

        def applied(contents: Sequence[str]) -> str:
            turns = [
                {"role": role, "content": content}
                for (role, _), content in zip(messages, contents, strict=True)
            ]
            opened = messages[-1][0] == "assistant"
            try:
                return str(
                    self.tokenizer.apply_chat_template(
                        turns,
                        tokenize=False,
                        add_generation_prompt=not opened,
                        continue_final_message=opened,
                    )
                )
            except Exception as error:  # jinja's own errors, for instance for a wrong role
                raise RequestError(f"the chat template refuses these messages: {error}") from error

        text = applied([content for _, content in messages])
        # Rendering once more with marks for contents leaves the template's own pieces between
        # them; the contents stand in the gaps, however often their words occur elsewhere.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = applied(marks)
        spans, cursor = [], 0
        for mark, (_, content) in zip(marks, messages, strict=True):
            before, _, marked = marked.partition(mark)
            start = cursor + len(before)
            shown = next((c for c in (content, content.strip()) if text.startswith(c, start)), None)
            if shown is None or text[cursor:start] != before:
                raise RequestError("the chat template rewrites messages; give plain text instead")
            spans.append((start, start + len(shown)))
            cursor = start + len(shown)
        return text, spans

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    # --- the forward pass, a block at a time ----------------------------------------------------

    def embed(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before block 0."""
        out: Tensor = self.hf.model.embed_tokens(ids)
        return out

    def rotary(
        self, x: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_head"], Float[Tensor, "batch pos d_head"]]:
        """Cosines and sines of the rotary embedding at absolute positions."""
        cos, sin = self.hf.model.rotary_emb(x, position_ids=positions)
        return cos, sin

    def block(
        self,
        layer: int,
        x: Float[Tensor, "batch pos d_model"],
        rotary: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "#batch 1 pos key_pos"] | None,
        cache: object = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """One block. `mask` is True where a query may look; None means plain causal.

        `cache` needs one method, `update(keys, values, layer)`, which returns the keys and values
        to attend to.
        """
        out: Tensor = self.hf.model.layers[layer](
            x, attention_mask=mask, position_embeddings=rotary, past_key_values=cache
        )
        return out

    def unembed(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Final norm and unembedding: logits of a residual stream after the last block."""
        out: Tensor = self.hf.lm_head(self.hf.model.norm(x))
        return out

    @contextmanager
    def inside(self, changes: dict[tuple[str, int], Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Passes `attn_out`, `mlp_out` `[batch pos d_model]` or `z` `[batch pos head d_head]` of
        the named (component, layer) through a function, until the block ends, however it ends.
        """
        handles = []
        try:
            for (component, layer), change in changes.items():
                block = self.hf.model.layers[layer]
                if component == "attn_out":
                    handles.append(
                        block.self_attn.register_forward_hook(
                            lambda _m, _i, out, change=change: (change(out[0]), *out[1:])
                        )
                    )
                elif component == "mlp_out":
                    handles.append(
                        block.mlp.register_forward_hook(
                            lambda _m, _i, out, change=change: change(out)
                        )
                    )
                elif component == "z":
                    handles.append(
                        block.self_attn.o_proj.register_forward_pre_hook(
                            lambda _m, i, change=change: (
                                change(i[0].unflatten(-1, (self.n_heads, self.d_head))).flatten(-2),
                            )
                        )
                    )
                else:
                    raise ValueError(f"{component} lies between blocks, not inside one")
            yield
        finally:
            for handle in handles:
                handle.remove()

    def residuals(
        self, encoded: Sequence[Encoded]
    ) -> Iterator[tuple[int, Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]]]:
        """One unsteered pass over prompts as one right-padded batch: yields (layer, resid_post,
        which positions are real) block by block, so that all layers need the memory of one.
        The stream before block 0 comes first, as layer -1.
        """
        longest = max(len(one.ids) for one in encoded)
        ids = torch.zeros(len(encoded), longest, dtype=torch.long)
        real = torch.zeros(len(encoded), longest, dtype=torch.bool)
        for row, one in enumerate(encoded):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            real[row, : len(one.ids)] = True
        ids, real = ids.to(self.device), real.to(self.device)
        with torch.no_grad():  # right padding comes after every real token: plain causal is right
            x = self.embed(ids)
            rotary = self.rotary(x, torch.arange(longest, device=self.device)[None])
            yield -1, x, real
            for layer in range(self.n_layers):
                x = self.block(layer, x, rotary, None)
                yield layer, x, real

    # --- the second view ------------------------------------------------------------------------

    @cached_property
    def hooked(self) -> "HookedTransformer":
        """The same weights as a TransformerLens HookedTransformer, built on first use.

        Its basis is the checkpoint's own (nothing folded, nothing centred), so that activations
        and directions mean the same in both views.
        """
        import copy
        import warnings

        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_llama_weights

        config, rope = self.hf.config, self.hf.config.rope_parameters
        fields: dict[str, Any] = {
            "model_name": self.name or "llama",
            "original_architecture": "LlamaForCausalLM",
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_head": self.d_head,
            "d_mlp": config.intermediate_size,
            "d_vocab": self.d_vocab,
            "n_ctx": self.n_ctx,
            "n_key_value_heads": None if self.n_kv_heads == self.n_heads else self.n_kv_heads,
            "eps": config.rms_norm_eps,
            "act_fn": config.hidden_act,
            "normalization_type": "RMS",
            "final_rms": True,
            "gated_mlp": True,
            "positional_embedding_type": "rotary",
            "rotary_adjacent_pairs": False,
            "rotary_dim": self.d_head,
            "rotary_base": rope["rope_theta"],
            "tie_word_embeddings": bool(config.tie_word_embeddings),
            "dtype": self.dtype,
            "device": str(self.device),
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
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # version 3 is pinned, see pyproject
            settings = HookedTransformerConfig.from_dict(fields)
            with torch.device("meta"):  # no second set of weights, not even for a moment
                hooked = HookedTransformer(settings, move_to_device=False)
        with torch.no_grad():
            state = convert_llama_weights(self.hf, settings)
            hooked.load_state_dict(state, strict=False, assign=True)
            first = hooked.blocks[0].attn
            sin, cos = first.calculate_sin_cos_rotary(
                self.d_head,
                min(self.n_ctx, first.ROTARY_INITIAL_CACHE_SIZE),
                base=rope["rope_theta"],
                dtype=self.dtype,
            )
            for block in hooked.blocks:  # small buffers, shared by all blocks
                block.attn.mask = torch.empty((0, 0), dtype=torch.bool, device=self.device)
                block.attn.IGNORE = torch.tensor(-torch.inf, device=self.device)
                block.attn.rotary_sin, block.attn.rotary_cos = (
                    sin.to(self.device),
                    cos.to(self.device),
                )
        left = [name for name, p in hooked.named_parameters() if p.device.type == "meta"]
        if left:
            raise RunError(f"this TransformerLens left {left[0]} without weights; expected 3.9")
        tokenizer = copy.deepcopy(self.tokenizer)
        # TransformerLens loads the tokenizer again, by name, unless this says that it adds BOS
        tokenizer.init_kwargs["add_bos_token"] = True
        hooked.set_tokenizer(tokenizer, default_padding_side="left")
        hooked.cfg.default_prepend_bos = bool(self.tokenizer("")["input_ids"])
        return hooked.eval()
