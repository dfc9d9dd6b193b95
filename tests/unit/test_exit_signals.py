"""Why and when a run stops by itself (one rank; the agreement between ranks is in tests/distributed)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from phd_megatron.training import signals
from phd_megatron.training.signals import ExitController

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def survive(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that fails must not end the suite: a signal that is not taken over does nothing, a second one neither."""
    monkeypatch.setattr(signals, "_ONE_PRESS_SECONDS", 3600.0)
    before = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_remembered_and_named(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with ExitController() as exits:
        assert exits.should_exit(1) is None
        os.kill(os.getpid(), number)
        assert exits.should_exit(2) == f"received {number.name}"
        os.kill(os.getpid(), number)  # the same key press, delivered twice
    assert signal.getsignal(number) == before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ExitController() as exits:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "else it may end this process"
            os.kill(os.getpid(), signal.SIGHUP)
            assert exits.should_exit(1) is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_interval_counts_the_steps_of_this_start() -> None:
    exits = ExitController(exit_interval=10, first_iteration=95)
    assert [step for step in range(95, 120) if exits.should_exit(step)] == [105, 115]
    assert exits.should_exit(105) == "reached exit_interval = 10"


def test_exit_duration() -> None:
    exits = ExitController(exit_duration_in_mins=2, started=time.monotonic() - 1)
    assert exits.should_exit(1) is None
    exits = ExitController(exit_duration_in_mins=2, started=time.monotonic() - 121)
    assert exits.should_exit(1) == "ran for exit_duration_in_mins = 2"


PROGRAM = """
import os, signal, sys, time
from phd_megatron.training import signals
signals._ONE_PRESS_SECONDS = 0.05
with signals.ExitController():
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")  # Python drops a signal that arrives while it is still forking
        time.sleep(600)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM, "a child dies of the signal as usual"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    print("not reached", flush=True)
"""


def test_second_signal_ends_at_once_and_children_keep_the_default() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout == "still here\n"
