"""What one process can find out about another of this host, and about its own main thread."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from typing import Literal, TypedDict

#: makes a rank print its Python stack, also when its interpreter does not come to run
STACK_SIGNAL = signal.SIGUSR2
#: files whose code waits for other ranks
_WAITING = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "megatron/core/distributed/",
    "pipeline_parallel/p2p_communication.py",
    "tensor_parallel/mappings.py",
    "tensor_parallel/layers.py",
    "phd_megatron/runtime/agreement.py",
)
_INNERMOST = 5  # frames that are looked at


class Identity(TypedDict, total=False):
    """What tells a process apart from every other one; what another rank wrote of itself may lack some of it."""

    host: str
    pid: int
    began: str | None
    place: list[str | None]
    ended: bool


def identity() -> Identity:
    """What tells this process apart from every other one."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _stat(os.getpid())[1],
        # A container has numbers of its own: a process number means something within one boot and one name space.
        "place": [first_line("/proc/sys/kernel/random/boot_id"), readlink("/proc/self/ns/pid")],
    }


def state(entry: Identity, me: Identity) -> Literal["running", "stopped", "dead"] | None:
    """How the process of another :func:`identity` is; None when it cannot be seen from here."""
    if None in me["place"] or entry.get("place") != me["place"]:
        return None
    letter, began = _stat(int(entry["pid"]))
    if letter is None or letter in "ZX" or began != entry["began"]:
        return "dead"
    return "stopped" if letter in "Tt" else "running"


def is_dead(entry: Identity, me: Identity) -> bool:
    """Whether that process is known to have gone, and not because its work was done."""
    return bool(entry) and not entry.get("ended") and state(entry, me) == "dead"


def kill(entry: Identity, me: Identity) -> None:
    """End a process of this host for good, a stopped one too; nothing when it is elsewhere or another by now."""
    if entry and state(entry, me) in ("running", "stopped") and entry["pid"] != me["pid"]:
        with suppress(OSError):
            os.kill(int(entry["pid"]), signal.SIGKILL)


def show_stack_on_signal() -> bool:
    """Print all Python stacks on :data:`STACK_SIGNAL`; whether that could be arranged."""
    try:
        faulthandler.register(STACK_SIGNAL, all_threads=True, chain=False)
    except (AttributeError, OSError, ValueError, RuntimeError):  # no such signal, or stderr is no file
        return False
    return True


def stack(thread: int | None) -> str:
    """Python stack of a thread, innermost call last."""
    frame = sys._current_frames().get(thread or threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "it has ended"


def waits(thread: int | None) -> bool:
    """Whether a thread seems to wait for other ranks, by the innermost calls of its Python stack."""
    frame = sys._current_frames().get(thread or 0)
    for _ in range(_INNERMOST):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in _WAITING):
            return True
        frame = frame.f_back
    return False


def _stat(process: int) -> tuple[str | None, str | None]:
    """State letter and start time of a process by the kernel; None when it is gone, or where there is no /proc."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()  # the command name before it may hold spaces
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None, None


def first_line(path: str) -> str | None:
    """The first line of a file of the kernel's, or None where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.readline().strip()
    except OSError:
        return None


def readlink(path: str) -> str | None:
    """Where a link of the kernel's leads, or None where there is none."""
    try:
        return os.readlink(path)
    except OSError:
        return None
