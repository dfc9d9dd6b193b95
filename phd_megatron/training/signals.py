"""When a run stops by itself: signals, the allowed time, the exit interval. Every rank takes the same decision."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from phd_megatron.console.terminal import lose_terminal
from phd_megatron.runtime import agreement

FINISHED = "finished"
"""Why a run ended that came to its end; every other reason leaves something to do."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# One Ctrl-C can reach a rank twice: from the terminal's process group and again from torchrun.
_ONE_PRESS_SECONDS = 1.0


class ExitController:
    """Asks, at each step's end, whether the run should save and stop.

    SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP (a lost terminal) on any rank ask for it; a second one more than a
    second later ends the process at once, with exit code 128 + signal. SIGHUP that is ignored (``nohup``) stays so.
    Forked children keep the default action; data-loader workers must outlive the signal until the checkpoint is
    written, so ``data/loader.py`` has them ignore it.

    Args:
        exit_duration_in_mins: stop when the run has lasted this long, counted from ``started``.
        exit_interval: stop after this many steps of this start.
        first_iteration: iteration that this start began at (0 for a fresh run).
        started: ``time.monotonic()`` of the run's start; default now.
    """

    def __init__(
        self,
        *,
        exit_duration_in_mins: float | None = None,
        exit_interval: int | None = None,
        first_iteration: int = 0,
        started: float | None = None,
    ) -> None:
        self._limit = None if exit_duration_in_mins is None else 60 * exit_duration_in_mins
        self._interval = exit_interval
        self._first_iteration = first_iteration
        self._started = time.monotonic() if started is None else started
        self._received = 0
        self._received_at = 0.0
        self._owner = os.getpid()
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        agreement.control_group()  # made now, where every rank is, not inside a step

    def install(self) -> ExitController:
        """Take over the signals; only from the main thread."""
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def uninstall(self) -> None:
        """Give the signals back to what handled them before."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:  # else somebody has decided otherwise meanwhile
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def __enter__(self) -> ExitController:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.uninstall()

    def should_exit(self, iteration: int) -> str | None:
        """Reason to stop after ``iteration`` steps, the same on all ranks, or None. Collective: every rank calls it."""
        overtime = self._limit is not None and time.monotonic() - self._started >= self._limit
        number, late = agreement.maximum([self._received, int(overtime)])
        if number:
            return f"received {signal.Signals(number).name}"
        if late:
            return f"ran for exit_duration_in_mins = {(self._limit or 0.0) / 60:g}"
        steps = iteration - self._first_iteration
        if self._interval and steps > 0 and steps % self._interval == 0:
            return f"reached exit_interval = {self._interval}"
        return None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked child inherited this handler: let the signal do what it does to a process of its own.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGHUP:
            lose_terminal()
        now = time.monotonic()
        if self._received and now - self._received_at > _ONE_PRESS_SECONDS:
            _say("second signal: leaving at once, without a checkpoint\n")
            os._exit(128 + number)
        if not self._received:
            self._received, self._received_at = number, now
            name = signal.Signals(number).name
            _say(f"received {name}: saving and stopping after this step (again: stop at once)\n")


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())


def record_stop(reason: str, local_rank: int) -> None:
    """Tell the launch script of this host why the run stopped; :data:`FINISHED` is success there.

    torchrun has one exit code for everything but success, so the reason goes into the file that ``PHD_STOP_FILE``
    names; ``launch_scripts/_torchrun.sh`` sets it and makes an exit code of it.
    """
    path = os.environ.get("PHD_STOP_FILE")
    if path and local_rank == 0:
        try:
            Path(path).write_text(f"{reason}\n", encoding="utf-8")
        except OSError as error:  # all is saved
            _say(f"warning: {path} cannot be written ({error.strerror}): the launch script does not learn the reason\n")
