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
import json
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phd_megatron.bench.measure import REPORT, check_counts, check_reports
from phd_megatron.config.cuda_graph import is_graphed
from phd_megatron.config.load import load_run_config
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.tables import print_table
from phd_megatron.errors import UserError
from phd_megatron.runtime.output import write_file

MEMBERS = {
    "vanilla": "--norm-scheme pre --phd-repeat 1",
    "hybrid_star": "--norm-scheme hybrid_star --phd-repeat 1",
    "K=2": "--norm-scheme pre --phd-repeat 2",
    "K=3": "--norm-scheme pre --phd-repeat 3",
    "repeated": "--phd-copy-positions repeated",
    "fraction": "--phd-copy-positions fraction",
    "vector": "--phd-copy-embedding vector",
    "delayed": "--norm-scheme pre --phd-repeat 1 --fp8-format hybrid --fp8-recipe delayed",
    "tensorwise": "--norm-scheme pre --phd-repeat 1 --fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--norm-scheme pre --phd-repeat 1 --fp8-format e4m3 --fp8-recipe blockwise",
    # Recorded in the third step, the last that is not timed.
    "graph": "--cuda-graph-impl local --cuda-graph-scope full_iteration --cuda-graph-warmup-steps 2 "
    "--overlap-grad-reduce false --overlap-param-gather false",
}
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
    ("MoE routing", ("permute", "topk", "sort", "scatter", "gather")),
    ("communication", ("nccl", "c10d", "gloo")),
    ("copies", ("memcpy", "memset", "copy")),
)


@dataclass
class Measured:
    """One member.

    Attributes:
        seconds: of each timed step.
        flops: of a step, by the convention above.
        peak_bytes: most device memory in use; None on a CPU.
        breakdown: seconds of one step by kind of kernel; ``idle`` is what no kernel covers.
    """

    name: str
    loss: float
    seconds: list[float]
    flops: float
    tokens: int
    copies: int
    peak_bytes: int | None
    breakdown: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="phd-megatron bench train --preset NAME", description=__doc__)
    parser.add_argument("--preset", required=True, help="the model (docs/presets.md)")
    parser.add_argument(
        "--members",
        nargs="+",
        default=["vanilla", "hybrid_star", "K=2", "K=3"],
        metavar="NAME",
        help=f"of {', '.join(MEMBERS)}; joined by + where both shall hold, as K=2+delayed or K=2+vector",
    )
    parser.add_argument("--options", default="", help='further options of pretrain for all, e.g. "--vocab-size 50304"')
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--num-microbatches", type=int, default=1, help="of a step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each, after three to warm up")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--peak-tflops", type=float, default=None, help="instead of the table's for this device")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers there")
    return parser


def run(argv: list[str]) -> int:
    """Time the members one after another and print the tables. 1 if a member could not be measured."""
    args = parse_strictly(_parser(), argv)
    check_reports(args)
    check_counts(args, ("micro_batch_size", "num_microbatches", "rounds"))
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
                print(f"{name} was not measured: {failed[name]}", flush=True)
            _free(runtime)
        if measured:
            _show(args, measured, runtime)
        return int(bool(failed))


def _configure(args: argparse.Namespace, name: str) -> RunConfig:
    from phd_megatron.model.transformer_config import transformer_field_types

    words = ["--preset", args.preset]
    for part in name.split("+"):
        if part not in MEMBERS:
            raise UserError(f"--members {name}: {part!r} is none of {', '.join(MEMBERS)}")
    # What a part says beyond the first one's defaults: in K=2+delayed both K and the recipe count.
    default = dict(_pairs(MEMBERS["vanilla"]))
    changes = dict(default)
    for part in name.split("+"):
        changes |= {flag: value for flag, value in _pairs(MEMBERS[part]) if value != default.get(flag)}
    size = args.micro_batch_size
    batch = ["--micro-batch-size", str(size), "--global-batch-size", str(size * args.num_microbatches)]
    flags = [word for pair in changes.items() for word in pair]
    try:
        options = shlex.split(args.options)
    except ValueError as error:
        raise UserError(f"--options {args.options!r}: {error}; close the quotation") from None
    loaded = load_run_config([*words, *batch, *flags, *options], transformer_fields=transformer_field_types())
    model = loaded.config.model
    if model.transformer.get("fp8") and model.transformer.get("num_moe_experts"):
        # FP8 products take rows in multiples of 16 alone, and a router sends any number of them.
        model.transformer["moe_router_padding_for_quantization"] = True
    resolve(loaded.config)
    return loaded.config


