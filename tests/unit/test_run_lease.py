"""The lease that stands in for a lock: whose it is, who is dead, and how long another host's holder is waited for.

Time is a clock of the test's own, so that nothing here waits for minutes or depends on how busy the machine is. The
files, the processes and the thread that keeps the lease alive are real.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phd_megatron.checkpoint import run_lock
from phd_megatron.checkpoint.run_lock import LEASE_NAME, LOCK_NAME, RunLock
from phd_megatron.errors import UserError

HEARTBEAT = 10.0


class Clock:
    """Seconds that pass only while somebody sleeps; ``events`` happen at their second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, Callable[[], Any]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        for event in sorted(self.events, key=lambda event: event[0]):
            if event[0] <= end:
                self.now = max(self.now, event[0])
                self.events.remove(event)
                event[1]()
        self.now = end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A file system without locks, and time that the test rules."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    clock = Clock()
    names = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep, strftime=time.strftime)
    monkeypatch.setattr(run_lock, "time", names)
    return clock


def put(directory: Path, **content: Any) -> None:
    (directory / LEASE_NAME).write_text(json.dumps(content))


def lease(directory: Path) -> dict[str, Any]:
    return json.loads((directory / LEASE_NAME).read_text())


def elsewhere(beat: int) -> dict[str, Any]:
    return {"host": "elsewhere", "pid": 7, "since": "then", "token": "theirs", "beat": beat}


def take(directory: Path) -> RunLock:
    return RunLock(directory, heartbeat_seconds=HEARTBEAT).acquire()


@pytest.mark.parametrize("late", [0.0, 9.0, 19.0])
def test_a_holder_elsewhere_may_be_two_heartbeats_late(tmp_path: Path, clock: Clock, late: float) -> None:
    """A beat that a full disk or a stalled network swallowed, or two of them, is no death."""
    put(tmp_path, **elsewhere(0))
    clock.events.append((HEARTBEAT + late, lambda: put(tmp_path, **elsewhere(1))))
    with pytest.raises(UserError, match=r"another run saves into .*: process 7 on host elsewhere since then"):
        take(tmp_path)
    assert lease(tmp_path) == elsewhere(1), "it is as its holder wrote it"
    assert clock.now <= HEARTBEAT + late + HEARTBEAT / 4, "refused as soon as the beat is seen"


def test_a_silent_holder_elsewhere_is_waited_for_no_longer_than_three_heartbeats(tmp_path: Path, clock: Clock) -> None:
    put(tmp_path, **elsewhere(3))
    take(tmp_path).release()
    assert 3 * HEARTBEAT <= clock.now <= 3 * HEARTBEAT + 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME]


def test_a_holder_elsewhere_that_ends_meanwhile_is_waited_for_no_longer(tmp_path: Path, clock: Clock) -> None:
    put(tmp_path, **elsewhere(0))
    clock.events.append((4.0, (tmp_path / LEASE_NAME).unlink))
    take(tmp_path).release()
    assert clock.now < HEARTBEAT


def test_of_two_that_take_over_at_once_the_later_one_stays(tmp_path: Path, clock: Clock) -> None:
    put(tmp_path, **elsewhere(0))
    rival = {**elsewhere(0), "pid": 8, "token": "the rival's"}
    clock.events.append((3 * HEARTBEAT + 0.1, lambda: put(tmp_path, **rival)))  # after this one has written
    with pytest.raises(UserError, match="process 8 on host elsewhere"):
        take(tmp_path)
    assert lease(tmp_path) == rival


# ---------------------------------------------------------------- processes of this host


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A living process of this host, which may have the number of one that held the lease."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def stat_fields(pid: int) -> list[str]:
    """Fields 3 and later of the kernel's line about a process: state first, start time at index 19."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def here(pid: int, **changed: Any) -> dict[str, Any]:
    """What a holder of this host writes, put together from the kernel's own words."""
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": "then",
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.readlink("/proc/self/ns/pid"),
        "process_start": stat_fields(pid)[19],
        "token": "theirs",
        "beat": 5,
        **changed,
    }


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@linux
def test_a_living_holder_of_this_host_is_believed_without_a_beat(
    tmp_path: Path, clock: Clock, sleeper: subprocess.Popen[bytes]
) -> None:
    holder = here(sleeper.pid)
    put(tmp_path, **holder)
    with pytest.raises(UserError, match=f"process {sleeper.pid} on host"):
        take(tmp_path)
    assert clock.now == 0 and lease(tmp_path) == holder


