"""One member as a process: the real program in the member's folder, and what became of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import psutil

from phd_megatron.checkpoint.run_lock import RunLock
from phd_megatron.errors import DIVERGED, UserError
from phd_megatron.runtime.context import usable_cores
from phd_megatron.runtime.environment import without_launcher
from phd_megatron.sweep.members import CHECKPOINTS, LOG_FILE, RUN_FILE
from phd_megatron.sweep.options import Launcher
from phd_megatron.sweep.progress import last_step
from phd_megatron.sweep.store import State, Status, Store

_LOG_TAIL = 200_000
_SAVE_GRACE = 60.0  #: a member whose sweep was killed may still be writing its last checkpoint


def member_command(run_file: Path, launcher: Launcher) -> list[str]:
    """The program of one member: ``pretrain``, under torchrun when it has several ranks."""
    program = ["-m", "phd_megatron", "pretrain", "--config", str(run_file)]
    if launcher.nodes > 1:
        job = os.environ.get("SLURM_JOB_ID", "0")
        master = f"{os.environ.get('SLURMD_NODENAME', socket.gethostname())}:{20000 + int(job) % 20000}"
        nodes = ["--nnodes", str(launcher.nodes), "--rdzv-backend", "c10d", "--rdzv-id", job, "--rdzv-endpoint", master]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(launcher.ranks)]
        return ["srun", "--kill-on-bad-exit=1", "--ntasks-per-node=1", *torchrun, *program]
    if launcher.ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launcher.ranks)]
        return [sys.executable, *torchrun, *program]
    return [sys.executable, *program]


def member_environment(launcher: Launcher, devices: str | None = None) -> dict[str, str]:
    """Variables of a member. ``devices``: the CUDA devices it may see; None leaves that alone."""
    inherited = dict(os.environ) if launcher.nodes > 1 else without_launcher(os.environ)
    at_once = launcher.ranks * (launcher.parallel if launcher.kind == "local" else 1)
    threads = launcher.threads or max(1, usable_cores() // at_once)
    chosen = {"OMP_NUM_THREADS": str(threads), "PHD_MEGATRON_THREADS": str(threads)}
    if launcher.threads is None and {"OMP_NUM_THREADS", "PHD_MEGATRON_THREADS"} & inherited.keys():
        chosen = {}
    always = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    always["TOKENIZERS_PARALLELISM"] = "false"
    # Where only torchrun can be signalled (several nodes) it must leave the ranks time to save.
    always["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = inherited.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    if devices is not None:
        always["CUDA_VISIBLE_DEVICES"] = devices
    return {**inherited, **chosen, **always}


class MemberProcess:
    """A member that is running. Its folder is locked as long as this object has not seen its end."""

    def __init__(self, store: Store, name: str, launcher: Launcher, devices: str | None = None) -> None:
        self.store, self.name, self._launcher = store, name, launcher
        home = store.home(name)
        self._lock = RunLock(home).acquire()
        try:
            _wait_for_checkpoints(home / CHECKPOINTS)
            self._log_path = home / LOG_FILE
            self._log: IO[bytes] = self._log_path.open("ab")
            before = store.status(name)
            self._status = replace(before, state="running", exit_code=None, starts=before.starts + 1, message="")
            store.write_status(name, self._status)
            self._began = time.monotonic()
            command = member_command(home / RUN_FILE, launcher)
            self._log.write(f"$ {shlex.join(command)}\n".encode())
            self._log.flush()
            self._log_start = self._log_path.stat().st_size
            self._process = subprocess.Popen(
                command,
                env=member_environment(launcher, devices),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the sweep, which passes it on once
                preexec_fn=_follow(os.getpid()),
            )
        except BaseException:
            self._lock.release()
            raise
        self._asked_to_stop = False

    def stop(self) -> None:
        """Ask it to save and stop."""
        self._asked_to_stop = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all its processes at once."""
        self._asked_to_stop = True
        self._signal(signal.SIGKILL)

    def poll(self) -> Status | None:
        """Its status once it has ended, else None."""
        code = self._process.poll()
        return None if code is None else self._ended(code)

    def wait(self) -> Status:
        """Wait for its end."""
        return self._ended(self._process.wait())

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                ranks = self._ranks()
                for rank in ranks:
                    rank.send_signal(number)
                if not ranks:
                    self._process.send_signal(number)

    def _ranks(self) -> list[psutil.Process]:
        """Ranks under torchrun on this machine; none without it, or before it has started them.

        They are signalled themselves: torchrun would pass the signal on and kill them 30 seconds later, saved or not.
        """
        if self._launcher.ranks == 1 or self._launcher.nodes > 1:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children()
        return []

    def _ended(self, code: int) -> Status:
        if not self._log.closed:
            self._log.close()
            seconds = self._status.seconds + time.monotonic() - self._began
            state, message = self._judge(code)
            self._status = replace(self._status, state=state, exit_code=code, seconds=seconds, message=message)
            self.store.write_status(self.name, self._status)
            self._lock.release()
        return self._status

    def _judge(self, code: int) -> tuple[State, str]:
        log = self._read_log()
        if DIVERGED in log:
            return "diverged", _last_error(log)
        if code == 0 and progress_of(self.store, self.name) >= self.store.entry(self.name).samples:
            return "finished", ""
        if code == 0 or self._asked_to_stop:
            return "stopped", "stopped before its end; it continues from its checkpoint"
        return "failed", _last_error(log) or f"ended with exit code {code}"

    def _read_log(self) -> str:
        with self._log_path.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(self._log_start, end - _LOG_TAIL))
            return stream.read().decode("utf-8", "replace")


def present_status(store: Store, name: str) -> Status:
    """A member's status now: what says ``running`` and holds no lock was killed."""
    status = store.status(name)
    if status.state != "running":
        return status
    try:
        RunLock(store.home(name), grace_seconds=0).acquire().release()
    except UserError:
        return status
    return replace(status, state="stopped", message="its process is gone; start the sweep again to continue it")


def progress_of(store: Store, name: str) -> int:
    """Samples that a member has trained on, by the last line of its metrics."""
    return int(last_step(store, name).get("consumed_samples", 0))


def _last_error(log: str) -> str:
    """The refusal that the program printed, or the last line of a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    refusals = [line for line in lines if line.startswith("error: ")]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (refusals or errors or lines[-1:] or [""])[-1].removeprefix("error: ")[:500]


def _wait_for_checkpoints(directory: Path) -> None:
    if directory.is_dir():
        try:
            RunLock(directory, grace_seconds=_SAVE_GRACE).acquire().release()
        except UserError as error:
            raise UserError(f"the member is still running elsewhere: {error}") from None


def _follow(parent: int) -> Callable[[], None] | None:
    """In the child: be asked to save and stop when the sweep dies, so that nothing goes on without it."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def follow() -> None:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return follow
