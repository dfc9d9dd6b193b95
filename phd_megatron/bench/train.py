"""``phd-megatron bench train``: our training step against Hugging Face's, and PHD against vanilla.

Contenders see the same batches and run interleaved, step by step, so that a busy machine slows all of them; the table
shows medians. Ours is the whole step of ``pretrain`` (schedule, gradient buffers, clipping, distributed optimizer);
Hugging Face's is ``LlamaForCausalLM`` with SDPA, gradient clipping and ``AdamW(fused=True)`` in a process of its own
(:mod:`phd_megatron.bench.hugging_face`). With ``--bf16`` ours keeps float32 weights and gradients beside the
bfloat16 ones, as ``pretrain`` does; Hugging Face's keeps bfloat16 alone, which is less work, and once more float32
weights under autocast, as its Trainer does. Before anything is timed the vanilla models, given the same weights, must
have the same loss.

With ``--preset NAME`` variants of that model are compared instead: see ``bench train --preset NAME --help``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from phd_megatron.bench.hugging_face import HuggingFaceStep
from phd_megatron.bench.measure import REPORT, check_reports
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.tables import print_table
from phd_megatron.errors import UserError
from phd_megatron.runtime.output import write_file

SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {
        "num_layers": 6,
        "hidden_size": 128,
        "ffn_hidden_size": 384,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 256,
        "vocab_size": 384,
        "micro_batch_size": 16,
    },
    "12x768": {
        "num_layers": 12,
        "hidden_size": 768,
        "ffn_hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "seq_length": 1024,
        "vocab_size": 32000,
        "micro_batch_size": 1,
    },
    "1p2b": {  # preset phd-1.2b
        "num_layers": 16,
        "hidden_size": 2048,
        "ffn_hidden_size": 8192,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "seq_length": 4096,
        "vocab_size": 32000,
        "micro_batch_size": 1,
    },
}
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
HUGGING_FACE, SAME_MEMORY, AUTOCAST = (f"Hugging Face Llama{kind}" for kind in ("", ", our malloc", ", autocast"))
#: a batch ``[b, s + 1]`` to its loss and the seconds that the step took
Step = Callable[[Any], tuple[float, float]]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="phd-megatron bench train", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="quickstart", help="model and batch (default %(default)s)")
    parser.add_argument("--seq-length", type=int, default=None, help="instead of the size's own")
    parser.add_argument("--micro-batch-size", type=int, default=None, help="instead of the size's own")
    parser.add_argument("--repeat", type=int, default=2, help="K of the PHD contender (default %(default)s)")
    parser.add_argument("--norm-scheme", default="hybrid_star", help="scheme of a further contender at K = 1")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each, after two to warm up")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 parameters")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--transformer-impl", choices=("auto", "local", "transformer_engine"), default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: one per usable core)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the numbers there")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if we are slower than Hugging Face or PHD exceeds K"
    )
    return parser


def run(argv: list[str]) -> int:
    """Check, time, print. 1 if ``--check`` was asked for and a bound is missed."""
    if any(word.split("=")[0] == "--preset" for word in argv):
        from phd_megatron.bench import members as bench_members

        return bench_members.run(argv)
    args = parse_strictly(_parser(), argv)
    check_reports(args)
    from phd_megatron.runtime.context import Runtime

    with Runtime.start(ParallelConfig(device=args.device), verbose=False) as runtime:
        import torch

        if args.threads:
            torch.set_num_threads(args.threads)
        runs = _runs(args)
        batches = _batches(runs["vanilla"])
        with ExitStack() as peers:
            steps = _peers(args, runs["vanilla"], runtime, peers)
            for name, config in runs.items():
                steps[name] = _our_step(config, runtime)
            _check_losses(steps, batches, "bfloat16" if args.bf16 else "float32")
            seconds = _measure(steps, batches, args.rounds)
        return _show(args, runs, seconds, runtime)


def _peers(args: argparse.Namespace, config: RunConfig, runtime: Any, peers: ExitStack) -> dict[str, Step]:
    weights = _our_weights(config)
    kinds: dict[str, dict[str, bool]] = {HUGGING_FACE: {}}
    if runtime.on_cpu:
        kinds[SAME_MEMORY] = {"keep_freed_memory": True}
    if args.bf16:
        kinds[AUTOCAST] = {"autocast": True}
    return {
        name: peers.enter_context(HuggingFaceStep(config, weights, runtime.device, **kind))
        for name, kind in kinds.items()
    }


def _runs(args: argparse.Namespace) -> dict[str, RunConfig]:
    size = dict(SIZES[args.size])
    for name in ("rounds", "repeat", "threads", "seq_length", "micro_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    for name in ("seq_length", "micro_batch_size"):
        if (value := getattr(args, name)) is not None:
            size[name] = value
    micro_batch_size = size.pop("micro_batch_size")
    model = ModelConfig(**size, transformer_impl=args.transformer_impl)
    vanilla = RunConfig(
        model=model,
        training=TrainingConfig(micro_batch_size=micro_batch_size, train_iters=1, bf16=args.bf16),
        optimizer=OptimizerConfig(lr=1e-4),
    )
    runs = {
        "vanilla": vanilla,
        args.norm_scheme: replace(vanilla, model=replace(model, norm_scheme=args.norm_scheme)),
        f"PHD K={args.repeat}": replace(vanilla, model=replace(model, phd_repeat=args.repeat)),
    }
    for config in runs.values():
        resolve(config)
    return runs


def _batches(config: RunConfig) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    assert config.model.vocab_size is not None
    shape = (config.training.micro_batch_size, config.model.seq_length + 1)
    return [torch.randint(0, config.model.vocab_size, shape, generator=generator) for _ in range(4)]


def _our_step(config: RunConfig, runtime: Any) -> Step:
    import torch

    from phd_megatron.model.build import build_model
    from phd_megatron.training.optimizer import build_optimizer, wrap_data_parallel
    from phd_megatron.training.step import Stepper

    assert config.model.vocab_size is not None
    models = wrap_data_parallel(build_model(config, config.model.vocab_size, runtime.device), config)
    optimizer = build_optimizer(models, config)
    size, length = config.training.micro_batch_size, config.model.seq_length
    stepper = Stepper(models, optimizer, runtime.device, size, length, config.model.phd_repeat)
    positions = torch.arange(length).expand(size, -1)
    mask = torch.ones(size, length)

    def step(tokens: Any) -> tuple[float, float]:
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions, "loss_mask": mask}
        runtime.synchronize()
        start = time.perf_counter()
        total, count = stepper.train(iter([batch]), 1).loss.tolist()
        runtime.synchronize()
        return float(total / count), time.perf_counter() - start

    step.model = models[0]  # type: ignore[attr-defined]
    return step


def _our_weights(config: RunConfig) -> dict[str, Any]:
    """The values that our initialisation draws, by Hugging Face's names, through the export's mapping."""
    import torch

    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.mapping import model_rules
    from phd_megatron.model.build import build_model

    assert config.model.vocab_size is not None
    local = replace(config, model=replace(config.model, transformer_impl="local"))  # this copy is on the CPU
    tensors = dict(build_model(local, config.model.vocab_size, torch.device("cpu"))[0].named_parameters())
    weights: dict[str, Any] = {}
    architecture = Architecture.from_model(config.model, config.model.vocab_size)
    for rule in model_rules(architecture, architecture.model_class()):
        weights.update(rule.to_hf(tensors[rule.mcore].detach()))
    return weights


def _check_losses(steps: dict[str, Step], batches: list[Any], dtype: str) -> None:
    """First losses with equal weights; these steps are the warm-up too."""
    losses = {name: [step(batch)[0] for batch in batches[:2]] for name, step in steps.items()}
    expected = losses[HUGGING_FACE][0]
    for name in ("vanilla", AUTOCAST):
        if name in losses and abs(losses[name][0] - expected) > LOSS_TOLERANCE[dtype] * abs(expected):
            raise UserError(
                f"the loss of {name} is {losses[name][0]}, Hugging Face's with the same weights {expected}; they "
                f"should agree within {LOSS_TOLERANCE[dtype]:g}, so a timing would compare different things. "
                "Please report this"
            )


def _measure(steps: dict[str, Step], batches: list[Any], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step(batches[number % len(batches)])[1])
    return seconds


def _show(args: argparse.Namespace, runs: dict[str, RunConfig], seconds: dict[str, list[float]], runtime: Any) -> int:
    from phd_megatron.config.architecture import padded_vocab_size
    from phd_megatron.planning.flops import forward_flops
    from phd_megatron.planning.peak import peak_tflops

    config = runs["vanilla"]
    size, model = config.training.micro_batch_size, config.model
    assert model.vocab_size is not None
    tokens, vocabulary = (
        size * model.seq_length,
        padded_vocab_size(model.vocab_size, model.make_vocab_size_divisible_by),
    )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    # Ratios pair the steps of one round, so that a slow moment of the machine falls on both sides.
    ratio = {
        name: statistics.median(a / b for a, b in zip(values, seconds["vanilla"], strict=True))
        for name, values in seconds.items()
    }
    tflops = {
        name: forward_flops(runs.get(name, config).model, vocabulary).training * size / value / 1e12
        for name, value in median.items()
    }
    peak = peak_tflops(None, runtime.device_name) if args.bf16 else None
    rows = [
        [name, f"{value * 1e3:.1f}", f"{tokens / value:.0f}", f"{ratio[name]:.3f}", f"{tflops[name]:.3g}"]
        + ([f"{tflops[name] / peak:.1%}"] if peak else [])
        for name, value in median.items()
    ]
    precision = "bfloat16" if args.bf16 else "float32"
    machine = platform.processor() or platform.machine() if runtime.on_cpu else runtime.device_name
    where = f"{runtime.describe()}, {machine}"
    title = (
        f"training step, {args.size}: {size} x {model.seq_length} tokens, {precision}, median of {args.rounds}; {where}"
    )
    columns = ["model", "ms", "original tokens/s", "time / vanilla", "TFLOP/s"] + (["MFU"] if peak else [])
    print_table(title, columns, rows)
    if peak:
        print(f"MFU is the share of {peak:g} TFLOP/s, the dense bfloat16 peak")
    ahead, phd = ratio[HUGGING_FACE], ratio[f"PHD K={args.repeat}"]
    print(f"vanilla is {ahead:.3f} x as fast as Hugging Face; PHD K={args.repeat} takes {phd:.3f} x the vanilla step")
    if args.json is not None:
        report = {"size": args.size, "precision": precision, "where": where, "peak_tflops": peak}
        report |= {"tokens": tokens, "seconds": seconds, "time_ratio": ratio, "tflops": tflops}
        write_file(args.json, "--json", REPORT, json.dumps(report, indent=1))
    return int(args.check and (ahead < 1.0 or phd > args.repeat))
