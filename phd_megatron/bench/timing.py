"""The one way in which benches time: contenders interleaved round by round, medians, CUDA graphs on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from phd_megatron.console.terminal import show

if TYPE_CHECKING:
    import torch

FORWARD, BOTH = "forward", "forward + backward"
STEPS = 100  # on CUDA at most, per measurement: launches must not be what is timed
ENOUGH = 50.0  # milliseconds; a measurement of long steps stops there
COPY_BYTES = 2**30  # moved by one copy when the bandwidth of a GPU is measured; 1/16 of it on a CPU

Step = Callable[[], None]
Each = TypeVar("Each")


def _nothing() -> None:
    """What a contender without a state does between rounds."""


@dataclass
class Contender:
    """Something to time, as steps by name (``forward``, ``forward + backward``), and its measured times.

    Attributes:
        steps: what is timed, in this order.
        times: per step, elapsed milliseconds of each round.
        cpu_times: the same in CPU time of this process; zeros on CUDA.
        peak_bytes: most CUDA memory in use during the last of its steps beyond what was in use before; None on a CPU.
        eager: why its steps are launched one operation at a time on CUDA, or None where they are CUDA graphs.
        repeats: how often a step does what a time is given of; filled in by :func:`measure` where it is empty.
        reset: called before and after the steps of each round, outside what is timed.
    """

    name: str
    steps: dict[str, Step]
    times: dict[str, list[float]] = field(default_factory=dict)
    cpu_times: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    eager: str | None = None
    repeats: dict[str, int] = field(default_factory=dict)
    reset: Step = _nothing

    def median(self, step: str, cpu: bool = False) -> float:
        """Milliseconds."""
        return statistics.median((self.cpu_times if cpu else self.times)[step])

    def note_eager(self, error: RuntimeError) -> None:
        """Note and say that its steps cannot be recorded."""
        self.eager = str(error).splitlines()[0]
        show(f"{self.name} is launched operation by operation, and Python's time counts: {self.eager}")


def differentiable(
    name: str,
    function: Callable[[], torch.Tensor | Sequence[torch.Tensor]],
    leaves: Sequence[torch.Tensor],
    grads: torch.Tensor | Sequence[torch.Tensor],
) -> Contender:
    """A function of ``leaves``, forward, and with the gradients of all of them."""
    import torch

    def forward() -> None:
        with torch.no_grad():
            function()

    def both() -> None:
        torch.autograd.grad(function(), leaves, grads)

    return Contender(name, {FORWARD: forward, BOTH: both})


def interleaved(contenders: Sequence[Each], rounds: int) -> Iterator[tuple[int, Each]]:
    """Who is measured when: every one in each of the rounds, counted from 0, each of which begins with another.

    A busy machine then slows all of them alike.
    """
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            yield turn, contender


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of one round each, so that a slow moment of the machine falls on both sides."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def measure(contenders: Sequence[Contender], rounds: int, device: torch.device) -> None:
    """Time every step in interleaved rounds; round 0 only warms up.

    On CUDA a measurement replays a graph of as many steps as last a while, so that what the device needs is timed, not
    Python nor the launch of a graph. Steps of a contender that says its ``repeats`` are timed as they are.
    """
    for turn, contender in interleaved(contenders, rounds + 1):
        contender.reset()
        for name, step in list(contender.steps.items()):
            if turn:
                wall, cpu = _timed(step, device)
                repeats = contender.repeats[name]
                contender.times.setdefault(name, []).append(wall / repeats)
                contender.cpu_times.setdefault(name, []).append(cpu / repeats)
                continue
            step()  # compiles and tunes
            if name in contender.repeats:
                continue
            contender.repeats[name] = 1
            if device.type == "cuda":
                contender.repeats[name] = max(1, min(STEPS, round(ENOUGH / max(_timed(step, device)[0], 1e-3))))
                contender.steps[name] = _prepared(contender, step, contender.repeats[name], device)
        contender.reset()


def measure_beside_a_copy(contenders: Sequence[Contender], rounds: int, device: torch.device) -> float:
    """The same, with a plain copy of a large buffer among them: GB/s that it reads and writes, to compare with."""
    import torch

    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    source = torch.empty(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)

    copy = Contender("copy", {FORWARD: step})
    measure([copy, *contenders], rounds, device)
    return size / (copy.median(FORWARD) * 1e6)


def _prepared(contender: Contender, step: Step, repeats: int, device: torch.device) -> Step:
    """Note the memory that a step takes, and make a CUDA graph of ``repeats`` of it where that can be done."""
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    contender.peak_bytes = torch.cuda.max_memory_allocated(device) - before

    def steps() -> None:
        for _ in range(repeats):
            step()

    try:
        replay = captured(steps)
        replay()
        return replay
    except RuntimeError as error:
        contender.note_eager(error)
        torch.cuda.synchronize(device)
        return steps


def _timed(step: Step, device: torch.device) -> tuple[float, float]:
    """Milliseconds: elapsed (by the device's own clock on CUDA), and CPU time of this process."""
    import torch

    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        torch.cuda.synchronize(device)
        start.record(stream)
        step()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)), 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def captured(steps: Step) -> Step:
    """``steps`` as a CUDA graph, so that launches cost nothing.

    A graph knows addresses alone, so what is returned holds ``steps``, and with it the tensors at these addresses.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()

    def replay(keeps: Step = steps) -> None:
        graph.replay()

    return replay


def relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], floor: float = 0.0) -> float:
    """Worst relative Frobenius error of tensors against float64 ones."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).norm()) / max(float(b.norm()), floor, 1e-300) for a, b in pairs)
