"""One row of a request: its prompt, how it is continued, where it ends, and who is told."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from phd_megatron.serving.refusals import Refusal
from phd_megatron.serving.sampling import Choice, Sampler, Told
from phd_megatron.serving.stop_strings import StopStrings
from phd_megatron.serving.token_text import TokenText

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        text: that is certain now.
        told: of the tokens whose text begins in what was given so far, where probabilities are asked for.
        finish: ``stop`` or ``length`` with the last piece.
        tokens: computed so far, an end token included.
        prompt: what the model thought of the prompt's tokens, with the first piece where that is asked for; of the
            first token it thinks nothing.
        error: why the row ended without an answer.
    """

    text: str = ""
    told: tuple[Told, ...] = ()
    finish: str | None = None
    tokens: int = 0
    prompt: tuple[Told, ...] = ()
    error: Refusal | None = None

    @property
    def is_last(self) -> bool:
        """Whether none comes after."""
        return self.finish is not None or self.error is not None


class Row:
    """A prompt that is continued.

    Args:
        prompt: its tokens, at least one. Rows with one and the same tuple are computed from one prefill.
        choice: how tokens are chosen.
        max_tokens: at most so many; 0 computes the prompt alone.
        stops: texts at which it ends.
        ends: tokens at which it ends.
        decode: tokens to text.
        deliver: takes each piece, on the engine's thread, and must not wait.
        tell_prompt: with probabilities of the prompt's tokens.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        choice: Choice,
        *,
        max_tokens: int,
        stops: Sequence[str],
        ends: Collection[int],
        decode: Decode,
        deliver: Callable[[Piece], None],
        tell_prompt: bool = False,
    ) -> None:
        self.prompt, self.choice, self.tell_prompt = prompt, choice, tell_prompt
        self.sampler = Sampler(choice)
        self.cancelled = False  # set by any thread; the engine drops the row at its next step
        self.arrived = time.perf_counter()
        self.tokens = 0
        self.last = -1  # the token to go on with
        self._max_tokens, self._ends, self._deliver = max_tokens, frozenset(ends), deliver
        self._text, self._stops = TokenText(decode, prompt), StopStrings(stops)
        self._decoded = self._shown = 0  # characters of the answer, and of those that were delivered
        self._told: list[Told] = []
        self._prompt: tuple[Told, ...] = ()
        self._last_piece: Piece | None = None

    @property
    def wants_tokens(self) -> bool:
        """Whether anything is computed after the prompt."""
        return self._max_tokens > 0

    def read_prompt(self, prompt: Sequence[Told]) -> None:
        """Keep what is told of the prompt for the first piece."""
        self._prompt = tuple(prompt)

    def take(self, token: int, told: Told | None) -> bool:
        """Go on with ``token``, and deliver what is certain. Returns whether it was the last one."""
        self.tokens, self.last = self.tokens + 1, token
        self.sampler.took(token)
        if token in self._ends:
            self.finish("stop")
            return True
        if told is not None:
            self._told.append(replace(told, offset=self._decoded))
        piece = self._text.take(token)
        self._decoded += len(piece)
        certain = self._stops.take(piece)
        if self._stops.found:
            self._send(certain, "stop")
            return True
        if self.tokens == self._max_tokens:
            self._finish("length", certain)
            return True
        if certain:
            self._send(certain, None)
        return False

    def finish(self, reason: str) -> None:
        """End with what was held back; there are no more tokens, and the row is to be closed."""
        self._finish(reason, "")

    def _finish(self, reason: str, certain: str) -> None:
        certain += self._stops.take(self._text.rest())
        if self._stops.found:
            self._send(certain, "stop")
            return
        self._send(certain + self._stops.rest(), reason, everything=True)

    def close(self) -> None:
        """Deliver the last piece, once the row's place is free: whoever gets it may ask again at once."""
        if self._last_piece is not None:
            self._deliver(self._last_piece)

    def fail(self, error: Refusal) -> None:
        """Deliver why there is no answer."""
        self._deliver(Piece(error=error, tokens=self.tokens))

    def _send(self, text: str, finish: str | None, everything: bool = False) -> None:
        self._shown += len(text)
        ready = [told for told in self._told if everything or told.offset < self._shown]
        self._told = self._told[len(ready) :]
        piece, self._prompt = Piece(text, tuple(ready), finish, self.tokens, self._prompt), ()
        if finish is None:
            self._deliver(piece)
        else:
            self._last_piece = piece
