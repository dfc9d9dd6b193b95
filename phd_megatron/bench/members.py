"""``phd-megatron bench train --preset NAME``: whole training steps of variants of one model, in one run.

A member is the preset with a few options changed: vanilla, K = 2 and 3, HybridNorm*, FP8 recipes, the step as a CUDA
graph. Each is built, warmed up, timed and freed in turn, and the first one is timed once more at the end, which shows
how far the machine drifted. A step is that of ``pretrain``: micro-batches, gradient buffers, clipping, optimizer. Token
ids are random: the time of a step does not depend on them, except for how evenly a router spreads tokens over experts.

Beside every time stands its floor: the FLOPs of the member over those of the first (:mod:`phd_megatron.planning.flops`;
KVPolicy's pairs, backward twice the forward, recomputation not counted). MFU is the same FLOPs over the dense bfloat16
peak of the device, for FP8 members too. The breakdown sums the time of kernels by kind, from one profiled step.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phd_megatron.bench.arguments import MEMBERS
from phd_megatron.bench.results import settings_of, write_json
from phd_megatron.bench.training_step import OurStep, batch_of, random_tokens, sample_flops, say_peak
from phd_megatron.config.cuda_graph import is_graphed
from phd_megatron.config.load import load_run_config
from phd_megatron.config.plain import Plain
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.console.tables import print_table
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from phd_megatron.runtime.context import Runtime

#: what a kernel's name has in it, and what it is counted as; the first that fits counts
KINDS = (
    ("optimizer", ("multi_tensor", "adam", "l2norm", "foreach")),
    ("SwiGLU", ("swiglu", "silu")),
    ("cross-entropy", ("cross_entropy",)),
    ("norm and RoPE", ("norm", "rope")),
    ("attention", ("fmha", "flash", "sdpa", "attention", "window_forward", "window_backward", "compute_dot_do_o")),
    ("attention", ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel", "delta_kernel")),
    ("GEMM", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "addmm", "aten::mm", "aten::bmm", "splitk")),
    ("FP8 cast", ("fp8", "cast_transpose", "quantize", "amax")),
    ("MoE routing", ("permute", "topk", "sort", "scatter", "gather", "clear_empty_groups", "cumsum", "scan")),
    ("communication", ("nccl", "c10d", "gloo")),
    ("copies", ("memcpy", "memset", "copy")),
)


#: kernels that the results name
LISTED = 40


@dataclass
class Measured:
    """One member.

    Attributes:
        seconds: of each timed step.
        flops: of a step, by the convention above.
        peak_bytes: most device memory in use; None on a CPU.
        breakdown: seconds of one step by kind of kernel; ``idle`` is what no kernel covers.
        kernels: seconds of the longest kernels of that step by name, longest first.
    """

    name: str
    loss: float
    seconds: list[float]
    flops: float
    tokens: int
    copies: int
    peak_bytes: int | None
    breakdown: dict[str, float]
    kernels: dict[str, float]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def run(args: argparse.Namespace) -> int:
    """Time the members one after another and print the tables. 1 if a member could not be measured."""
    from phd_megatron.runtime.context import Runtime

    with Runtime.start(ParallelConfig(device=args.device), verbose=False) as runtime:
        configs = {name: _configure(args, name) for name in args.members}
        if any(is_graphed(config.model) for config in configs.values()):
            from phd_megatron.training.cuda_graph import keep_profiler

            keep_profiler()
        measured, failed = [], {}
        for name in [*configs, args.members[0]]:
            try:
                measured.append(_measure(name, configs[name], args, runtime))
                _write(args, measured, runtime)  # what is measured is kept, whatever comes after
            except (RuntimeError, UserError) as error:  # out of memory, or no such recipe here: the others go on
                said = str(error).strip()
                failed[name] = said if isinstance(error, UserError) else said.splitlines()[0]
                show(f"{name} was not measured: {failed[name]}", now=True)
            _free(runtime)
        if measured:
            _show(args, measured, runtime)
        return int(bool(failed))


def _configure(args: argparse.Namespace, name: str) -> RunConfig:
    from phd_megatron.model.transformer_config import transformer_field_types

    words = ["--preset", args.preset]
    known = {part: _pairs(options) for part, options in (MEMBERS | dict(args.define)).items()}
    for part in name.split("+"):
        if part not in known:
            raise UserError(f"--members {name}: {part!r} is none of {', '.join(known)}; --define NAME OPTIONS adds one")
    # What a part says beyond the first one's defaults: in K=2+delayed both K and the recipe count.
    default = dict(known["vanilla"])
    changes = dict(default)
    for part in name.split("+"):
        changes |= {flag: value for flag, value in known[part] if value != default.get(flag)}
    size = args.micro_batch_size
    batch = ["--micro-batch-size", str(size), "--global-batch-size", str(size * args.num_microbatches)]
    flags = [word for pair in changes.items() for word in pair]
    options = _words("--options", args.options)
    loaded = load_run_config([*words, *batch, *flags, *options], transformer_fields=transformer_field_types())
    model = loaded.config.model
    if model.transformer.get("fp8") and model.moe_experts_backend in ("te", "sequential"):
        # FP8 products take rows in multiples of 16 alone, and a router sends any number of them.
        model.transformer["moe_router_padding_for_quantization"] = True
    resolve(loaded.config)
    return loaded.config


def _words(flag: str, options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise UserError(f"{flag} {options!r}: {error}; close the quotation") from None


def _pairs(options: str) -> list[tuple[str, str]]:
    words = _words("--define", options)
    if len(words) % 2 or any(not flag.startswith("--") for flag in words[::2]):
        raise UserError(
            f"--define {options!r} is no list of options that each have one value; write --option value, and true or "
            "false for a switch"
        )
    return list(zip(words[::2], words[1::2], strict=True))


def _measure(name: str, config: RunConfig, args: argparse.Namespace, runtime: Runtime) -> Measured:
    import torch

    cuda, size, count = not runtime.on_cpu, args.micro_batch_size, args.num_microbatches
    tokens = random_tokens(config.model, size, torch.Generator().manual_seed(0))
    batch = {key: value.contiguous() for key, value in batch_of(tokens).items()}
    if cuda:
        batch = {key: value.pin_memory() for key, value in batch.items()}
    with OurStep(config, runtime) as ours:

        def step() -> tuple[float, float]:
            return ours(*[batch] * count)

        if cuda:
            torch.cuda.reset_peak_memory_stats()
        first = step()[0]
        for _ in range(2):
            step()
        seconds = [step()[1] for _ in range(args.rounds)]
        peak_bytes = torch.cuda.max_memory_allocated() if cuda else None
        kernels, idle = _profile(step, cuda)
        found = Measured(
            name=name,
            loss=first,
            seconds=seconds,
            flops=float(sample_flops(config.model)) * size * count,
            tokens=size * count * config.model.seq_length,
            copies=config.model.phd_repeat,
            peak_bytes=peak_bytes,
            breakdown=_by_kind(kernels) | {"idle": idle},
            kernels=dict(kernels[:LISTED]),
        )
    show(f"{name}: loss {first:.4f}, {found.median * 1e3:.1f} ms", now=True)
    return found


def _profile(step: Callable[[], tuple[float, float]], cuda: bool) -> tuple[list[tuple[str, float]], float]:
    """Seconds of each kernel of one step, longest first, and of none."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as trace:
        wall = step()[1]
    events = [(e.key, e.self_device_time_total if cuda else e.self_cpu_time_total) for e in trace.key_averages()]
    kernels = sorted(((name, micros / 1e6) for name, micros in events if micros), key=lambda kernel: -kernel[1])
    return kernels, max(0.0, wall - sum(seconds for _, seconds in kernels))


