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
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phd_megatron.bench.arguments import SIZES
from phd_megatron.bench.hugging_face import HuggingFaceStep
from phd_megatron.bench.results import write_json
from phd_megatron.bench.timing import interleaved, median_ratio
from phd_megatron.bench.training_step import OurStep, batch_of, random_tokens, sample_flops, say_peak, vocabulary_of
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from phd_megatron.console.tables import print_table
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

    from phd_megatron.runtime.context import Runtime

    #: a batch ``[b, s + 1]`` to its loss and the seconds that the step took
    Step = Callable[[torch.Tensor], tuple[float, float]]

LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
HUGGING_FACE, SAME_MEMORY, AUTOCAST = (f"Hugging Face Llama{kind}" for kind in ("", ", our malloc", ", autocast"))


def run(args: argparse.Namespace) -> int:
    """Check, time, print. 1 if ``--check`` was asked for and a bound is missed."""
    from phd_megatron.runtime.context import Runtime

    with Runtime.start(ParallelConfig(device=args.device), verbose=False) as runtime:
        import torch

        if args.threads:
            torch.set_num_threads(args.threads)
        runs = _runs(args)
        generator, vanilla = torch.Generator().manual_seed(0), runs["vanilla"]
        batches = [random_tokens(vanilla.model, vanilla.training.micro_batch_size, generator) for _ in range(4)]
        with ExitStack() as models:
            steps = _peers(args, vanilla, runtime, models)
            for name, config in runs.items():
                steps[name] = _ours(models.enter_context(OurStep(config, runtime)))
            _check_losses(steps, batches, "bfloat16" if args.bf16 else "float32")
            seconds = _measure(steps, batches, args.rounds)
        return _show(args, _Table(args, runs, seconds, runtime))


def _peers(args: argparse.Namespace, config: RunConfig, runtime: Runtime, peers: ExitStack) -> dict[str, Step]:
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
    for name in ("seq_length", "micro_batch_size"):
        if (value := getattr(args, name)) is not None:
            size[name] = value
    micro_batch_size = size.pop("micro_batch_size")
    model = ModelConfig(transformer_impl=args.transformer_impl)
    for name, value in size.items():
        setattr(model, name, value)
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


def _ours(step: OurStep) -> Step:
    return lambda tokens: step(batch_of(tokens))


def _our_weights(config: RunConfig) -> dict[str, torch.Tensor]:
    """The values that our initialisation draws, by Hugging Face's names, through the export's mapping."""
    import torch

    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.families import export_family
    from phd_megatron.huggingface.mapping import model_rules
    from phd_megatron.model.build import build_model

    vocabulary = vocabulary_of(config.model)
    local = replace(config, model=replace(config.model, transformer_impl="local"))  # this copy is on the CPU
    tensors = dict(build_model(local, vocabulary, torch.device("cpu"))[0].named_parameters())
    weights: dict[str, torch.Tensor] = {}
    architecture = Architecture.from_model(config.model, vocabulary)
    for rule in model_rules(architecture, export_family(architecture)):
        weights.update(rule.to_hf(tensors[rule.mcore].detach()))
    return weights


def _check_losses(steps: Mapping[str, Step], batches: Sequence[torch.Tensor], dtype: str) -> None:
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


def _measure(steps: Mapping[str, Step], batches: Sequence[torch.Tensor], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn, (name, step) in interleaved([*steps.items()], rounds):
        seconds[name].append(step(batches[turn % len(batches)])[1])
    return seconds


@dataclass(frozen=True)
class _Table:
    """What was measured, and what it says."""

    args: argparse.Namespace
    runs: Mapping[str, RunConfig]
    seconds: Mapping[str, Sequence[float]]
    runtime: Runtime

    @property
    def size(self) -> int:
        """Samples of a step."""
        return self.runs["vanilla"].training.micro_batch_size

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.size * self.runs["vanilla"].model.seq_length

    @property
    def median(self) -> dict[str, float]:
        """Seconds of a step."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    @property
    def ratio(self) -> dict[str, float]:
        """To vanilla, round by round."""
        return {name: median_ratio(values, self.seconds["vanilla"]) for name, values in self.seconds.items()}

    @property
    def tflops(self) -> dict[str, float]:
        """A second, of the model's FLOPs; a peer has vanilla's."""
        return {
            name: sample_flops(self.runs.get(name, self.runs["vanilla"]).model) * self.size / value / 1e12
            for name, value in self.median.items()
        }

    @property
    def where(self) -> str:
        """Layout and machine."""
        on_cpu = self.runtime.on_cpu
        machine = platform.processor() or platform.machine() if on_cpu else self.runtime.device_name
        return f"{self.runtime.describe()}, {machine}"


def _show(args: argparse.Namespace, table: _Table) -> int:
    from phd_megatron.planning.peak import peak_tflops

    median, ratio, tflops = table.median, table.ratio, table.tflops
    peak = peak_tflops(None, table.runtime.device_name) if args.bf16 else None
    rows = [
        [name, f"{value * 1e3:.1f}", f"{table.tokens / value:.0f}", f"{ratio[name]:.3f}", f"{tflops[name]:.3g}"]
        + ([f"{tflops[name] / peak:.1%}"] if peak else [])
        for name, value in median.items()
    ]
    precision, length = "bfloat16" if args.bf16 else "float32", table.tokens // table.size
    title = f"training step, {args.size}: {table.size} x {length} tokens, {precision}, median of {args.rounds}; "
    columns = ["model", "ms", "original tokens/s", "time / vanilla", "TFLOP/s"] + (["MFU"] if peak else [])
    print_table(title + table.where, columns, rows)
    say_peak(peak)
    ahead, phd = ratio[HUGGING_FACE], ratio[f"PHD K={args.repeat}"]
    show(f"vanilla is {ahead:.3f} x as fast as Hugging Face; PHD K={args.repeat} takes {phd:.3f} x the vanilla step")
    report = {"size": args.size, "precision": precision, "where": table.where, "peak_tflops": peak}
    report |= {"tokens": table.tokens, "seconds": table.seconds, "time_ratio": ratio, "tflops": tflops}
    write_json(args.json, report)
    return int(args.check and (ahead < 1.0 or phd > args.repeat))
