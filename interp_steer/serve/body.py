"""What a request may hold. Names and meanings are OpenAI's; what is not done here is refused."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from interp_steer.engine.row import Sampling
from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import Message
from interp_steer.util.files import parse_json

CHOICES = 16  # answers of one request
STOPS = 16
TOPS = 20  # likeliest tokens told at a position
PROMPTS = 256  # of one completion request

Body = TypeVar("Body", bound=BaseModel)
Probability = Annotated[float, Field(gt=0, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
NoList = Annotated[list[Any], Field(max_length=0)]
NoDict = Annotated[dict[str, Any], Field(max_length=0)]


class Plain(BaseModel):
    """The one form of an answer that is here."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class Options(BaseModel):
    """What both kinds of request share. Fields that nobody knows are ignored, as clients expect."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    min_p: Zero | None = None
    min_tokens: Zero | None = None
    logit_bias: NoDict | None = None
    stop_token_ids: NoList | None = None
    ignore_eos: Literal[False] | None = None
    response_format: Plain | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > STOPS:
            raise RequestError(f"{len(given)} stop texts; expected at most {STOPS}")
        return tuple(text for text in given if text)

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, tokens: int) -> Sampling:
        """OpenAI's default temperature is 1."""
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            max(0, self.top_k or 0),
            1.0 if self.repetition_penalty is None else self.repetition_penalty,
            tokens,
        )


class Part(BaseModel):
    """A part of a message; only texts are read."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class Said(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    @property
    def message(self) -> Message:
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return ("system" if self.role == "developer" else self.role, text)


class Chat(Options):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Said], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOPS)] | None = None
    tools: NoList | None = None
    functions: NoList | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        return tuple(said.message for said in self.messages)

    @property
    def top(self) -> int | None:
        """Likeliest tokens that are told; None for no probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _whole(self) -> "Chat":
        if self.stream and self.logprobs:
            raise ValueError("logprobs come with a whole answer: leave out stream or logprobs")
        return self


class Completion(Options):
    """`/v1/completions`: texts, or tokens that are taken as they are."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=TOPS)] | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Every prompt by itself."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and isinstance(given[0], int):
            return [[token for token in given if isinstance(token, int)]]
        if not 0 < len(given) <= PROMPTS:
            raise RequestError(f"{len(given)} prompts; expected 1 to {PROMPTS}")
        return [one for one in given if not isinstance(one, int)]

    @model_validator(mode="after")
    def _whole(self) -> "Completion":
        if self.stream and (self.echo or self.logprobs is not None):
            raise ValueError("echo and logprobs come with a whole answer: leave out stream")
        if not self.max_tokens and self.max_tokens is not None and not self.echo:
            raise ValueError("max_tokens 0 is for echo: true")
        return self


def read(kind: type[Body], given: Any) -> Body:
    """A checked request; raises RequestError with the field and what was expected."""
    if not isinstance(given, dict):
        raise RequestError("the body is no JSON object")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, type))
        said = str(first["msg"]).removeprefix("Value error, ")
        raise RequestError(f"{where}: {said}" if where else said) from None


async def json_of(request: Request) -> Any:
    """What a body says; raises RequestError for one that is no JSON."""
    try:
        text = (await request.body()).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError("the body is no UTF-8 text") from None
    return parse_json(text, "the body")
