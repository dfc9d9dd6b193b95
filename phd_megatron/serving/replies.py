"""The JSON of OpenAI's answers: whole ones, and the chunks of a stream."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from phd_megatron.config.plain import Json, Plain
from phd_megatron.serving.row import Piece
from phd_megatron.serving.sampling import Told
from phd_megatron.serving.served import Served


@dataclass
class Answer:
    """One choice of a reply, as far as it came.

    Attributes:
        echo: the prompt's text, where the answer repeats it.
        prompt: the prompt's tokens.
    """

    prompt: tuple[int, ...]
    echo: str = ""
    text: str = ""
    told: list[Told] = field(default_factory=list)
    before: tuple[Told, ...] = ()
    finish: str | None = None
    tokens: int = 0
    opened: bool = False  # a chunk of it was made

    def add(self, piece: Piece) -> None:
        """What came."""
        self.text += piece.text
        self.told += piece.told
        self.before += piece.prompt
        self.finish, self.tokens = piece.finish, piece.tokens


class Replies:
    """Replies to one request.

    Args:
        chat: of ``/v1/chat/completions``, else of ``/v1/completions``.
        alternatives: how many likeliest tokens are told; None tells no probabilities.
        choices: answers to each prompt.
    """

    def __init__(self, served: Served, *, chat: bool, alternatives: int | None, echo: bool, choices: int) -> None:
        self._served, self._chat, self._alternatives, self._echo, self._choices = (
            served,
            chat,
            alternatives,
            echo,
            choices,
        )
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answers: Sequence[Answer]) -> Json:
        """The reply of a request that is no stream."""
        choices: list[Plain] = [self._choice(index, answer) for index, answer in enumerate(answers)]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage(answers)}

    def opening(self, index: int) -> Json | None:
        """The first chunk of a choice, where there is one before its text."""
        if not self._chat:
            return None
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunk(self, index: int, answer: Answer, piece: Piece, usage: bool) -> Json:
        """What is new of a choice; ``answer`` has it already, and ``usage`` says whether a later chunk has that."""
        first, answer.opened = not answer.opened, True
        part = Answer(
            answer.prompt, answer.echo if first else "", piece.text, list(piece.told), piece.prompt, piece.finish
        )
        choice = self._choice(index, part, answer, first)
        return self._chunk(choice, usage)

    def closing(self, answers: Sequence[Answer]) -> Json:
        """The last chunk of a stream that tells usage."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self._usage(answers)}

    def _chunk(self, choice: Json, usage: bool = False) -> Json:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head(kind), "choices": [choice], **({"usage": None} if usage else {})}

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._served.name}

    def _usage(self, answers: Sequence[Answer]) -> Json:
        read = sum(len(answer.prompt) for answer in answers[:: self._choices])
        written = sum(answer.tokens for answer in answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _choice(self, index: int, answer: Answer, whole: Answer | None = None, first: bool = True) -> Json:
        """``answer`` is the part that is told, all of it unless ``whole`` is given."""
        logprobs: Plain = None
        if self._alternatives is not None:
            logprobs = (
                self._chat_logprobs(answer.told) if self._chat else self._logprobs(answer, whole or answer, first)
            )
        if not self._chat:
            text = answer.echo + answer.text
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish}
        if whole is None:
            said: Json = {"message": {"role": "assistant", "content": answer.text}}
        else:
            said = {"delta": {"content": answer.text} if answer.text or not answer.finish else {}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": answer.finish}

    def _chat_logprobs(self, told: Sequence[Told]) -> Json:
        content: list[Plain] = [
            {
                **self._named(each.token, each.logprob),
                "top_logprobs": [self._named(token, logprob) for token, logprob in self._likeliest(each)],
            }
            for each in told
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> Json:
        name, is_text = self._served.token_name(token)
        return {"token": name, "logprob": logprob, "bytes": list(name.encode()) if is_text else None}

    def _likeliest(self, told: Told) -> Sequence[tuple[int, float]]:
        return told.likeliest[: self._alternatives]

    def _logprobs(self, answer: Answer, whole: Answer, first: bool) -> Json:
        def name(token: int) -> str:
            return self._served.token_name(token)[0]

        tokens: list[Plain] = []
        values: list[Plain] = []
        likeliest: list[Plain] = []
        offsets: list[Plain] = []
        if self._echo and first:
            tokens += [name(token) for token in answer.prompt]
            offsets += self._served.offsets(answer.prompt)
            values.append(None)
            likeliest.append(None)
        for told in itertools.chain(answer.before, answer.told):
            values.append(told.logprob)
            likeliest.append({name(token): logprob for token, logprob in self._with_own(told)})
        for told in answer.told:
            tokens.append(name(told.token))
            offsets.append(len(whole.echo) + told.offset)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": likeliest, "text_offset": offsets}

    def _with_own(self, told: Told) -> list[tuple[int, float]]:
        """The likeliest tokens, and the chosen one where it is none of them."""
        pairs = list(self._likeliest(told))
        return pairs if told.token in dict(pairs) else [*pairs, (told.token, told.logprob)]
