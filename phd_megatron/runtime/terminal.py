"""Output that nobody can see any more: a run that loses its terminal goes on to its checkpoint."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def lose_terminal() -> None:
    """Send output that goes to a terminal nowhere from now on, since writing to a lost one fails. Files stay."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if _is_terminal(descriptor):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


def say(message: str) -> None:
    """Print a line; where the terminal was lost a moment ago, that is no reason to end."""
    try:
        print(message, flush=True)
    except OSError:
        if not _is_terminal(1):
            raise
        lose_terminal()
        with suppress(OSError):
            sys.stdout.flush()  # what is left of the line


def _is_terminal(descriptor: int) -> bool:
    """Also of a terminal that was hung up, which does not answer as one any more."""
    try:
        return os.isatty(descriptor) or os.readlink(f"/proc/self/fd/{descriptor}").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False
