"""What the kernel benches share: interleaved timing, medians, and results as JSON, CSV and a plot."""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from phd_megatron.errors import UserError
from phd_megatron.runtime.output import PLOT, Kind, check_file, json_report, save_figure, text_report, write_file

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
STEPS = 100  # on CUDA at most, per measurement: launches must not be what is timed
ENOUGH = 50.0  # milliseconds; a measurement of long steps stops there
COPY_BYTES = 2**30  # moved by one copy when the bandwidth of a GPU is measured; 1/16 of it on a CPU

Step = Callable[[], object]


@dataclass
class Contender:
    """Something to time, as steps by name (``forward``, ``forward + backward``), and its measured times.

    Attributes:
        times: per step, elapsed milliseconds of each round.
        cpu_times: the same in CPU time of this process; zeros on CUDA.
        peak_bytes: most CUDA memory in use during the last of its steps beyond what was in use before; None on a CPU.
        eager: why its steps are launched one operation at a time on CUDA, or None where they are CUDA graphs.
    """

    name: str
    steps: dict[str, Step]
    times: dict[str, list[float]] = field(default_factory=dict)
    cpu_times: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    eager: str | None = None
    repeats: dict[str, int] = field(default_factory=dict)  # steps of one measurement

    def median(self, step: str, cpu: bool = False) -> float:
        """Milliseconds."""
        return statistics.median((self.cpu_times if cpu else self.times)[step])


#: what the benches write: those of kernels, ``generate``, ``members`` and ``train``
REPORT = json_report(
    "a report of `phd-megatron bench`",
    *("settings", "where", "results"),
    others=(
        ("settings", "where", "torch", "worst_error", "rows"),
        ("settings", "where", "peak_tflops", "members"),
        ("size", "precision", "where", "peak_tflops", "tokens", "seconds", "time_ratio", "tflops"),
    ),
)
TABLE = text_report("a table of `phd-megatron bench`", "machine,device,dtype,torch,threads,date,", "model,prefill ms")


def check_reports(args: argparse.Namespace) -> None:
    """Make the folders of what ``--json``, ``--csv`` and ``--plot`` name, and refuse files that are not a bench's.

    Raises:
        UserError: before anything is measured.
    """
    kinds: dict[str, Kind] = {"json": REPORT, "csv": TABLE, "plot": PLOT}
    for name, kind in kinds.items():
        target: Path | None = getattr(args, name, None)
        if target is None:
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {target.parent}: {error.strerror}; choose another --{name}") from error
        check_file(target, f"--{name}", kind)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that every kernel bench has."""
    parser.add_argument("--dtype", choices=TOLERANCES, default=None, help="default float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds after one to warm up")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--csv", type=Path, default=None, metavar="FILE", help="also write one line per measurement")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="also draw them (.png, .svg, .pdf)")


def check_counts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse counts below 1, in single flags and in lists."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')}={value}: use 1 or more")


def device_and_dtype(args: argparse.Namespace) -> tuple[Any, str, Any]:
    """The torch device, the type's name, and the type, as the flags ask; sets the number of threads."""
    import torch

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device={args.device} is none that torch knows; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={args.device}: this torch sees no CUDA device; use --device cpu")
    if args.threads is not None:
        check_counts(args, ["threads"])
        torch.set_num_threads(args.threads)
    name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return device, name, getattr(torch, name)


def measure(contenders: Sequence[Contender], rounds: int, device: Any) -> None:
    """Time every step in interleaved rounds, each of which starts with another contender; the first only warms up.

    On CUDA a measurement replays a graph of as many steps as last a while, so that what the device needs is timed, not
    Python nor the launch of a graph.
    """
    for turn in range(rounds + 1):
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            for name, step in list(contender.steps.items()):
                if turn:
                    wall, cpu = _timed(step, device)
                    repeats = contender.repeats[name]
                    contender.times.setdefault(name, []).append(wall / repeats)
                    contender.cpu_times.setdefault(name, []).append(cpu / repeats)
                    continue
                step()  # compiles and tunes
                contender.repeats[name] = 1
                if device.type == "cuda":
                    contender.repeats[name] = max(1, min(STEPS, round(ENOUGH / max(_timed(step, device)[0], 1e-3))))
                    contender.steps[name] = _prepared(contender, step, contender.repeats[name], device)


def _prepared(contender: Contender, step: Step, repeats: int, device: Any) -> Step:
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
        contender.eager = str(error).splitlines()[0]
        print(f"{contender.name} is launched operation by operation, and Python's time counts: {contender.eager}")
        torch.cuda.synchronize(device)
        return steps


def _timed(step: Step, device: Any) -> tuple[float, float]:
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


def copy_contender(device: Any) -> tuple[Contender, int]:
    """A plain copy of a large buffer, and the bytes it reads and writes: the bandwidth to compare with."""
    import torch

    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    source = torch.empty(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Contender("copy", {"forward": lambda: target.copy_(source)}), size


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


def relative_error(found: Sequence[Any], expected: Sequence[Any], floor: float = 0.0) -> float:
    """Worst relative Frobenius error of tensors against float64 ones."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).norm()) / max(float(b.norm()), floor, 1e-300) for a, b in pairs)


def short(milliseconds: float) -> str:
    """Three digits."""
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def write_results(
    args: argparse.Namespace, device: Any, dtype_name: str, results: Sequence[dict[str, Any]], x: str, y: str
) -> None:
    """Write what ``--json``, ``--csv`` and ``--plot`` ask for.

    Args:
        results: measured shapes, each with ``shape``, a flat dict, and ``rows``, flat dicts with a ``name``.
        x: key of the shape that the plot has on its horizontal axis.
        y: key of the rows that it has on its vertical axis.
    """
    import torch

    skipped = ("json", "csv", "plot")
    settings = {name: value for name, value in vars(args).items() if name not in skipped}
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    where = {
        "machine": machine,
        "device": str(device),
        "dtype": dtype_name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if args.json is not None:
        report = {"settings": settings, "where": where, "results": list(results)}
        write_file(args.json, "--json", REPORT, json.dumps(report, indent=2) + "\n")
    lines = [{**where, **r["shape"], **row} for r in results for row in r["rows"]]
    lines = [{k: v for k, v in line.items() if not isinstance(v, (list, dict))} for line in lines]
    if args.csv is not None:
        columns = list(dict.fromkeys(name for line in lines for name in line))
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
        write_file(args.csv, "--csv", TABLE, file.getvalue())
    if args.plot is not None:
        draw(args.plot, "--plot", lines, x, y)


def draw(target: Path, option: str, lines: Sequence[dict[str, Any]], x: str, y: str) -> None:
    """One line per name and per value of what else varies, ``y`` over ``x``; ``option`` named the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    series: dict[str, list[tuple[float, float]]] = {}
    varying = [k for k in ("policy", "head_dim", "batch", "norms") if len({str(line.get(k)) for line in lines}) > 1]
    for line in lines:
        if line.get(y) is not None and line.get(x) is not None:
            label = ", ".join([str(line["name"]), *(f"{k} {line[k]}" for k in varying)])
            series.setdefault(label, []).append((line[x], line[y]))
    for label, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(y.replace("_", " "))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, target, option)
    plt.close(figure)
