"""The one exception that users see as a message instead of a traceback, and how a message shows what it was given."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DIVERGED = "the run has diverged"
"""Start of the message when parameters are not finite any more; a sweep recognises such a member by it."""

_VALUE = 200  #: characters of a value in a message
_WORD = 400  #: of anything without a space, such as a path
_MESSAGE = 8000


class UserError(Exception):
    """A refusal: it states the value it got, why that cannot be, and what to change."""

    exit_code = 2


class RunLost(UserError):
    """A run that ended for no fault of its input: starting it again helps."""

    exit_code = 1


def raise_all(problems: list[str]) -> None:
    """Raise one ``UserError`` for all problems; return when there are none."""
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems)} problems:\n  - "
        raise UserError(head + "\n  - ".join(problems))


@contextmanager
def naming(temporary: str | os.PathLike[str], final: str | os.PathLike[str]) -> Iterator[None]:
    """A refusal from within says ``final`` where it means ``temporary``, a place that is gone when it is read."""
    try:
        yield
    except UserError as error:
        error.args = tuple(str(part).replace(str(temporary), str(final)) for part in error.args)
        raise


class _Shortened(reprlib.Repr):
    """``repr`` that looks at no more than it shows: a few lines of YAML can stand for gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 3, 8, 8, 8, 8
        self.maxstring = self.maxlong = self.maxother = _VALUE

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 4 * self.maxlong:  # Python refuses to write out very long ones
            return f"{'-' if x < 0 else ''}{hex(abs(x))[:20]}... ({x.bit_length()} bits)"
        return super().repr_int(x, level)

    def repr_str(self, x: str, level: int) -> str:
        text = super().repr_str(x, level)
        return text if len(x) <= self.maxstring else f"{text} ({len(x)} characters)"


_REPR = _Shortened()


def shell_slip(text: str) -> str | None:
    """Why a word that stands for a path or a name is none: what a shell did not do to it; None for all others."""
    if not text.strip():
        return "is empty, as a shell variable is that was never set; give a value"
    if re.match(r"~[\w.-]*(/|$)", text):
        return "begins with ~, which only a shell turns into a home directory, and none did; write the directory out"
    return None


def shown(value: Any) -> str:
    """``repr(value)`` for a message: whole where that is short, else its beginning and end."""
    text = _REPR.repr(value)
    return text if len(text) <= 2 * _VALUE else f"{text[:_VALUE]}...{text[-40:]}"


def for_terminal(message: str) -> str:
    """A message that fits a terminal: no control characters, endless words cut, and the middle of an endless text."""
    text = printable(message[: 16 * _MESSAGE])
    text = re.sub(rf"\S{{{_WORD},}}", lambda found: f"{found[0][:200]}...{found[0][-60:]}", text)
    return text if len(text) <= _MESSAGE else f"{text[: _MESSAGE // 2]}\n...\n{text[-_MESSAGE // 2 :]}"


def printable(text: str) -> str:
    """A text without control characters, which would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