def _by_kind(kernels: Sequence[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, seconds in kernels:
        kind = kind_of(name)
        found[kind] = found.get(kind, 0.0) + seconds
    return found


def kind_of(kernel: str) -> str:
    """What a kernel or an operator of that name is counted as."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "other")


def _free(runtime: Runtime) -> None:
    import torch

    gc.collect()
    if not runtime.on_cpu:
        torch.cuda.empty_cache()


def _show(args: argparse.Namespace, measured: Sequence[Measured], runtime: Runtime) -> None:
    from phd_megatron.planning.peak import peak_tflops

    first = measured[0]
    peak = peak_tflops(args.peak_tflops, runtime.device_name)
    rows = []
    for member in measured:
        tflops = member.flops / member.median / 1e12
        rows.append(
            [
                member.name,
                f"{member.median * 1e3:.1f}",
                f"{member.tokens / member.median:,.0f}",
                f"{member.copies * member.tokens / member.median:,.0f}",
                f"{member.median / first.median:.3f}",
                f"{member.flops / first.flops:.3f}",
                f"{tflops:.3g}",
                f"{tflops / peak:.1%}" if peak else "",
                f"{member.peak_bytes / 2**30:.1f}" if member.peak_bytes is not None else "",
            ]
        )
    where = f"{runtime.describe()}, {runtime.device_name}"
    batch = f"{args.micro_batch_size} x {args.num_microbatches}"
    length = first.tokens // (args.micro_batch_size * args.num_microbatches)
    title = f"training step, {args.preset}, {batch} samples of {length} tokens, median of {args.rounds}; {where}"
    columns = ["member", "ms", "original tokens/s", "processed tokens/s", f"time / {first.name}", "FLOPs", "TFLOP/s"]
    print_table(title, [*columns, "MFU", "peak GiB"], rows)
    say_peak(peak)
    kinds = sorted({kind for member in measured for kind in member.breakdown})
    lines = [
        [member.name, *(f"{member.breakdown.get(kind, 0.0) * 1e3:.1f}" for kind in kinds)]
        for member in measured
        if member.breakdown
    ]
    print_table("milliseconds of one profiled step by kind of kernel", ["member", *kinds], lines)


def _write(args: argparse.Namespace, measured: Sequence[Measured], runtime: Runtime) -> None:
    from phd_megatron.planning.peak import peak_tflops

    report: dict[str, Plain] = {"settings": settings_of(args)}
    report["where"] = f"{runtime.describe()}, {runtime.device_name}"
    report["peak_tflops"] = peak_tflops(args.peak_tflops, runtime.device_name)
    report["members"] = [vars(member) for member in measured]
    write_json(args.json, report)
