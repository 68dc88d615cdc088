"""One set of weights seen twice: a Hugging Face module to decode with, and a HookedTransformer.

This knows nothing of steering.
"""

import datetime
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, cast

import torch

from interp_steer.errors import RequestError, note
from interp_steer.model.device import pick_device, pick_dtype, remarks
from interp_steer.model.fingerprint import Fingerprint
from interp_steer.model.forward import Forward
from interp_steer.model.loading import (
    find_folder,
    has_weights,
    read,
    refuse_unsupported,
    refuse_wrong_weights,
)
from interp_steer.model.shape import Shape
from interp_steer.model.site import Site
from interp_steer.prompts.codec import Codec, RunningText
from interp_steer.prompts.prompt import Encoded, Given, is_chat
from interp_steer.prompts.template import Template, read_date

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


class SteeringModel(Forward):
    """A Llama-architecture model with its tokenizer, in both views.

    Attributes:
        hf: the Hugging Face `LlamaForCausalLM`, whose weights decoding uses.
        tokenizer: its fast tokenizer.
        name: hub id, folder or `"starter"`, as asked for.
        revision: the hub's commit, or "" for a folder.
        date: what the chat template is told if it asks for the date; may be set.
        shape: all numbers of its shape.
        n_layers, d_model, n_heads, n_kv_heads, d_head, d_vocab, n_ctx: the same, directly.
    """

    def __init__(
        self,
        hf: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        name: str = "",
        revision: str = "",
        date: datetime.date | str | None = None,
    ) -> None:
        """Wraps a model that is already in memory, and puts it into evaluation mode.

        Raises:
            RequestError: the model is of a kind that the two views would not agree on, or is not
                what its configuration says.
            RunError: weights that are not finite.
        """
        refuse_unsupported(hf.config, name or "this model")
        refuse_wrong_weights(hf, name or "this model")
        shape = Shape.of(hf.config)
        super().__init__(hf.eval(), shape.n_layers)
        self.shape, self.tokenizer = shape, tokenizer
        self.name, self.revision = name, revision
        self._fingerprint = Fingerprint(hf)
        self._hooked: tuple[list[int], HookedTransformer] | None = None
        self.date = date
        self.d_model, self.d_head, self.d_vocab = shape.d_model, shape.d_head, shape.d_vocab
        self.n_heads, self.n_kv_heads, self.n_ctx = shape.n_heads, shape.n_kv_heads, shape.n_ctx

    @classmethod
    def load(
        cls,
        name: str | PathLike[str] = "starter",
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        date: datetime.date | str | None = None,
        weights: bool = True,
        device_map: object = None,
        quantization: object = None,
    ) -> "SteeringModel":
        """Loads `"starter"`, a folder, or a hub id such as `"meta-llama/Llama-3.1-8B-Instruct"`.

        Args:
            name: what to load; a hub id is downloaded once and later read offline.
            dtype: default bfloat16 on a GPU, float32 on a CPU; a note says so where another one is
                slower there. Converting later would break the sharing of the weights.
            device: default the first CUDA GPU if there is one, else the CPU.
            revision: the hub's branch, tag or commit.
            date: told to a chat template that asks for the date, as Llama 3.2's does; default
                2024-07-26, never the day's: prompts and keys of rows would change at midnight.
            weights: False to do without them if they are not on this machine: the model then
                encodes text and knows its shape, and refuses to compute.
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
        place = pick_device(device, here=weights)
        kind, day = pick_dtype(dtype, place), read_date(date)
        name = str(name)
        folder, commit = find_folder(name, revision, weights)
        weights = weights or has_weights(folder)
        if weights:
            place = pick_device(place)
        read_in = read(folder, name, kind, place, weights)
        model = cls(*read_in, name=name, revision=commit, date=day)
        for remark in remarks(kind, place) if weights else ():
            note(remark)
        return model

    def __repr__(self) -> str:
        return (
            f"SteeringModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device})"
        )

    def _repr_html_(self) -> str:
        from interp_steer.util.html import table

        return table(
            [
                {
                    "model": self.name, "layers": self.n_layers, "d_model": self.d_model,
                    "heads": self.n_heads, "vocabulary": self.d_vocab, "context": self.n_ctx,
                    "dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device),
                    "chat template": "yes" if self.is_chat else "none",
                }
            ]
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """A short hash of the configuration and of a sample of every weight matrix; another one
        once weights have been changed in place.

        A few numbers that were changed through `.data`, which torch does not count, are seen once
        `measured()` is called, as every study does when it begins.
        """
        return str(self._fingerprint)

    def measured(self) -> str:
        """The fingerprint after reading all weights again."""
        return self._fingerprint.anew()

    def check(self, site: Site, width: int) -> None:
        """Whether a vector of that width fits at a site of this model.

        Raises:
            RequestError: no such layer or head, or another width.
        """
        self.shape.bounds(self.name).check(site, width)

    # --- text ---------------------------------------------------------------------------------

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def date(self) -> datetime.date | None:
        """The date that the chat template is told; None where it asks for none.

        It may be set, also as text such as "2024-07-26"; None is the default, 2024-07-26.
        """
        return self._codec.template.told

    @date.setter
    def date(self, given: datetime.date | str | None) -> None:
        self._date = read_date(given)
        self.__dict__.pop("_codec", None)

    @cached_property
    def _codec(self) -> Codec:
        rows: int = self.hf.model.embed_tokens.weight.shape[0]
        template = Template(self.tokenizer, self.name, self._date)
        return Codec(self.tokenizer, template, self.n_ctx, rows)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: those of `generation_config`, the tokenizer's end of
        sequence, and the special token that the chat template writes after the assistant's turn.
        """
        told = self.hf.generation_config.eos_token_id
        known = told if isinstance(told, list) else [] if told is None else [int(told)]
        return tuple(dict.fromkeys([*known, *self._codec.ends]))

    def encode(self, prompt: object) -> Encoded:
        """Tokens of a text, or of a chat under the model's template with one BOS.

        A chat that ends with an assistant message is left open after it, to be continued.

        Raises:
            RequestError: the prompt is empty, longer than the context, or holds a token that the
                model has no embedding for; the model has no chat template, or it refuses the
                messages.
        """
        return self._codec.encode(_prompt(prompt))

    def encoded(self, ids: Sequence[int]) -> Encoded:
        """A prompt of these very tokens: no BOS is put before them, no template around them.

        Raises:
            RequestError: there is none, one that the model has no embedding for, or too many.
        """
        return self._codec.given(ids)

    def encode_after(self, prompt: object, text: str) -> tuple[int, ...]:
        """Token ids of a text that follows a prompt directly: those of both together, after those
        of the prompt. A text's own leading space counts.

        Raises:
            RequestError: as for `encode`; or the tokenizer joins the text's beginning to the
                prompt's last token, as "(" and "A" may become "(A": then no text follows this
                prompt as given.
        """
        return self._codec.after(_prompt(prompt), text)

    def parted(self, prompt: str, text: str) -> tuple[str, str]:
        """A text in two parts, moved back to where a token ends if one stands across the boundary.

        Raises:
            RequestError: as for `encode_after`, if no place near it will do.
        """
        return self._codec.parted(prompt, text)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain text of any length, as `encode` has them of a prompt."""
        return self._codec.tokens(text, plain=True)[0]

    def decode(self, ids: Sequence[int], after: object = None) -> str:
        """Text of generated tokens, without special tokens.

        Args:
            after: the prompt that they follow. What continues a text, or an answer that was begun,
                keeps its leading space; an answer that stands alone begins as the tokenizer has it.
        """
        return self._codec.decode(ids, _goes_on(after))

    def running_text(self, after: object = None) -> RunningText:
        """The text of tokens that are still to come one by one; `after` is as for `decode`."""
        return RunningText(self._codec, _goes_on(after))

    def pending(self, ids: Sequence[int]) -> bool:
        """Whether the next token may change the text of these, which end amid a character."""
        return self._codec.pending(ids)

    def decode_token(self, id: int) -> str:
        """The text of one token, its leading space included, special tokens by their names."""
        return self._codec.decode_token(id)

    # --- the second view ------------------------------------------------------------------------

    @property
    def hooked(self) -> "HookedTransformer":
        """The same weights as a TransformerLens HookedTransformer, built on first use.

        Nothing is folded or centred, so activations equal the Hugging Face module's. Direct logit
        attribution as TransformerLens's tutorials do it needs `folded()`. What would change the
        shared weights is refused. Once `hf` has moved its weights it is another one.
        """
        from interp_steer.model.hooked import hooked_view

        places = [weight.data_ptr() for weight in self.hf.parameters()]
        if self._hooked is None or self._hooked[0] != places:
            refuse_wrong_weights(self.hf, self.name or "this model")
            self._hooked = places, hooked_view(self.hf, self.shape, self.tokenizer, self.name)
        return self._hooked[1]

    def folded(self, dtype: torch.dtype | str = "float32") -> "HookedTransformer":
        """A copy as TransformerLens's tutorials expect it: the weights of every RMS norm folded
        into the matrix that reads it, the unembedding centred (which takes from each position's
        logits their mean). Its norms only divide, so contributions to the stream add up to the
        logits.

        The copy has weights of its own: 4 bytes a parameter in float32, 2 in bfloat16 (a head that
        is tied to the embeddings is a matrix of its own here), and while it is made up to twice 4.
        Nothing is kept: every call makes one.

        Args:
            dtype: of the copy; folding is done in float32 and rounded once.
        """
        from interp_steer.model.hooked import folded_copy

        kind = pick_dtype(dtype, self.device)
        return folded_copy(self.hf, self.shape, self.tokenizer, self.name, kind)


def _goes_on(after: object) -> bool:
    """Whether a text's leading space counts: it continues a text, or an answer that was begun."""
    if isinstance(after, str):
        return True
    return is_chat(after) and bool(after) and after[-1][0] == "assistant"  # type: ignore[index]


def _prompt(given: object) -> Given:
    if not isinstance(given, (str, Encoded)) and not is_chat(given):
        raise RequestError(
            f"a prompt is text, or messages as chat(...) makes them, got {str(given)[:60]!r}"
        )
    return cast(Given, given)
