"""A signal ends a command as a signal does, whatever a library made of it on its way."""

from __future__ import annotations

import os
import signal
import sys
import time
import weakref

import pytest

from phd_megatron.cli.stop import clean_stop

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


def library(number: signal.Signals) -> None:
    """As torch's checkpoint reader: everything that happens within becomes an error of its own."""
    try:
        os.kill(os.getpid(), number)
        signal.sigtimedwait([signal.SIGUSR1], 5)  # the handler has its turn here
    except BaseException as error:
        raise ValueError(f"reading failed: {error}") from error


@pytest.fixture(autouse=True)
def handlers():
    """As a program begins; a test that fails must not end the suite."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_a_library_wrapped(number):
    inside = []
    with pytest.raises(BaseException) as caught, clean_stop():
        inside.append(signal.getsignal(number))
        assert inside[0] is not signal.SIG_DFL, "else the signal ends this process"
        library(number)
    if number == signal.SIGINT:
        assert caught.type is KeyboardInterrupt
    else:
        assert caught.type is SystemExit and caught.value.code == 128 + number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler), "as before the command"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_garbage_is_collected(number):
    """What a ``__del__`` or a callback raises is forgotten, so the command would go on to its end."""

    def signalled(*_):
        os.kill(os.getpid(), number)
        time.sleep(0.001)  # the handler has its turn here

    class Finalised:
        __del__ = signalled

    class Watched:
        pass

    hook = sys.unraisablehook
    for make in (Finalised, Watched):
        with pytest.raises(BaseException) as caught, clean_stop():
            garbage = make()
            watch = weakref.ref(garbage, signalled) if make is Watched else None
            del garbage
            time.sleep(5)
        assert caught.type is (KeyboardInterrupt if number == signal.SIGINT else SystemExit), watch
        assert sys.unraisablehook is hook
        assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_else_a_finalizer_raises_is_told_as_ever(monkeypatch):
    class Broken:
        def __del__(self):
            raise SystemExit(5)

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(type(lost.exc_value)))
    with clean_stop():
        broken = Broken()
        del broken
    assert told == [SystemExit]


def test_another_error_stays_what_it_is():
    with pytest.raises(ValueError, match="of its own"), clean_stop():
        raise ValueError("of its own")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with clean_stop():
        assert signal.getsignal(number) is signal.SIG_IGN, "else the signal may end this process"
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_ranks_of_torchrun_keep_their_handlers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with clean_stop():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
