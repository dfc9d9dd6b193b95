"""One run per save directory; a killed run, or its orphaned children, never locks the next one out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phd_megatron.checkpoint.run_lock import LEASE_NAME, LOCK_NAME, RunLock
from phd_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from phd_megatron.checkpoint import run_lock
if sys.argv[2] == "lease":
    import errno
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    run_lock.fcntl.lockf = no_locks
lock = run_lock.RunLock(sys.argv[1], heartbeat_seconds=0.1).acquire()
if os.fork() == 0:      # a data-loader worker that outlives its parent, with every descriptor it inherited
    os.write(1, b"%d\\n" % os.getpid())  # one call each: two processes share the pipe
    time.sleep(600)
    os._exit(0)
os.write(1, b"held\\n")
time.sleep(600)
"""


class Holder:
    """Another process that holds the lock and has a forked child."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.process = subprocess.Popen(
            # Python 3.12 warns of a fork beside threads, in the lines that are waited for here.
            [sys.executable, "-W", "ignore", "-c", HOLDER, str(directory), kind],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        lines = {self.process.stdout.readline().strip(), self.process.stdout.readline().strip()}
        numbers = [line for line in lines if line.isdecimal()]
        if "held" not in lines or not numbers:
            self.process.kill()
            raise AssertionError("\n".join([*lines, self.process.stdout.read()]))
        self.child = int(numbers[0])

    def kill(self) -> None:
        """kill -9 of the holder; its child lives on."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.kill(self.child, 0)

    def end(self) -> None:
        """Clean up after the test."""
        for pid in (self.process.pid, self.child):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@pytest.fixture(params=["lock", "lease"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the file system's locks, and on one that has none."""
    if request.param == "lease":

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "lockf", no_locks)
    return request.param


def lock(directory: Path) -> RunLock:
    return RunLock(directory, grace_seconds=0.2, heartbeat_seconds=0.1)


def test_second_run_is_refused_until_the_first_is_killed(tmp_path: Path, kind: str) -> None:
    holder = Holder(tmp_path, kind)
    try:
        with pytest.raises(UserError) as refusal:
            lock(tmp_path).acquire()
        message = str(refusal.value)
        assert f"process {holder.process.pid} on host {socket.gethostname()} since 20" in message
        assert str(tmp_path) in message and "--save" in message
        holder.kill()
        with lock(tmp_path):
            pass  # at once: its own grace is shorter than any wait for a lease
    finally:
        holder.end()


def test_released_lock_is_free_and_can_be_taken_again(tmp_path: Path, kind: str) -> None:
    place = tmp_path / (LEASE_NAME if kind == "lease" else LOCK_NAME)
    for _ in range(2):
        held = lock(tmp_path).acquire()
        assert json.loads(place.read_text())["pid"] == os.getpid()
        for _ in range(2):  # the second time there is nothing left to do
            held.release()
            assert not place.exists() or place.read_text() == ""


def test_same_process_cannot_take_it_twice_nor_lose_it_by_trying(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(UserError, match="this process already"):
            lock(tmp_path).acquire()
        code = "import sys; from phd_megatron.checkpoint.run_lock import RunLock\n"
        code += "RunLock(sys.argv[1], grace_seconds=0).acquire()"
        second = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
        assert "another run saves into" in second.stderr, "the failed attempt gave the lock away"


@pytest.mark.parametrize("removed", ["file", "directory", "replaced"])
def test_a_lock_that_was_removed_is_taken_again(tmp_path: Path, kind: str, removed: str) -> None:
    save = tmp_path / "save"
    save.mkdir()
    name = save / (LEASE_NAME if kind == "lease" else LOCK_NAME)
    said: list[str] = []
    with lock(save) as held:
        held.check(said.append)
        assert not said
        if removed == "directory":
            shutil.rmtree(save)
        else:
            name.unlink()
        if removed == "replaced" and kind == "lock":
            name.write_text("")
        held.check(said.append)
        if kind == "lock":
            assert len(said) == 1 and "removed" in said[0] and "no other run has taken it" in said[0]
        held.check(said.append)
        code = f"""
import errno, sys
from phd_megatron.checkpoint import run_lock
if {kind == "lease"}:
    def no_locks(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")
    run_lock.fcntl.lockf = no_locks
run_lock.RunLock(sys.argv[1], grace_seconds=0.1).acquire()
"""
        rival = subprocess.run([sys.executable, "-c", code, save], capture_output=True, text=True, cwd=ROOT)
        assert "another run saves into" in rival.stderr, "the lock that was taken again keeps others out"


@pytest.mark.parametrize("removed", ["file", "directory"])
def test_a_lock_that_another_run_has_taken_meanwhile_is_lost(tmp_path: Path, kind: str, removed: str) -> None:
    save = tmp_path / "save"
    save.mkdir()
    # A lease's next beat would make it again before the other run comes.
    with RunLock(save, grace_seconds=0.2, heartbeat_seconds=30) as held:
        if removed == "directory":
            shutil.rmtree(save)
            save.mkdir()
        else:
            (save / (LEASE_NAME if kind == "lease" else LOCK_NAME)).unlink()
        rival = Holder(save, kind)
        try:
            for _ in range(2):
                with pytest.raises(UserError, match=f"another run saves into .*: process {rival.process.pid} on host"):
                    held.check()
        finally:
            rival.end()


def test_damaged_lease_does_not_lock_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    (tmp_path / LEASE_NAME).write_bytes(b"\0\0")
    lock(tmp_path).acquire().release()


def test_unwritable_directory_is_a_plain_refusal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose a writable --save directory"):
        lock(tmp_path / "absent").acquire()


def test_a_lock_file_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("of somebody")
    with pytest.raises(UserError, match=r"is not what a run of phd-megatron wrote.*move it away"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / LOCK_NAME).read_text() == "of somebody"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="an audit of another process and /proc are Linux's")
@pytest.mark.parametrize("why", ["taken", "no locks here", "failing disk", "another's file"])
def test_what_is_not_locked_stays_open_nowhere(tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> int:
        return sum(str(tmp_path) in os.readlink(f"/proc/self/fd/{name}") for name in descriptors())

    def descriptors() -> list[str]:
        return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]

    def fail(*_: object) -> None:
        raise OSError({"taken": errno.EAGAIN, "no locks here": errno.ENOSYS}.get(why, errno.EIO), why)

    if why == "another's file":
        (tmp_path / LOCK_NAME).write_text("notes")
    else:
        monkeypatch.setattr(fcntl, "lockf", fail)
    if why == "no locks here":
        held = lock(tmp_path).acquire()
        held.release()
    else:
        with pytest.raises((UserError, OSError)):
            lock(tmp_path).acquire()
    assert opened() == 0
