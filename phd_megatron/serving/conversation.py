"""A conversation in one program, without a server between."""

from __future__ import annotations

import queue
from collections.abc import Callable

from phd_megatron.serving.engine import Engine
from phd_megatron.serving.refusals import Refusal
from phd_megatron.serving.row import Piece, Row
from phd_megatron.serving.sampling import Choice
from phd_megatron.serving.served import Served


class Conversation:
    """What was said so far. Without a chat template it is one text, which the model continues after every line.

    Args:
        system: said before everything else; needs a template.
        max_tokens: of one answer; None for all there is room for.
    """

    def __init__(
        self,
        served: Served,
        engine: Engine,
        choice: Choice,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self._served, self._engine, self._choice, self._most = served, engine, choice, max_tokens
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but not what stands before it."""
        self._messages = list(self._system)
        self._text = ""

    def say(self, line: str, write: Callable[[str], None]) -> None:
        """Answer ``line``, piece by piece through ``write``. An answer that is stopped stays as far as it came.

        Raises:
            Refusal: it cannot be answered; nothing was said then.
            KeyboardInterrupt: the user stopped the answer.
        """
        prompt = self._prompt(line)
        room = self._engine.limits.max_model_len - len(prompt)
        if room < 1:
            raise Refusal(
                f"the conversation has {len(prompt):,} tokens with this line, and the model computes at most "
                f"{self._engine.limits.max_model_len:,}; begin again with /reset"
            )
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        row = Row(
            prompt,
            self._choice,
            max_tokens=room if self._most is None else min(room, self._most),
            stops=(),
            ends=self._served.ends,
            decode=self._served.decode,
            deliver=pieces.put,
        )
        answer = ""
        self._engine.submit([row])
        try:
            while True:
                piece = pieces.get()
                if piece.error is not None:
                    raise piece.error
                answer += piece.text
                write(piece.text)
                if piece.is_last:
                    break
        except KeyboardInterrupt:
            self._keep(line, answer)
            raise
        finally:
            self._engine.cancel([row])
        self._keep(line, answer)

    def _prompt(self, line: str) -> tuple[int, ...]:
        if self._served.has_template:
            return self._served.conversation([*self._messages, {"role": "user", "content": line}])
        return self._served.tokens_of(self._text + line)

    def _keep(self, line: str, answer: str) -> None:
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        self._text += f"{line}{answer}\n"
