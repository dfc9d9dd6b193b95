"""This process and whoever started it. Standard library only: it is the first thing that a rank does.

``kill -9`` of torchrun must not leave ranks behind, which would go on training and hold the run's lock against the
restart. So the kernel is asked to kill this process with its parent, before anything is imported that takes time; and
since the parent may have gone by then, it is looked for afterwards.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping

_SET_PARENT_DEATH_SIGNAL = 1
_ORPHAN = 1  # exit code; nobody is there to read it
_LAUNCHER_WORDS = (b"torchrun", b"torch.distributed", b"torch/distributed")


def die_with_launcher() -> None:
    """Under torchrun on Linux, have the kernel kill this process when the launcher is killed, and end if it is gone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    try:
        arranged = ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0) == 0
    except (OSError, AttributeError):
        return
    # torchrun gives each rank a session of its own; what a container or a wrapper starts has another parent anyway.
    if arranged and os.getsid(0) == os.getpid() and is_orphan():
        os.write(2, b"torchrun has gone while this rank was starting: ending\n")
        os._exit(_ORPHAN)


def is_orphan(parent: int | None = None, look: Callable[[int], tuple[bytes, int] | None] | None = None) -> bool:
    """Whether no launcher is among the ancestors: the kernel gives an orphan to init, or to a reaper that is near.

    In doubt the answer is no: any Python but process 1 may be a launcher, and whatever names torchrun is one.

    Args:
        parent: process number to start from; default the parent's.
        look: process number -> its command line and its own parent, None when it cannot be seen; default /proc.
    """
    look = look or _look
    process = os.getppid() if parent is None else parent
    if process == 0:  # outside of this container
        return False
    while process > 0:
        found = look(process)
        if found is None:
            return False
        command, above = found
        program = os.path.basename(command.split(b"\0", 1)[0])
        is_python = process != 1 and program.startswith((b"python", b"pypy"))
        if is_python or any(word in command for word in _LAUNCHER_WORDS):
            return False
        process = above
    return True


def launcher_is_gone(variables: Mapping[str, str], seconds: float = 3.0) -> bool:
    """Whether nobody serves torchrun's store any more, which is there before the first rank.

    Without this a rank whose machine or torchrun of rank 0 has died would wait for the whole timeout.
    """
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((variables["MASTER_ADDR"], int(variables["MASTER_PORT"])), timeout=seconds).close()
            return False
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.2)
        except (OSError, KeyError, ValueError):
            return False  # a slow network or a wrong address: the rendezvous says what is wrong


def _look(process: int) -> tuple[bytes, int] | None:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as stream:
            command = stream.read()
        with open(f"/proc/{process}/stat", "rb") as stream:
            return command, int(stream.read().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
