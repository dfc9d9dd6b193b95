"""What is known of another process of this host, and which processes are never ended; all of them are real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.runtime import processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
ROOT = Path(__file__).resolve().parents[2]
#: a process that says who it is, and lives until its input ends
PROGRAM = "import json; from phd_megatron.runtime.processes import identity as i; print(json.dumps(i()), flush=True); "


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    import json

    command = [sys.executable, "-c", f"{PROGRAM}input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_the_stack_of_no_thread_is_the_main_threads() -> None:
    assert "test_the_stack_of_no_thread_is_the_main_threads" in processes.stack(None)
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    assert processes.stack(ended.ident) in ("it has ended", processes.stack(None)), "an identity may be used again"


def letter(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(pid: int, letters: str) -> None:
    deadline = time.monotonic() + 60
    while letter(pid) not in letters:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_process_says_who_it_is(child: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    process, entry = child
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert entry == {
        "host": socket.gethostname(),
        "pid": process.pid,
        "began": fields[19],
        "place": [boot, os.readlink("/proc/self/ns/pid")],
    }


def test_states_of_a_process(child: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    process, entry = child
    me = processes.identity()
    assert processes.state(entry, me) == "running" and not processes.is_dead(entry, me)
    process.send_signal(signal.SIGSTOP)
    wait_for(process.pid, "Tt")
    assert processes.state(entry, me) == "stopped" and not processes.is_dead(entry, me)
    process.send_signal(signal.SIGCONT)
    wait_for(process.pid, "RSD")
    assert processes.state(entry, me) == "running"
    assert processes.state({**entry, "began": str(int(entry["began"]) - 1)}, me) == "dead", "another has its number"
    for place in (["another boot", entry["place"][1]], [entry["place"][0], "pid:[1]"]):
        assert processes.state({**entry, "place": place}, me) is None, "its number says nothing here"
        assert not processes.is_dead({**entry, "place": place}, me)
    assert processes.state({**entry, "place": [None, None]}, {**me, "place": [None, None]}) is None, "no /proc"
    process.kill()
    wait_for(process.pid, "Z")
    assert processes.state(entry, me) == "dead", "ended, and its parent has not asked yet"
    process.wait()
    assert processes.state(entry, me) == "dead" and processes.is_dead(entry, me)
    assert not processes.is_dead({**entry, "ended": True}, me), "its work was done"
    assert not processes.is_dead({}, me), "nothing is known of it"


def test_only_the_process_that_is_meant_is_ended(child: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    process, entry = child
    me = processes.identity()
    processes.kill({}, me)
    processes.kill({**entry, "place": ["another boot", entry["place"][1]]}, me)
    processes.kill({**entry, "began": "1"}, me)
    time.sleep(0.1)
    assert letter(process.pid) not in "ZX"
    process.send_signal(signal.SIGSTOP)
    wait_for(process.pid, "Tt")
    processes.kill(entry, me)
    assert process.wait(60) == -signal.SIGKILL, "a stopped one hears nothing less"
    processes.kill(entry, me)


def test_no_process_ends_itself() -> None:
    words = "from phd_megatron.runtime.processes import identity as i, kill; kill(i(), i()); print('alive')"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "alive\n"


def test_a_thread_that_waits_for_other_ranks_is_known_by_its_stack() -> None:
    """By the file of one of its innermost calls; here the code that makes small decisions together."""
    from phd_megatron.runtime import agreement

    begun, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        go_on.wait(60)

    for runs, waits in ((lambda: agreement.from_rank_zero(hold), True), (hold, False)):
        begun.clear()
        go_on.clear()
        thread = threading.Thread(target=runs)
        thread.start()
        assert begun.wait(60)
        assert processes.waits(thread.ident) is waits
        assert "hold" in processes.stack(thread.ident)
        go_on.set()
        thread.join()
    assert processes.waits(0) is False and processes.stack(2**60) == "it has ended"
