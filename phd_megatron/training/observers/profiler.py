"""``--profile``: a trace of some training steps by torch's profiler, and where their time went."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from phd_megatron.config.schema import RunConfig
from phd_megatron.console.terminal import say
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.observers.observer import Observer, Step

_LOGGED = 15  #: operations in the log; the JSON file holds all


class StepProfiler(Observer):
    """Traces the steps ``start + 1`` to ``end`` on this rank, as Megatron counts them.

    Writes ``steps_A-B_rank_R.pt.trace.json.gz`` (chrome://tracing, Perfetto, TensorBoard) and, by operation,
    ``steps_A-B_rank_R.operations.json``. A trace that cannot be written is a warning: the run is worth more.

    Args:
        directory: where files go; made when needed.
        rank: of this process, for the file names.
        start, end: the last step before the trace, and its last step.
        log: whether this rank prints the table.
        on_cuda: also record kernels.
    """

    def __init__(self, directory: Path, rank: int, start: int, end: int, *, log: bool, on_cuda: bool) -> None:
        self.directory, self.rank, self.start, self.end = directory, rank, start, end
        self._log, self._on_cuda = log, on_cuda
        self._profile: profile | None = None
        self._first = self._last = 0  # steps in the trace

    @classmethod
    def of_run(cls, run: RunConfig, runtime: Runtime, first: int, last: int) -> StepProfiler | None:
        """Only where a profile is asked for, of this rank, and of steps that are still to come.

        Raises:
            UserError: on every rank, when the run has fewer steps than ``profile_step_end``. With ``train_iters`` that
                is known before ranks are connected; the steps of ``train_samples`` are known here.
        """
        options = run.logging
        if not options.profile:
            return None
        start, end = options.profile_step_start, options.profile_step_end
        if end > last:
            raise UserError(f"profile_step_end={end} is beyond the {last} steps of the run; lower it, or train longer")
        if end < first:
            runtime.log(f"note: nothing is profiled, step {end} (profile_step_end) was before iteration {first - 1}")
            return None
        if runtime.rank not in options.profile_ranks:
            return None
        directory = Path(options.profile_dir or Path(run.checkpoint.save or ".") / "profile")
        first_rank = runtime.rank == min(options.profile_ranks)
        return cls(directory, runtime.rank, start, end, log=first_rank, on_cuda=not runtime.on_cpu)

    @contextmanager
    def around_step(self, step: Step) -> Iterator[None]:
        """Traced, if it is one of the steps; starting and writing is no time of a step."""
        if not self.start < step.iteration <= self.end:
            yield
            return
        if self._profile is None:
            with step.interval.paused():
                activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_cuda else [])]
                self._profile, self._first = profile(activities=activities), step.iteration
                self._profile.start()
        with record_function(f"training step {step.iteration}"):
            yield
        self._last = step.iteration
        if step.iteration == self.end:
            with step.interval.paused():
                self.close()

    def close(self) -> None:
        """Stop and write what was traced; a run that ends in the middle leaves the steps that it made."""
        if self._profile is None:
            return
        if self._on_cuda:
            torch.cuda.synchronize()  # kernels of the last step belong to it
        traced, self._profile = self._profile, None
        traced.stop()
        if self._last:
            try:
                self._write(traced)
            except (OSError, RuntimeError) as error:
                say(f"warning: the trace of rank {self.rank} is not written ({error})")

    def _write(self, traced: profile) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        name = self.directory / f"steps_{self._first}-{self._last}_rank_{self.rank}"
        traced.export_chrome_trace(f"{name}.pt.trace.json.gz")
        rows = operations(traced, self._on_cuda)
        text = json.dumps({"rank": self.rank, "steps": [self._first, self._last], "operations": rows}, indent=1)
        Path(f"{name}.operations.json").write_text(text + "\n", encoding="utf-8")
        if self._log:
            say(f"traced steps {self._first} to {self._last} of rank {self.rank}: {name}.pt.trace.json.gz")
            say(table(rows, self._on_cuda))


class _Counted(TypedDict):
    name: str
    calls: int
    self_cpu_ms: float


class Operation(_Counted, total=False):
    """Time of one operation or kernel itself, without what it calls; ``self_device_ms`` on a GPU only."""

    self_device_ms: float
    share: float  #: of the device's time on a GPU and of the CPU's otherwise


def operations(traced: profile, on_cuda: bool) -> list[Operation]:
    """Every operation and kernel, the longest first."""
    key: Literal["self_device_ms", "self_cpu_ms"] = "self_device_ms" if on_cuda else "self_cpu_ms"
    rows: list[Operation] = []
    for event in traced.key_averages():
        row: Operation = {"name": event.key, "calls": event.count, "self_cpu_ms": event.self_cpu_time_total / 1e3}
        if on_cuda:
            row["self_device_ms"] = event.self_device_time_total / 1e3
        rows.append(row)
    total = sum(row[key] for row in rows) or 1.0
    for row in rows:
        row["share"] = row[key] / total
    return sorted(rows, key=lambda row: -row[key])


def table(rows: list[Operation], on_cuda: bool) -> str:
    """The operations with the most time of their own, for the log."""
    key: Literal["self_device_ms", "self_cpu_ms"] = "self_device_ms" if on_cuda else "self_cpu_ms"
    where = "GPU" if on_cuda else "CPU"
    lines = [f"  {where} ms of its own   share   calls  operation"]
    for row in rows[:_LOGGED]:
        lines.append(f"  {row[key]:17.2f}  {row['share']:6.1%}  {row['calls']:6d}  {row['name'][:80]}")
    return "\n".join(lines)
