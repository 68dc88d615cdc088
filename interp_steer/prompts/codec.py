"""Text to a model's token ids, and back."""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import Encoded, Given, readable
from interp_steer.prompts.template import Rendered, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUTS = 16  # places where a text is tried to be parted
_TAIL = 32  # tokens that are decoded again at every new one
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a byte-fallback token


class Codec:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer, template: which.
        name: the model's, for messages.
        n_ctx: tokens that its context holds.
        n_rows: of its embedding.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Template, n_ctx: int, n_rows: int
    ) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, template.name
        self.n_ctx, self.n_rows = n_ctx, n_rows
        # rendering a chat costs a millisecond; a sweep asks for one prompt hundreds of times
        self.encode = lru_cache(maxsize=4096)(self._encode)
        self.after = lru_cache(maxsize=65536)(self._after)

    def _encode(self, prompt: Given) -> Encoded:
        """Tokens of a text, or of a chat; see `SteeringModel.encode`."""
        if isinstance(prompt, Encoded):
            return self._refused(prompt)
        contents = [prompt] if isinstance(prompt, str) else [content for _, content in prompt]
        if not "".join(contents).strip():
            raise RequestError("the prompt is empty")
        if isinstance(prompt, str):
            shown = Rendered(prompt, ((0, len(prompt)),))
        else:
            shown = self.template.render(prompt)
        ids, places = self.tokens(shown.text, plain=isinstance(prompt, str))
        self._check_length(ids)
        content = tuple(
            token not in self.special
            and begin < end
            and any(begin < stop and start < end for start, stop in shown.spans)
            for token, (begin, end) in zip(ids, places, strict=True)
        )
        answer = None
        if shown.begins is not None:
            answer = next((i for i, (_, end) in enumerate(places) if end > shown.begins), None)
        return Encoded(ids, content, answer, shown.located, shown.text)

    def given(self, ids: Sequence[int]) -> Encoded:
        """A prompt of these very tokens: nothing is put before them; special ones are no content.

        Raises:
            RequestError: there is none, or one that the model has no embedding for.
        """
        content = tuple(token not in self.special for token in ids)
        return self._refused(Encoded(tuple(ids), content, text=self._text(ids, True, special=True)))

    def _refused(self, prompt: Encoded) -> Encoded:
        if not prompt.ids:
            raise RequestError("the prompt is empty")
        for token in prompt.ids:
            if type(token) is not int or not 0 <= token < self.n_rows:
                raise RequestError(f"{token!r} is no token of {self.name}: 0-{self.n_rows - 1}")
        self._check_length(prompt.ids)
        return prompt

    def _check_length(self, ids: Sequence[int]) -> None:
        if len(ids) >= self.n_ctx:
            raise RequestError(
                f"the prompt is {len(ids)} tokens long and the context of {self.name} holds "
                f"{self.n_ctx}, the answer included"
            )

    def _after(self, prompt: Given, text: str) -> tuple[int, ...]:
        """Token ids of a text that follows a prompt; see `SteeringModel.encode_after`."""
        if not text:
            return ()
        if isinstance(prompt, Encoded):
            raise RequestError("a prompt of tokens is followed by tokens; give their ids")
        before = self.encode(prompt)
        both, _ = self.tokens(before.text + text, plain=isinstance(prompt, str))
        n = len(before.ids)
        if both[:n] != before.ids:
            at = next(i for i, (a, b) in enumerate(zip(before.ids, both, strict=False)) if a != b)
            last, joined = self.decode(before.ids[at:], True), self.decode(both[at : at + 1], True)
            raise RequestError(
                f"{text[:40]!r} does not begin where the prompt ends: the prompt's last token "
                f"{last!r} becomes {joined!r} with it; end the prompt before {last!r} and let what "
                "follows begin with it"
            )
        if len(both) == n:
            raise RequestError(f"{text[:40]!r} is no token after its prompt")
        return both[n:]

    def parted(self, prompt: str, text: str) -> tuple[str, str]:
        """A text in two, its boundary moved back to where a token ends; see `SteeringModel`."""
        whole, cuts = prompt + text, [len(prompt)]
        _, places = self.tokens(whole, plain=True)
        cuts += sorted({begin for begin, _ in places if 0 < begin < len(prompt)}, reverse=True)
        refused: RequestError | None = None
        for cut in cuts[:_CUTS]:
            try:
                self.after(whole[:cut], whole[cut:])
                return whole[:cut], whole[cut:]
            except RequestError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def tokens(self, text: str, plain: bool) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Token ids, and where in the text each stands.

        A plain text gets what the tokenizer puts before a text, but not what it puts behind one:
        an end-of-sequence token would end what is to be continued. There is one BOS at most.

        Raises:
            RequestError: a token that the model has no embedding for.
        """
        tokens = self.tokenizer(
            readable(text),
            add_special_tokens=plain,  # a template's text holds BOS already
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids, places = tuple(tokens["input_ids"]), list(tokens["offset_mapping"])
        start, end, bos = 0, len(ids), self.tokenizer.bos_token_id
        while plain and end > 1 and tokens["special_tokens_mask"][end - 1]:
            if places[end - 1][0] < places[end - 1][1]:
                break  # the text's own
            end -= 1
        while bos is not None and ids[start : start + 2] == (bos, bos):
            start += 1
        for token in ids[start:end]:
            if token >= self.n_rows:
                raise RequestError(
                    f"the text holds {self.tokenizer.convert_ids_to_tokens(token)!r}, token "
                    f"{token}, and the embedding of {self.name} has tokens 0-{self.n_rows - 1}"
                )
        return ids[start:end], places[start:end]

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of tokens that are no text."""
        added = self.tokenizer.added_tokens_decoder.items()
        marked = (i for i, token in added if token.special)
        return frozenset({*self.tokenizer.all_special_ids, *marked})

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's, and the special token that the template writes
        after what the assistant said.
        """
        found = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        if tail := self.template.turn_end():
            ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
            first = next((i for i in ids if self.decode_token(i).strip()), None)
            if first in self.special:
                found.append(int(first))
        return tuple(found)

    # --- back -----------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], follows: bool = False) -> str:
        """Text of tokens, special ones left out; see `SteeringModel.decode`."""
        return self._text(ids, follows, special=False)

    def pending(self, ids: Sequence[int]) -> bool:
        """Whether the next token may change the text of these: they end amid a character's bytes.

        Byte-fallback decoders give up all of a run of bytes if one of them makes no character.
        """
        last = str(self.tokenizer.convert_ids_to_tokens(ids[-1])) if ids else ""
        return bool(_BYTE.fullmatch(last)) or self.decode(ids[-4:], True).endswith("\ufffd")

    def decode_token(self, id: int) -> str:
        """The text of one token, its leading space included, special tokens by their names."""
        return self._text([id], True, special=True)

    def _text(self, ids: Sequence[int], follows: bool, special: bool) -> str:
        read = partial(
            self.tokenizer.decode,
            skip_special_tokens=not special,
            clean_up_tokenization_spaces=False,
        )
        if not follows:
            return str(read(list(ids)))
        # SentencePiece's decoder drops a space at the beginning: let it begin with something else
        before = str(read(self._letter))
        text = str(read([*self._letter, *ids]))
        return text.removeprefix(before) if text.startswith(before) else str(read(list(ids)))

    @cached_property
    def _letter(self) -> list[int]:
        ids: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return ids[-1:]


class RunningText:
    """The text of tokens that come one by one, as `Codec.decode` has it of all of them.

    Only the last tokens are decoded again, so that a token costs the same at the end of a long
    answer as at its beginning.
    """

    def __init__(self, codec: Codec, follows: bool) -> None:
        self._codec, self._follows = codec, follows
        self._settled, self._tail = "", list[int]()

    def add(self, id: int) -> None:
        """One more token."""
        if len(self._tail) >= _TAIL and not self.pending:
            self._settled, self._tail, self._follows = self.text, [], True
        self._tail.append(id)

    @property
    def pending(self) -> bool:
        """Whether the next token may change the text of these; see `Codec.pending`."""
        return self._codec.pending(self._tail)

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        return self._settled + self._codec.decode(self._tail, self._follows)
