"""A chat template at work: the text it makes of messages, and where their own words stand in it."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from interp_steer.errors import RequestError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from interp_steer.prompts.prompt import Message

DATE = datetime.date(2024, 7, 26)
"""What templates that ask for the date are told unless another is chosen: the date that Llama 3's
own templates fall back to. With the clock's date a prompt would change at midnight."""
_CODES = "aAbBcdDeFGhHIjmMpSTuUVwWxXyYzZ"  # of strftime
_PRIVATE = range(0xE000, 0xF900)  # characters that mean nothing, to mark contents with

_TRIES = 16  # characters by which a shortened content may seem longer than it is

Span = tuple[int, int]


def read_date(given: object) -> datetime.date | None:
    """A date, or one as text such as 2024-07-26, or None; raises RequestError for others."""
    if isinstance(given, datetime.datetime):
        return given.date()
    if given is None or isinstance(given, datetime.date):
        return given
    try:
        return datetime.date.fromisoformat(str(given))
    except ValueError:
        raise RequestError(f"date is {given!r}, expected such as {DATE}") from None


@dataclass(frozen=True)
class Rendered:
    """The text of messages under a chat template.

    Attributes:
        spans: where in it the messages' own contents stand, in order.
        located: whether those are all that it shows of them.
        begins: where the assistant's open answer begins, or None.
    """

    text: str
    spans: tuple[Span, ...]
    located: bool = True
    begins: int | None = None


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    Attributes:
        name: the model's, for messages.
        date: told to a template that asks for it; None is the template's own, or `DATE`.
    """

    tokenizer: "PreTrainedTokenizerBase"
    name: str = ""
    date: datetime.date | None = None

    @property
    def source(self) -> str:
        """The template itself; raises RequestError if there is none."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestError(f"{self.name} has no chat template; give the prompt as plain text")
        try:
            return str(self.tokenizer.get_chat_template())
        except ValueError as error:  # several by name, none of them the default
            raise RequestError(f"{self.name} has no default chat template") from error

    @property
    def told(self) -> datetime.date | None:
        """The date that it is told; None where it is not asked for."""
        try:
            source = self.source
        except RequestError:
            return None
        if "strftime_now" in source:
            return self.date or DATE
        return self.date if "date_string" in source else None

    def apply(self, messages: Sequence["Message"]) -> str:
        """The text of messages, an assistant's last one left open.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
        source, more = self.source, dict[str, Any]()
        if "strftime_now" in source and self.told:
            source = _clock(self.told) + source
        if self.date:
            more["date_string"] = self.date.strftime("%d %b %Y")
        opened = messages[-1][0] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in messages],
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=not opened,
                    continue_final_message=opened,
                    **more,
                )
            )
        except Exception as error:  # jinja's own errors, for instance for a wrong role
            raise RequestError(
                f"the chat template refuses these messages: {first_line(error)}"
            ) from error

    def render(self, messages: Sequence["Message"]) -> Rendered:
        """The text of messages, and where in it their contents stand.

        Templates trim, escape, shorten and move contents. A content counts as found where marks
        around it come out around it and change nothing else.

        Raises:
            RequestError: there is no template, it refuses the messages, it leaves one out that no
                assistant said, or the answer that is left open is empty or rewritten.
        """
        if messages[-1] == ("assistant", ""):
            raise RequestError("the assistant's answer is empty; leave it out")
        text = self.apply(messages)
        found = _Search(self, messages, text).found()
        role, content = messages[-1]
        begins = None
        if role == "assistant":
            if not text.endswith((content, content.strip() or content)):
                raise RequestError(
                    "the chat template rewrites the assistant's answer, so that it cannot be "
                    "continued; give plain text instead"
                )
            begins = len(text) - len(content if text.endswith(content) else content.strip())
        spans = [span for places in found if places for span in places]
        return Rendered(text, tuple(sorted(spans)), None not in found, begins)

    def turn_end(self) -> str:
        """What it writes after the assistant's message; "" if that cannot be told."""
        mark = chr(_PRIVATE[0])
        try:
            # a later message closes the assistant's, as a prompt's last one would stay open
            text = self.apply([("user", "a"), ("assistant", mark), ("user", mark)])
        except RequestError:
            return ""
        pieces = text.split(mark)
        return pieces[1] if len(pieces) == 3 else ""


