"""A signal that asks a command to end lets it clean up first: what it was writing into vanishes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: commands that write into temporary places; pretrain and sweep save what they have, and so do it themselves
CLEAN_UP = frozenset({"prepare", "export", "import", "average", "generate", "evaluate", "parity", "bench"})


_SOON = 0.01  #: seconds, after which what could not be raised is tried again


@contextmanager
def clean_stop() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind through the clean-up, and end with 128 + their number; Ctrl-C as ever.

    Not under torchrun, whose ranks wait for each other in calls that no handler can leave, and which asks before it
    kills; nor for a signal that is ignored already (nohup).
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            came.append(number)
            signal.default_int_handler(number, frame)
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
        came.append(number)
        raise SystemExit(128 + number)

    def not_raised(lost: sys.UnraisableHookArgs) -> None:
        """A ``__del__`` or a callback of the garbage collector was at work: Python forgets what is raised there."""
        if not came or not isinstance(lost.exc_value, (SystemExit, KeyboardInterrupt)):
            hook(lost)
            return
        number = came.pop()
        signal.signal(number, stop)
        again = threading.Timer(_SOON, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    before, hook = {}, sys.unraisablehook
    if threading.current_thread() is threading.main_thread() and os.environ.get("WORLD_SIZE", "1") == "1":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    if before:
        sys.unraisablehook = not_raised
    try:
        yield
    except Exception:
        # Libraries catch everything around their own work: torch's checkpoint reader makes an error of its own of it.
        if not came:
            raise
        raise (KeyboardInterrupt if came[0] == signal.SIGINT else SystemExit(128 + came[0])) from None
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
