"""The real program under the real torchrun, with eyes on its processes, its output and its numbers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOMENT_PROGRAM = Path(__file__).with_name("moment.py")
PATIENCE = 240.0  # seconds for anything to happen on a busy machine
Numbers = dict[int, tuple[float, float]]


#: starts whose processes may be there, for whoever ends the harness early
STARTED: set[Launch] = set()


class Unexpected(Exception):
    """The run did not do what the fault needs or what is promised."""


def environment(**more: str) -> dict[str, str]:
    """Variables of a run on the CPU, nothing left of another launcher."""
    foreign = ("PET_", "SLURM_", "MASTER_", "TORCHELASTIC", "OMPI_", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return {**kept, **fixed, "PYTHONPATH": path, **more}


def read_numbers(path: Path) -> Numbers:
    """Step -> (loss, gradient norm) of a metrics file; a last line cut by a kill is left out."""
    found: Numbers = {}
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            values = json.loads(line)
            found[values["iteration"]] = (values["lm_loss"], values["grad_norm"])
    return found


class Launch:
    """One start of ``pretrain`` under torchrun.

    Args:
        words: after ``pretrain``.
        directory: where log and metrics of this start go.
        moment: ``FAULT_MOMENT`` of ``moment.py`` without the marker, or None.
    """

    def __init__(self, ranks: int, words: list[str], directory: Path, moment: str | None = None) -> None:
        directory.mkdir(parents=True)
        self.log, self.metrics, self.marker = directory / "log", directory / "metrics.jsonl", directory / "held"
        program = ["-m", "phd_megatron"] if moment is None else [str(MOMENT_PROGRAM)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        more = {} if moment is None else {"FAULT_MOMENT": f"{moment}:{self.marker}"}
        with self.log.open("wb") as stream:
            self.agent = subprocess.Popen(
                [sys.executable, *launcher, *program, "pretrain", *words, "--metrics-file", str(self.metrics)],
                cwd=directory,
                env=environment(**more),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        STARTED.add(self)
        self.began = time.monotonic()
        self._ranks: dict[int, int] = {}  # rank -> process
        self._wanted = ranks

    @property
    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def ranks(self) -> dict[int, int]:
        """Rank -> process, as far as they have been started."""
        if len(self._ranks) < self._wanted:
            for process in _children(self.agent.pid):
                rank = _rank(process)
                if rank is not None:
                    self._ranks.setdefault(rank, process)
        return self._ranks

    def wait_until(self, happened: Callable[[], bool], what: str, pause: float = 0.01) -> None:
        """Wait for something that the run does.

        Raises:
            Unexpected: it ended before, or does not do it.
        """
        deadline = time.monotonic() + PATIENCE
        while not happened():
            _ = self.ranks  # while they can be seen
            if self.agent.poll() is not None:
                if happened():
                    return
                raise Unexpected(f"the run ended with {self.agent.returncode} before {what}")
            if time.monotonic() > deadline:
                raise Unexpected(f"not within {PATIENCE:.0f} s: {what}")
            time.sleep(pause)

    def wait_started(self) -> int:
        """Wait for the first step; the iteration that it starts from."""
        self.wait_until(lambda: self.start is not None, "its first step", pause=0.05)
        assert self.start is not None
        return self.start

    @property
    def start(self) -> int | None:
        """The iteration that training starts from, once it has been printed."""
        found = re.search(r"training from iteration (\d+)\n", self.output)
        return int(found.group(1)) if found else None

    @property
    def steps(self) -> int:
        """Steps that it has reported."""
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def send(self, number: signal.Signals, process: int) -> None:
        """A signal, to a process that may be gone already."""
        with suppress(ProcessLookupError):
            os.kill(process, number)

    def kill_all(self) -> None:
        """As when the machine loses power: nobody can do anything about anybody's death."""
        for process in (self.agent.pid, *self.ranks.values()):
            self.send(signal.SIGSTOP, process)
        for process in (self.agent.pid, *self.ranks.values()):
            self.send(signal.SIGKILL, process)

    def release(self) -> None:
        """Let a held rank go on."""
        self.marker.unlink(missing_ok=True)

    def living(self) -> list[int]:
        """Processes of this run that are still there."""
        return [process for process in (self.agent.pid, *self.ranks.values()) if _alive(process)]

    def wait_gone(self, seconds: float) -> list[int]:
        """Wait until no process is left, and kill what is left then; these are returned."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.agent.poll() is not None and not self.living():
                STARTED.discard(self)
                return []
            _ = self.ranks
            time.sleep(0.01)
        left = self.living()
        for process in left:
            self.send(signal.SIGKILL, process)
        self.agent.wait()
        return left


def _children(process: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{task}/children", encoding="ascii") as stream:
                found += map(int, stream.read().split())
    except OSError:
        pass
    return found


def _rank(process: int) -> int | None:
    """RANK in a process's environment; None while it is still a copy of torchrun."""
    try:
        with open(f"/proc/{process}/environ", "rb") as stream:
            variables = dict(entry.split(b"=", 1) for entry in stream.read().split(b"\0") if b"=" in entry)
    except OSError:
        return None
    return int(variables[b"RANK"]) if b"RANK" in variables and b"TORCHELASTIC_RUN_ID" in variables else None


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