def _pairs(options: str) -> list[tuple[str, str]]:
    words = options.split()
    return list(zip(words[::2], words[1::2], strict=True))


def _measure(name: str, config: RunConfig, args: argparse.Namespace, runtime: Any) -> Measured:
    from phd_megatron.model.build import build_model
    from phd_megatron.training.cuda_graph import StepGraph
    from phd_megatron.training.optimizer import build_optimizer, let_go, wrap_data_parallel
    from phd_megatron.training.step import Stepper

    model = config.model
    assert model.vocab_size is not None
    models = wrap_data_parallel(build_model(config, model.vocab_size, runtime.device), config)
    try:
        optimizer, size = build_optimizer(models, config), args.micro_batch_size
        graph = StepGraph.of_run(config, models, runtime.device, runtime.log)
        stepper = Stepper(models, optimizer, runtime.device, size, model.seq_length, model.phd_repeat, graph)
        return _time(name, config, stepper, args, runtime)
    finally:
        let_go(models)


def _time(name: str, config: RunConfig, stepper: Any, args: argparse.Namespace, runtime: Any) -> Measured:
    import torch

    from phd_megatron.config.architecture import padded_vocab_size
    from phd_megatron.planning.flops import forward_flops

    model, size, count, cuda = config.model, args.micro_batch_size, args.num_microbatches, not runtime.on_cpu
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (size, model.seq_length + 1), generator=generator)
    positions = torch.arange(model.seq_length).expand(size, -1)
    mask = torch.ones(size, model.seq_length)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions, "loss_mask": mask}
    batch = {key: value.contiguous().pin_memory() if cuda else value for key, value in batch.items()}

    def step() -> tuple[float, float]:
        runtime.synchronize()
        start = time.perf_counter()
        total, number = stepper.train(iter([batch] * count), count).loss.tolist()
        runtime.synchronize()
        return float(total / number), time.perf_counter() - start

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first = step()[0]
    for _ in range(2):
        step()
    seconds = [step()[1] for _ in range(args.rounds)]
    flops = forward_flops(model, padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by)).training
    found = Measured(
        name=name,
        loss=first,
        seconds=seconds,
        flops=float(flops) * size * count,
        tokens=size * count * model.seq_length,
        copies=model.phd_repeat,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        breakdown=_breakdown(step, cuda),
    )
    print(f"{name}: loss {first:.4f}, {found.median * 1e3:.1f} ms", flush=True)
    return found


def _breakdown(step: Any, cuda: bool) -> dict[str, float]:
    """Seconds by kind in one profiled step."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as trace:
        wall = step()[1]
    found: dict[str, float] = {}
    for event in trace.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros:
            kind = kind_of(event.key)
            found[kind] = found.get(kind, 0.0) + micros / 1e6
    found["idle"] = max(0.0, wall - sum(found.values()))
    return found


def kind_of(kernel: str) -> str:
    """What a kernel or an operator of that name is counted as."""
    lower = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "other")


def _free(runtime: Any) -> None:
    import torch

    gc.collect()
    if not runtime.on_cpu:
        torch.cuda.empty_cache()


def _show(args: argparse.Namespace, measured: Sequence[Measured], runtime: Any) -> None:
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
    if peak:
        print(f"MFU is the share of {peak:g} TFLOP/s, the dense bfloat16 peak")
    kinds = sorted({kind for member in measured for kind in member.breakdown})
    lines = [
        [member.name, *(f"{member.breakdown.get(kind, 0.0) * 1e3:.1f}" for kind in kinds)]
        for member in measured
        if member.breakdown
    ]
    print_table("milliseconds of one profiled step by kind of kernel", ["member", *kinds], lines)


def _write(args: argparse.Namespace, measured: Sequence[Measured], runtime: Any) -> None:
    from phd_megatron.planning.peak import peak_tflops

    if args.json is None:
        return
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    report: dict[str, Any] = {"settings": settings, "where": f"{runtime.describe()}, {runtime.device_name}"}
    report |= {"peak_tflops": peak_tflops(args.peak_tflops, runtime.device_name)}
    report |= {"members": [vars(member) for member in measured]}
    write_file(args.json, "--json", REPORT, json.dumps(report, indent=1) + "\n")
