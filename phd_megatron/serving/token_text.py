"""Text of tokens that come one by one, without half a character in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: what a decoder writes for bytes that are no character, and for those of a character that is not whole yet
BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4  #: tokens of the prompt that the first piece is decoded behind: a word's leading space depends on them
_HELD = 8  #: tokens that wait for the end of a character; no character has more bytes than 4
_WINDOW = 64  #: tokens that are decoded again at each step, at most


class TokenText:
    """The text of an answer, piece by piece; together they are what its tokens decode to.

    A few last tokens are decoded again with each new one, since what a token says may depend on its neighbours.

    Args:
        decode: tokens to text, special ones left out.
        prompt: tokens before the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(prompt[-_CONTEXT:])
        said = decode(self._tokens)
        if said.endswith(BROKEN):  # it ends within a character, which is the prompt's
            self._tokens, said = [], ""
        self._said = len(said)  # characters of the window's text that were given away
        self._clean = len(self._tokens)  # tokens up to the last place where no character was open

    def take(self, token: int) -> str:
        """The text that is certain with this token; empty while a character is open."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        waiting = len(self._tokens) - self._clean
        if text.endswith(BROKEN) and len(self._tokens) < _WINDOW:
            # After so many tokens the marks are of bytes that are none of a character, but for the last one.
            whole = text.rstrip(BROKEN) if waiting < _HELD else text[:-1]
            return self._give(text[: max(len(whole), self._said)])
        piece = self._give(text)
        self._tokens = self._tokens[self._clean :]
        self._clean = len(self._tokens)
        self._said = len(self._decode(self._tokens))
        return piece

    def rest(self) -> str:
        """What was held back, when no token comes any more: half a character is a mark then."""
        return self._give(self._decode(self._tokens))

    def _give(self, text: str) -> str:
        piece = text[self._said :]
        self._said += len(piece)
        return piece
