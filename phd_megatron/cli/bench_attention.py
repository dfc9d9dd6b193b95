"""``phd-megatron bench attention``: forward + backward of PHD attention against its floor.

The floor is ``K`` times vanilla causal attention over the originals: ``K`` copies of every query over the same keys. On
CUDA vanilla runs through each of torch's fused kernels, and the quickest counts.
Contenders run interleaved, round by round, so that a busy machine slows all of them; the table shows medians. The
results are compared with the dense-mask definition before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phd_megatron.cli.tables import print_table
from phd_megatron.errors import UserError

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
STEPS = 10  # on CUDA, per measurement: the first launches must not be what is timed
REFERENCE_BYTES = 256 * 2**20  # the dense definition keeps several score tensors of this size; not timed above it
VANILLA = "vanilla causal SDPA"


@dataclass
class Contender:
    """Something to time: ``step`` is one forward + backward."""

    name: str
    step: Callable[[], None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="phd-megatron bench attention", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seq-length", type=int, default=2048, help="original tokens (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=2, help="K, copies of a token (default %(default)s)")
    parser.add_argument("--window", type=int, default=16, help="W, hidden positions seen (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=32, help="C, 0 for no chunks (default %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key-value heads (default %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="size of a head (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--dtype", choices=TOLERANCES, default=None, help="default float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds after one to warm up")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--only-phd", action="store_true", help="leave out the dense mask and naive repetition")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers there")
    parser.add_argument(
        "--fail-above", type=float, default=None, metavar="RATIO", help="exit 1 if sdpa / floor exceeds it"
    )
    return parser


def run(argv: list[str]) -> int:
    """Check, time, print. 1 if the check fails or ``--fail-above`` is exceeded."""
    args = _parser().parse_args(argv)
    for name in ("seq_length", "heads", "kv_heads", "head_dim", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(args, name)}: use 1 or more")
    if args.heads % args.kv_heads:
        raise UserError(f"--heads={args.heads} is not a multiple of --kv-heads={args.kv_heads}; change one of them")
    import torch

    from phd_megatron.kernels.phd_attention import choose_backend
    from phd_megatron.phd.kv_policy import KVPolicy

    try:
        policy = KVPolicy(args.repeat, args.window, args.chunk or None)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error).splitlines()[0]) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device={args.device}: this torch sees no CUDA device; use --device cpu")
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads={args.threads}: use 1 or more")
        torch.set_num_threads(args.threads)
    dtype_name = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    dtype = getattr(torch, dtype_name)
    backend, reason = choose_backend(device, dtype, args.head_dim)
    print(f"{policy.name}, {dtype_name} on {device}, {torch.get_num_threads()} CPU threads")
    print(f"auto = {backend}: {reason}")

    worst = _worst_error(policy, args, device, dtype)
    allowed = TOLERANCES[dtype_name]
    print(f"sdpa against the dense-mask definition: worst relative error {worst:.1e} (allowed {allowed:g})")
    if not worst <= allowed:
        print("error: the result is wrong, so it is not timed")
        return 1

    contenders, notes = _contenders(policy, args, device, dtype)
    samples = _interleaved(contenders, args.rounds, device)
    rows, records = _results(policy.repeat, samples, device.type == "cpu")
    columns = ["forward + backward", "ms", "x floor"] + (["CPU ms", "x floor (CPU)"] if device.type == "cpu" else [])
    shape = f"s={args.seq_length} b={args.batch} heads={args.heads}/{args.kv_heads} d={args.head_dim}"
    print_table(f"{shape}, medians of {args.rounds} interleaved rounds", columns, rows)
    for note in notes:
        print(note)
    if args.json is not None:
        settings = {k: v for k, v in vars(args).items() if k != "json"} | {"dtype": dtype_name, "device": str(device)}
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        where = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": machine, "auto": reason}
        report = {"policy": policy.name, "settings": settings, "where": where, "worst_error": worst, "rows": records}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    key = "cpu_ratio_to_floor" if device.type == "cpu" else "ratio_to_floor"
    ratio = next(record[key] for record in records if record["name"] == "PHD sdpa")
    if args.fail_above is not None and ratio > args.fail_above:
        print(f"error: sdpa takes {ratio:.3f} x the floor, more than --fail-above={args.fail_above:g}")
        return 1
    return 0


def _worst_error(policy: Any, args: argparse.Namespace, device: Any, dtype: Any) -> float:
    """Worst relative Frobenius error of output and gradients on a short sequence, against float64."""
    import torch

    from phd_megatron.kernels.phd_attention import phd_attention

    length = min(args.seq_length, 2 * policy.span + 37, 200)
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (policy.repeat, length, 1, heads, args.head_dim) for heads in (args.heads, *[args.kv_heads] * 2, args.heads)
    ]
    query, key, value, grad = (torch.randn(x, generator=generator).to(device, dtype) for x in shapes)

    def both(backend: str, *inputs: Any) -> list[Any]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = phd_attention(*leaves, policy, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    found = both("sdpa", query, key, value)
    expected = both("reference", query.double(), key.double(), value.double())
    floor = 1e-3 * float(grad.double().norm())
    return max(
        float((a.double() - b).norm()) / max(float(b.norm()), floor) for a, b in zip(found, expected, strict=True)
    )


def _contenders(policy: Any, args: argparse.Namespace, device: Any, dtype: Any) -> tuple[list[Contender], list[str]]:
    """What is timed, and a note on each thing that is not."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from phd_megatron.kernels.phd_attention import BACKENDS, phd_attention

    repeat, length, batch, width = policy.repeat, args.seq_length, args.batch, args.head_dim
    rows = repeat * length

    def step(attend: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[[], None]:
        leaves = [torch.randn(x, device=device, dtype=dtype, requires_grad=True) for x in shapes]
        grad = torch.randn(shapes[0], device=device, dtype=dtype)
        return lambda: void(torch.autograd.grad(attend(*leaves), leaves, grad))

    def void(_: object) -> None:
        return None

    def causal(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=args.heads != args.kv_heads)

    def causal_by(kernel: Any) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(kernel):
                return causal(q, k, v)

        return attend

    def flat(count: int) -> list[tuple[int, ...]]:
        return [(batch, heads, count, width) for heads in (args.heads, args.kv_heads, args.kv_heads)]

    def copies(count: int) -> list[tuple[int, ...]]:
        return [(count, length, batch, heads, width) for heads in (args.heads, args.kv_heads, args.kv_heads)]

    contenders, notes = [Contender(VANILLA, step(causal, *flat(length)))], []
    if device.type == "cuda":
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            name = f"{VANILLA}, {kernel.name.split('_')[0].lower()}"
            contender = Contender(name, step(causal_by(kernel), *flat(length)))
            try:
                contender.step()
            except RuntimeError as error:
                notes.append(f"{name} is not timed: {str(error).splitlines()[0]}")
            else:
                contenders.append(contender)
    for name in sorted(BACKENDS, reverse=True):
        scores = batch * args.heads * rows * rows * dtype.itemsize
        if name == "reference" and (args.only_phd or scores > REFERENCE_BYTES):
            why = "--only-phd" if args.only_phd else f"its scores alone take {scores / 2**20:.0f} MiB"
            notes.append(f"PHD reference is not timed: {why}")
            continue

        def attend(q: Any, k: Any, v: Any, name: str = name) -> Any:
            return phd_attention(q, k, v, policy, backend=name)

        contenders.append(Contender(f"PHD {name}", step(attend, *copies(repeat))))
    if not args.only_phd:
        mask = policy.mask(length, device=device)
        ratio = args.heads // args.kv_heads

        def dense(q: Any, k: Any, v: Any) -> Any:  # masked kernels know no grouped queries on CUDA: widen by hand
            k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        contenders.append(Contender("dense-mask SDPA over K*s", step(dense, *flat(rows))))
        contenders.append(Contender("naive repetition, causal over K*s", step(causal, *flat(rows))))
    return contenders, notes


def _timed(step: Callable[[], None], device: Any) -> tuple[float, float]:
    """Milliseconds of one step: elapsed (by the device's own clock on CUDA), and CPU time of this process."""
    import torch

    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        torch.cuda.synchronize(device)
        start.record(stream)
        for _ in range(STEPS):
            step()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / STEPS, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def _interleaved(
    contenders: Sequence[Contender], rounds: int, device: Any
) -> dict[str, tuple[list[float], list[float]]]:
    """Samples by name, ``(elapsed, CPU)``; the first round only warms up, and each round starts with another one."""
    samples: dict[str, tuple[list[float], list[float]]] = {c.name: ([], []) for c in contenders}
    for turn in range(rounds + 1):
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            wall, cpu = _timed(contender.step, device)
            if turn:
                samples[contender.name][0].append(wall)
                samples[contender.name][1].append(cpu)
    return samples


def _results(
    repeat: int, samples: dict[str, tuple[list[float], list[float]]], with_cpu: bool
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Table rows and JSON records; the floor comes second, right below what it is made of."""
    medians = {name: [statistics.median(x) for x in pair] for name, pair in samples.items()}
    floor = [repeat * min(pair[i] for name, pair in medians.items() if name.startswith(VANILLA)) for i in range(2)]
    names = list(medians)
    medians[f"floor: {repeat} x vanilla"] = floor
    rows, records = [], []
    vanilla = sum(name.startswith(VANILLA) for name in names)
    for name in [*names[:vanilla], f"floor: {repeat} x vanilla", *names[vanilla:]]:
        wall, cpu = medians[name]
        record: dict[str, Any] = {"name": name, "milliseconds": wall, "ratio_to_floor": wall / floor[0]}
        row = [name, f"{wall:.3g}" if wall < 100 else f"{wall:.0f}", f"{wall / floor[0]:.3f}"]
        if with_cpu:
            record |= {"cpu_milliseconds": cpu, "cpu_ratio_to_floor": cpu / floor[1]}
            row += [f"{cpu:.3g}" if cpu < 100 else f"{cpu:.0f}", f"{cpu / floor[1]:.3f}"]
        if name in samples:
            record["samples"] = samples[name][0]
        rows.append(row)
        records.append(record)
    return rows, records