class _Search:
    """Finds contents in a rendered text by rendering them again with marks."""

    def __init__(self, template: Template, messages: Sequence["Message"], text: str) -> None:
        self.template, self.messages, self.text = template, messages, text
        self.contents = [content for _, content in messages]
        used = {*text, *"".join(self.contents)}
        unused = (chr(code) for code in _PRIVATE if chr(code) not in used)
        self.begin, self.end = next(unused), next(unused)

    def found(self) -> list[list[Span] | None]:
        """For each message where it stands, more than once if it is repeated; None if unknown."""
        whole = {i: (0, len(content)) for i, content in enumerate(self.contents) if content}
        cores = {i: self._core(i) for i in whole if self.contents[i].strip()}
        for places in (whole, cores):
            spans = self._marked(places)
            if spans is not None and len(spans) == len(places):
                each = dict(zip(places, ([span] for span in spans), strict=True))
                return [each.get(i, []) for i in range(len(self.contents))]
        return [self._alone(i) if i in cores else [] for i in range(len(self.contents))]

    def _core(self, i: int) -> Span:
        """The content without white space at its ends."""
        content = self.contents[i]
        start = len(content) - len(content.lstrip())
        return start, start + len(content.strip())

    def _alone(self, i: int) -> list[Span] | None:
        """One message, the others unmarked."""
        start, end = self._core(i)
        core = self.contents[i][start:end]
        if spans := self._marked({i: (start, end)}):
            return spans
        # of a content that was shortened, its end or its beginning is left
        after, before = self._inserted(i, end, self.end), self._inserted(i, start, self.begin)
        if not after and not before and after is not None and before is not None:
            role = self.messages[i][0]
            if role != "assistant":
                raise RequestError(f"the chat template leaves out what the {role} says")
            return []
        if after and len(after) == 1:
            n = _common(core[::-1], self.text[: after[0]][::-1])
            if n in (0, len(core)):
                return [(after[0] - n, after[0])] if n else []
            # the template's own text may look like what it dropped
            tries = [(end - k, end) for k in range(n, max(0, n - _TRIES), -1)]
        elif before and len(before) == 1:
            n = _common(core, self.text[before[0] :])
            if n == len(core):
                return [(before[0], before[0] + n)]
            tries = [(start, start + k) for k in range(n, max(0, n - _TRIES), -1)]
        else:
            return None
        return next((spans for place in tries if (spans := self._marked({i: place}))), None)

    def _marked(self, places: Mapping[int, Span]) -> list[Span] | None:
        """What stands between marks around parts of contents; None if marking changes the text."""
        told = list(self.contents)
        for i, (start, end) in places.items():
            one = told[i]
            told[i] = one[:start] + self.begin + one[start:end] + self.end + one[end:]
        shown = self._shown(told)
        if shown is None:
            return None
        pieces = re.split(f"([{self.begin}{self.end}])", shown)
        if "".join(pieces[1::2]) != (self.begin + self.end) * (len(pieces) // 4):
            return None
        edges, cursor = [], 0
        for piece in pieces[::2]:
            cursor += len(piece)
            edges.append(cursor)
        return list(zip(edges[:-1:2], edges[1::2], strict=True))

    def _inserted(self, i: int, at: int, mark: str) -> list[int] | None:
        """Where one mark in a content comes out; None if it changes the text."""
        told = list(self.contents)
        told[i] = told[i][:at] + mark + told[i][at:]
        shown = self._shown(told)
        if shown is None:
            return None
        return [m.start() - n for n, m in enumerate(re.finditer(mark, shown))]

    def _shown(self, contents: Sequence[str]) -> str | None:
        """The text of other contents, if it is the same but for marks."""
        told = [(role, one) for (role, _), one in zip(self.messages, contents, strict=True)]
        try:
            shown = self.template.apply(told)
        except RequestError:
            return None
        plain = shown.replace(self.begin, "").replace(self.end, "")
        return shown if plain == self.text else None


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


@lru_cache(maxsize=64)
def _clock(date: datetime.date) -> str:
    """A jinja macro in place of transformers' `strftime_now`, which reads the clock.

    transformers passes no functions on to a template, so that it stands in the template itself.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    plain = {f"%{code}": midnight.strftime(f"%{code}") for code in _CODES}
    unpadded = {f"%-{code}": plain[f"%{code}"].lstrip("0") or "0" for code in "dmHIjMSyUWV"}
    return (
        "{%- macro strftime_now(format) -%}{%- set said = namespace(text=format) -%}"
        f"{{%- for code, value in {json.dumps({**unpadded, **plain})}.items() -%}}"
        "{%- set said.text = said.text | replace(code, value) -%}{%- endfor -%}"
        "{{ said.text }}{%- endmacro %}\n"
    )
