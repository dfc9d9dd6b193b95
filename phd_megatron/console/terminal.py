"""How this program speaks, and how it listens; a rank speaks through its runtime's ``log``, which is :func:`say`.

:func:`show` prints what a command is asked for. Where that cannot be written the command has failed, and
``cli/main.py`` ends it with a message and exit code 2. :func:`say` is a line of the log of what works for long: where
nobody can see it any more, since the terminal or the log's disk is lost, the run goes on to its checkpoint.
:func:`warn` is for standard error, and never fails. Modules that others may use without this program warn through
Python's ``logging``, which a command hears (:func:`hearing`).
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from phd_megatron.errors import UserError

#: there is no room for what is written: of the disk, a quota, a limit on file sizes; or the disk does not answer
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_told = False


def lose_terminal() -> None:
    """Send output that goes to a terminal nowhere from now on, since writing to a lost one fails. Files stay."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if _is_terminal(descriptor):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


def show(text: str = "", *, now: bool = False) -> None:
    """Print a result; ``now`` does not keep it until there is more.

    Raises:
        OSError: it cannot be written.
    """
    print(text, flush=now)


def show_part(text: str) -> None:
    """Print a piece of a result at once, without the end of a line.

    Raises:
        OSError: it cannot be written.
    """
    print(text, end="", flush=True)


def ask(prompt: str) -> str | None:
    """A line of standard input, without its end; None where there are no more. Only a person is shown the prompt.

    Bytes of a pipe that are no UTF-8 become lone surrogates, as in the words of a command line.

    Raises:
        UserError: a person's line is no UTF-8.
    """
    if not is_asked():
        line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape")
        return line.rstrip("\r\n") if line else None
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` the arrow keys
    try:
        return input(prompt)
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"the line is no valid UTF-8 ({error.reason}); type it again") from error


def is_asked() -> bool:
    """Whether standard input is a person at a terminal."""
    return sys.stdin.isatty()


def say(message: str) -> None:
    """Print a line. Where the terminal was lost a moment ago, or its disk is full, that is no reason to end.

    Without room the line is lost, which stderr is told once, and later lines appear when there is room again.
    """
    global _told
    try:
        print(message, flush=True)
    except OSError as error:
        if _is_terminal(1):
            lose_terminal()
            with suppress(OSError):
                sys.stdout.flush()  # what is left of the line
        elif has_no_room(error):
            drop_unwritten(sys.stdout)
            if not _told:
                _told = True
                warn(f"warning: standard output cannot be written ({error.strerror}); lines are lost, the work goes on")
        else:
            raise


def warn(message: str) -> None:
    """Print a line on stderr, if it can be written."""
    try:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        drop_unwritten(sys.stderr)


@contextmanager
def hearing() -> Iterator[None]:
    """What our modules tell ``logging`` is said by :func:`warn` inside, unless somebody has set ``logging`` up."""
    import logging

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not logging.getLogger().handlers:
                warn(self.format(record))

    logger, handler = logging.getLogger("phd_megatron"), Said(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def has_no_room(error: BaseException) -> bool:
    """Whether an error is that nothing more can be written there."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM


def unwritable(failed: bool = False) -> OSError | None:
    """Why there is no room for standard output; what it and standard error still hold is written, or let go.

    Args:
        failed: a write of one of them did, so either is an answer; an empty line is tried, since where they have no
            buffer nothing is left of what failed.

    Raises:
        OSError: output cannot be written for another reason, such as a reader that is gone.
    """
    found = None
    for stream in filter(None, (sys.stderr, sys.stdout)):
        try:
            if failed:
                stream.write("\n")
            stream.flush()
        except OSError as error:
            if stream is sys.stdout and not has_no_room(error):
                raise
            drop_unwritten(stream)
            if failed or stream is sys.stdout:
                found = error
    return found


def drop_unwritten(stream: TextIO) -> None:
    """Let go of what a stream still holds, or it would fail again with each line and at the interpreter's end."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        kept, null = os.dup(number), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, number)
            stream.flush()
        finally:
            os.dup2(kept, number)
            os.close(kept)
            os.close(null)


def _is_terminal(descriptor: int) -> bool:
    """Also of a terminal that was hung up, which does not answer as one any more."""
    try:
        return os.isatty(descriptor) or os.readlink(f"/proc/self/fd/{descriptor}").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False