@linux
def test_a_number_that_another_process_has_by_now_does_not_lock_out(
    tmp_path: Path, clock: Clock, sleeper: subprocess.Popen[bytes]
) -> None:
    """The kernel gives numbers of dead processes to new ones; those began at another time."""
    put(tmp_path, **here(sleeper.pid, process_start=str(int(stat_fields(sleeper.pid)[19]) - 1)))
    take(tmp_path).release()
    assert clock.now < 1, "known to be dead, so not waited for"


@linux
def test_dead_holders_of_this_host_do_not_lock_out(tmp_path: Path, clock: Clock) -> None:
    """Gone, or ended and not yet waited for by its parent."""
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.read()  # ends with the process
    deadline = time.monotonic() + 60
    while stat_fields(ended.pid)[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    zombie = here(ended.pid)
    put(tmp_path, **zombie)
    take(tmp_path).release()
    ended.wait()
    put(tmp_path, **zombie)
    take(tmp_path).release()
    assert clock.now < 1


@linux
@pytest.mark.parametrize("name", ["host", "boot", "pid_namespace"])
def test_a_number_of_another_host_boot_or_container_says_nothing_here(tmp_path: Path, clock: Clock, name: str) -> None:
    """No process of that number is here; it may live there, which only its beat tells."""
    holder = {**here(os.getpid()), "pid": 2**22 + 1, name: "another"}
    put(tmp_path, **holder)
    clock.events.append((HEARTBEAT, lambda: put(tmp_path, **{**holder, "beat": 6})))
    with pytest.raises(UserError, match="another run saves into"):
        take(tmp_path)
    assert clock.now >= HEARTBEAT


# ---------------------------------------------------------------- what the holder writes and deletes


def test_somebody_elses_lease_is_neither_deleted_nor_written_over(tmp_path: Path, clock: Clock) -> None:
    """A run that was stopped for long, or cut off, finds on its return that another has taken over."""
    held = RunLock(tmp_path, heartbeat_seconds=0.01).acquire()
    keeper = held._lease
    assert keeper is not None
    put(tmp_path, **elsewhere(0))
    wait_for(lambda beats=keeper._beat: keeper._beat > beats + 3)
    assert lease(tmp_path) == elsewhere(0), "written over by a beat"
    with pytest.raises(UserError, match="process 7 on host elsewhere"):
        held.check()
    held.release()
    assert lease(tmp_path) == elsewhere(0), "deleted by a release"


def test_a_lease_beats_is_made_again_and_ends_with_its_release(tmp_path: Path, clock: Clock) -> None:
    threads = set(threading.enumerate())
    held = RunLock(tmp_path, heartbeat_seconds=0.01).acquire()
    (keeper,) = set(threading.enumerate()) - threads
    first = lease(tmp_path)
    assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
    wait_for(lambda: lease(tmp_path)["beat"] > first["beat"] + 2)
    (tmp_path / LEASE_NAME).unlink()
    wait_for((tmp_path / LEASE_NAME).exists)
    assert lease(tmp_path)["token"] == first["token"]
    held.release()
    keeper.join(60)
    assert not keeper.is_alive()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME]


def test_a_beat_that_is_under_way_makes_no_lease_after_the_release(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lock others out of a directory that nobody saves into, as long as this process lives."""
    held = RunLock(tmp_path, heartbeat_seconds=0.01).acquire()
    begun, replace = threading.Event(), os.replace

    def slow(*places: Any) -> None:
        begun.set()
        time.sleep(0.3)  # a slow disk
        replace(*places)

    monkeypatch.setattr(os, "replace", slow)
    assert begun.wait(60)
    held.release()
    time.sleep(0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
