"""The chat in the terminal: lines from a pipe, and a person at a terminal."""

from __future__ import annotations

import os
import pty
import selectors
import signal
import subprocess
import sys
import time

from .conftest import environment

PROGRAM = [sys.executable, "-m", "phd_megatron", "chat"]


def talk(directory, lines, *words):
    done = subprocess.run(
        [*PROGRAM, str(directory), "--device", "cpu", "--max-new-tokens", "5", *words],
        env=environment(),
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done


def test_lines_from_a_pipe(exports):
    """An answer depends on what was said before, and not after /reset; /quit ends it."""
    done = talk(exports["hybrid"], "one\none\n/reset\none\n/quit\nnever\n", "--system=-s")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == third != second and len(first) == 5


def test_a_model_without_a_template_continues_the_text(exports):
    done = talk(exports["llama"], "def main(\n/rset\n")
    note, answer = done.stdout.splitlines()
    assert "no chat template" in note and "--chat-template FILE" in note and len(answer) > 0
    assert done.returncode == 2 and "'/rset' is no command" in done.stderr


def test_ctrl_c_stops_an_answer_and_not_the_program(exports):
    master, slave = pty.openpty()
    words = [str(exports["hybrid"]), "--device", "cpu", "--temperature", "1.9", "--seed", "4"]
    process = subprocess.Popen(
        [*PROGRAM, *words],
        env=environment(TERM="dumb"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        # As a terminal does; what is started in the background of a script ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(slave)
    screen = selectors.DefaultSelector()
    screen.register(master, selectors.EVENT_READ)
    seen = ""

    def until(text, count=1):
        nonlocal seen
        end = time.monotonic() + 60
        while seen.count(text) < count:
            assert screen.select(max(0, end - time.monotonic())), seen
            try:
                seen += os.read(master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"it ended: {seen}") from None

    try:
        until("you> ")
        os.write(master, b"hello\n")
        until("hello\r\n")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        until("[stopped]")
        until("you> ", 2)
        time.sleep(0.5)  # readline shows a prompt a little before it listens to signals
        process.send_signal(signal.SIGINT)
        until("/quit ends the program")
        os.write(master, b"/what\n")
        until("is no command")
        os.write(master, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        screen.close()
        os.close(master)
