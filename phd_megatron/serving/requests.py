"""What a request may say; whatever else it says is refused by name, since no option is ignored."""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Len
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from phd_megatron.config.plain import Plain
from phd_megatron.errors import shown
from phd_megatron.huggingface.generation import LEAST_TEMPERATURE, MOST_TOKENS
from phd_megatron.serving.refusals import Refusal
from phd_megatron.serving.sampling import Choice

MOST_ALTERNATIVES = 20
#: fields of OpenAI's that have no effect with these values, and why others are refused
_REFUSED: dict[str, tuple[tuple[Plain, ...], str]] = {
    "best_of": ((None, 1), "answers are not ranked; ask for n and choose among them"),
    "suffix": ((None,), "the model continues a text and does not fill in the middle of one"),
    "tools": ((None, []), "calls of tools are not read out of the answer; describe the tools in a message"),
    "tool_choice": ((None, "none"), "calls of tools are not read out of the answer; describe the tools in a message"),
    "functions": ((None, []), "calls of functions are not read out of the answer; describe them in a message"),
    "function_call": ((None, "none"), "calls of functions are not read out of the answer; describe them in a message"),
    "response_format": ((None, {"type": "text"}), "the answer is not held to a format; ask for it in a message"),
    "modalities": ((None, ["text"]), "the model writes text alone"),
    "audio": ((None,), "the model writes text alone"),
    "prediction": ((None,), "there is no decoding by predicted text"),
    "reasoning_effort": ((None,), "the model has no levels of reasoning"),
    "web_search_options": ((None,), "the server searches nowhere"),
    "store": ((None, False), "nothing is stored"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class StreamOptions(_Strict):
    """Of a stream."""

    include_usage: bool | None = None


_Penalty = Annotated[float, Ge(-2), Le(2)]
_Count = Annotated[int, Ge(1), Le(MOST_TOKENS)]


class _Request(_Strict):
    """What completions and chats have in common."""

    model: str
    temperature: Annotated[float, Ge(0), Le(2)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    n: Annotated[int, Ge(1), Le(1024)] | None = None
    stop: str | Annotated[list[str], Len(0, 4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Ge(-(2**63)), Le(2**63 - 1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Ge(-100), Le(100)]] | None = None

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse what single fields cannot say.

        Raises:
            Refusal: naming the field.
        """
        if self.temperature is not None and 0 < self.temperature < LEAST_TEMPERATURE:
            raise Refusal(
                f"temperature={self.temperature}: logits over it would be infinite; use 0 for the likeliest token, or "
                f"at least {LEAST_TEMPERATURE}",
                param="temperature",
            )
        if "" in self.stops:
            raise Refusal("stop: an empty text is everywhere; leave it out", param="stop")
        if self.stream_options is not None and not self.stream:
            raise Refusal("stream_options without stream: it has no effect; leave it out", param="stream_options")

    def biases(self, vocabulary: int) -> dict[int, float]:
        """``logit_bias`` by token.

        Raises:
            Refusal: a name that is no token of the vocabulary.
        """
        found = {}
        for name, value in (self.logit_bias or {}).items():
            if not (name.isascii() and name.isdigit() and len(name) < 20 and int(name) < vocabulary):
                raise Refusal(
                    f"logit_bias has {shown(name)}: it must be a token's number, 0 to {vocabulary - 1}",
                    param="logit_bias",
                )
            found[int(name)] = value
        return found

    def choice(self, index: int, vocabulary: int, alternatives: int | None) -> Choice:
        """How tokens of the answer with this number are chosen; each has a seed of its own."""
        return Choice(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.biases(vocabulary),
            alternatives=alternatives,
        )


class CompletionRequest(_Request):
    """Of ``/v1/completions``: texts to continue."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Ge(0), Le(MOST_TOKENS)] | None = None
    logprobs: Annotated[int, Ge(0), Le(MOST_ALTERNATIVES)] | None = None
    echo: bool | None = None

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise Refusal("max_tokens=0: nothing would be answered; use at least 1, or echo", param="max_tokens")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each text."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [part for part in self.prompt if isinstance(part, str)]
        lists = [part for part in self.prompt if isinstance(part, list)]
        return texts or lists or [[part for part in self.prompt if isinstance(part, int)]]


class Part(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        """Its parts together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """Of ``/v1/chat/completions``: a conversation to go on with."""

    messages: Annotated[list[Message], Len(1, 10_000)]
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Ge(0), Le(MOST_ALTERNATIVES)] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal("top_logprobs without logprobs: it has no effect; set logprobs", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise Refusal("max_tokens and max_completion_tokens say the same; give one of them", param="max_tokens")

    @property
    def most(self) -> int | None:
        """Tokens of an answer, at most; None for all there is room for."""
        return self.max_tokens or self.max_completion_tokens


_R = TypeVar("_R", bound=_Request)


def parsed(kind: type[_R], body: bytes) -> _R:
    """The request in a body.

    Raises:
        Refusal: it is no JSON object, a field is unknown or has no effect here, or a value cannot be.
    """
    try:
        content: Plain = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON ({error}); send a JSON object") from error
    if not isinstance(content, dict):
        raise Refusal(f"the body is {shown(content)}; send a JSON object")
    for name, (neutral, why) in _REFUSED.items():
        if name in content:
            value = content.pop(name)
            if not any(type(value) is type(other) and value == other for other in neutral):
                raise Refusal(f"{name}={shown(value)} is not available: {why}, and leave {name} out", param=name)
    try:
        request = kind.model_validate(content)
    except ValidationError as error:
        raise _explained(kind, error.errors(include_url=False)[0]) from None
    request.check()
    return request


_UNIONS = {
    "prompt": "it must be a text, a list of texts, a list of tokens, or a list of lists of tokens",
    "stop": "it must be a text, or a list of at most 4",
    "content": "a message's content must be a text, or a list of parts of type text",
}


def _explained(kind: type[_Request], found: ErrorDetails) -> Refusal:
    place = [str(word) for word in found["loc"]]
    name, value = place[0], shown(found["input"])
    if found["type"] == "extra_forbidden" and len(place) == 1:
        fields = sorted(kind.model_fields)
        near = difflib.get_close_matches(name[:80], fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(fields)}"
        return Refusal(f"unknown field {shown(name)}, and nothing is ignored; {hint}", param=name[:80])
    if found["type"] == "missing":
        return Refusal(f"{'.'.join(place)} is not given; it is needed", param=name)
    for union, what in _UNIONS.items():
        if union in place:
            return Refusal(f"{union}={value}: {what}", param=name)
    said = found["msg"][:1].lower() + found["msg"][1:]
    return Refusal(f"{'.'.join(place)[:200]}={value}: {said}; correct it, or leave it out", param=name)
