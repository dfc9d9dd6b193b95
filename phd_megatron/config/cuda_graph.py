"""CUDA graphs of a training step in a configuration: when there is one, and what cannot be in it.

The one scope is Megatron-Core's ``full_iteration``: forward and backward of all micro-batches. What is recorded is a
list of kernels and addresses. So nothing inside may depend on a number that the host reads, on Python that runs in
every step, or on a tensor that moves. What the machine and the layout must bring is
:mod:`phd_megatron.runtime.requirements`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

from phd_megatron.config.moe import UNCOUNTED, stacked_experts
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig

FIELDS = ("cuda_graph_impl", "cuda_graph_scope", "cuda_graph_warmup_steps")
"""``TransformerConfig`` fields of the graph."""

SCOPE = "full_iteration"
_CURE = "use cuda_graph_impl none"


def is_full_iteration(scope: Plain) -> bool:
    """Whether that value of ``cuda_graph_scope`` is the one that is supported."""
    return scope in (SCOPE, [SCOPE])


def is_graphed(model: ModelConfig) -> bool:
    """Whether a training step is a CUDA graph."""
    return model.transformer.get("cuda_graph_impl") == "local"


def warm_up_steps(model: ModelConfig) -> int:
    """Steps that every process makes without the graph before it records one. 3 is Megatron-Core's default."""
    return int(model.transformer.get("cuda_graph_warmup_steps", 3))


def drop_graph(model: ModelConfig) -> bool:
    """Make it the same model without a graph; whether it had one."""
    had = is_graphed(model)
    for name in FIELDS:
        model.transformer.pop(name, None)
    return had


def switched_off_graph(model: ModelConfig) -> list[str]:
    """``cuda_graph_impl: none`` over a checkpoint that had a graph leaves out what belongs to it; a note on that."""
    extra = model.transformer
    if extra.get("cuda_graph_impl") != "none":
        return []
    left = ", ".join(f"{name}={extra.pop(name)}" for name in FIELDS[1:] if name in extra)
    return [f"cuda_graph_impl=none: {left} left out with it"] if left else []


def graph_problems(config: RunConfig) -> Iterator[str]:
    """What cannot be in a graph, one sentence each: the value, why, and the cure."""
    model, training, parallel, extra = config.model, config.training, config.parallel, config.model.transformer
    if not is_graphed(model):
        return
    steps = warm_up_steps(model)
    if steps < 1:
        yield (
            f"cuda_graph_warmup_steps={steps} is out of range: kernels are compiled, tuned and given their buffers in "
            "a step before the one that is recorded; use a value at least 1"
        )
    asked = f"cuda_graph_impl={extra['cuda_graph_impl']}"
    if model.hidden_dropout:
        yield (
            f"{asked} with hidden_dropout={model.hidden_dropout}: Megatron-Core's random states are moved by Python, "
            f"which a replay skips, so every step would drop the same values; use hidden_dropout 0, or {_CURE}"
        )
    if training.fp16:
        yield f"{asked} with fp16=True: the loss scale becomes another tensor as it changes; use bf16, or {_CURE}"
    if training.rampup_batch_size is not None:
        yield (
            f"{asked} with rampup_batch_size={training.rampup_batch_size}: the number of micro-batches changes, and a "
            f"graph holds one; leave the ramp out, or {_CURE}"
        )
    if extra.get("recompute_granularity"):
        yield (
            f"{asked} with recompute_granularity={extra['recompute_granularity']}: recomputing sets random states, "
            f"which cannot be recorded; leave it out, or {_CURE}"
        )
    if extra.get("fp8_param"):
        yield (
            f"{asked} with fp8_param=True: Transformer Engine notes in Python whether the transpose of such a weight "
            f"is up to date, which a replay skips; leave it out, or {_CURE}"
        )
    if parallel.overlap_grad_reduce:
        yield (
            f"{asked} with overlap_grad_reduce=True: hooks in Python start each reduction and a step waits for it, "
            "and a replay skips both; leave it out (gradients are reduced after the graph then), or " + _CURE
        )
    yield from _experts(config, asked)
    yield from _communication(parallel, asked)


def _experts(config: RunConfig, asked: str) -> Iterator[str]:
    """What lets the host read how many rows an expert gets. Stacked experts on one rank do not."""
    model, extra = config.model, config.model.transformer
    if extra.get("num_moe_experts") is None:
        return
    if not stacked_experts(config):
        given = f"moe_experts_backend={model.moe_experts_backend}"
        given += " and optimizer=muon" if config.optimizer.optimizer == "muon" else ""
        yield (
            f"{asked} with {given}: the host reads how many rows each expert gets; use moe_experts_backend grouped_mm "
            f"(muon has none), or {_CURE}"
        )
    if config.parallel.expert_model_parallel_size > 1:
        yield (
            f"{asked} with expert_model_parallel_size={config.parallel.expert_model_parallel_size}: the host reads how "
            f"many rows go to each rank; use 1, or {_CURE}"
        )
    for name, why in UNCOUNTED.items():
        if extra.get(name):
            yield f"{asked} with {name}={extra[name]}: {why}; leave it out, or {_CURE}"


def _communication(parallel: ParallelConfig, asked: str) -> Iterator[str]:
    for name, size in (
        ("tensor_model_parallel_size", parallel.tensor_model_parallel_size),
        ("pipeline_model_parallel_size", parallel.pipeline_model_parallel_size),
        ("context_parallel_size", parallel.context_parallel_size),
    ):
        if size > 1:
            yield (
                f"{asked} with {name}={size}: its communication would be inside the graph, which has not been run on "
                f"several GPUs; use 1 (data parallelism reduces outside), or {_CURE}"
            )
