"""What a checked request becomes: rows for the engine, and the replies that are made of what these deliver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from phd_megatron.serving.limits import Limits
from phd_megatron.serving.refusals import Refusal
from phd_megatron.serving.replies import Answer, Replies
from phd_megatron.serving.requests import ChatRequest, CompletionRequest
from phd_megatron.serving.row import Piece, Row
from phd_megatron.serving.served import Served

#: tokens of a completion whose request does not say how many, as OpenAI has it
_DEFAULT_TOKENS = 16
Deliver = Callable[[int, Piece], None]


@dataclass(frozen=True)
class Job:
    """A request in work: a row and an answer for each choice, in order."""

    rows: list[Row]
    answers: list[Answer]
    replies: Replies
    streams: bool
    tells_usage: bool


def job_of(
    request: CompletionRequest | ChatRequest, served: Served, limits: Limits, deliver: Callable[[int, Piece], None]
) -> Job:
    """Read the request's texts and make its rows; takes as long as the tokenizer does.

    Args:
        deliver: takes the number of a choice and a piece of it, on the engine's thread.

    Raises:
        Refusal: a text cannot be read, or is too long.
    """
    if request.model != served.name:
        raise Refusal(
            f"model={request.model[:200]!r} is not served here; this server has {served.name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    chat = isinstance(request, ChatRequest)
    texts, echoes = _prompts(request, served)
    if (count := len(texts) * request.choices) > limits.rows:
        raise Refusal(
            f"{len(texts)} prompt(s) with n={request.choices} are {count} answers, more than the {limits.rows} that "
            "this server runs and lets wait; ask for them in several requests",
            param="n",
        )
    alternatives, every = _told(request)
    rows, answers = [], []
    for number, (prompt, echo) in enumerate(zip(texts, echoes, strict=True)):
        most = _max_tokens(request, len(prompt), limits)
        for index in range(request.choices):
            place = number * request.choices + index
            answers.append(Answer(prompt, echo))
            rows.append(
                Row(
                    prompt,
                    request.choice(index, served.vocabulary, alternatives),
                    max_tokens=most,
                    stops=request.stops,
                    ends=served.ends,
                    decode=served.decode,
                    deliver=_to(deliver, place),
                    tell_prompt=every,
                )
            )
    replies = Replies(served, chat=chat, alternatives=alternatives, echo=every, choices=request.choices)
    return Job(rows, answers, replies, bool(request.stream), request.tells_usage)


def _told(request: CompletionRequest | ChatRequest) -> tuple[int | None, bool]:
    """How many likeliest tokens are told, None for no probabilities at all; and whether those of the prompt are."""
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if request.logprobs else None, False
    return request.logprobs, bool(request.echo) and request.logprobs is not None


def _to(deliver: Deliver, place: int) -> Callable[[Piece], None]:
    return lambda piece: deliver(place, piece)


def _prompts(request: CompletionRequest | ChatRequest, served: Served) -> tuple[list[tuple[int, ...]], list[str]]:
    """Tokens of each prompt, and the text that its answers repeat."""
    if isinstance(request, ChatRequest):
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        return [served.conversation(messages)], [""]
    prompts = [served.tokens_of(one) if isinstance(one, str) else served.checked(one) for one in request.prompts]
    if not request.echo:
        return prompts, [""] * len(prompts)
    echoes = [
        one if isinstance(one, str) else served.text_of(tokens)
        for one, tokens in zip(request.prompts, prompts, strict=True)
    ]
    return prompts, echoes


def _max_tokens(request: CompletionRequest | ChatRequest, prompt: int, limits: Limits) -> int:
    """Tokens of an answer behind a prompt of so many.

    Raises:
        Refusal: together they are too long.
    """
    chat = isinstance(request, ChatRequest)
    asked = request.most if isinstance(request, ChatRequest) else request.max_tokens
    room = limits.max_model_len - prompt
    wanted = 1 if asked is None else asked
    if wanted > room:
        raise Refusal(
            f"the prompt has {prompt:,} tokens and the answer at least {wanted:,}: {prompt + wanted:,}, and this "
            f"server computes at most {limits.max_model_len:,}; shorten the prompt or lower max_tokens",
            param="max_tokens" if asked is not None and room > 0 else "prompt",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return room if chat else min(_DEFAULT_TOKENS, room)
