"""One rank of any world runs its own steps without a device: what it would hold, send and multiply.

The model, Megatron-Core's DDP, optimizer and pipeline schedule, and :class:`~phd_megatron.training.step.Stepper` are
those of a training; tensors and ranks are those of `runtime/dry.py`. :func:`traced` runs over real ones as well, which
is how tests compare the two.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError, raise_all
from phd_megatron.kernels.phd_attention import choose_backend
from phd_megatron.kernels.phd_attention.causal import causal_kernel
from phd_megatron.model.build import build_model
from phd_megatron.model.dry import routed, without_values
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.planning.dry_plan import RankPlan, Step, collectives, extended, fewest, in_order, steps_to_run
from phd_megatron.planning.groups import groups_of_this_rank
from phd_megatron.planning.trace import Trace
from phd_megatron.runtime.context import initialize_megatron
from phd_megatron.runtime.dry import dry_tensors, dry_world
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.training.megatron_engine import MegatronEngine
from phd_megatron.training.optimizer import build_optimizer, wrap_data_parallel
from phd_megatron.training.step import Stepper

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Traced:
    """What the steps of one rank were.

    Attributes:
        held: bytes between steps, by kind.
        steps: those that were asked for.
        path: what computed what.
        report: bytes that are kept of each micro-batch to the end of a step: its loss, on the last stage.
    """

    held: Mapping[str, int]
    steps: tuple[Step, ...]
    path: Mapping[str, str]
    report: int


def dry_run(
    run: RunConfig,
    world_size: int,
    rank: int,
    *,
    per_node: int = 8,
    imbalance: float = 1.0,
    order: bool = False,
    whole: bool = False,
) -> RankPlan:
    """Run one rank's steps.

    Args:
        run: resolved, with vocabulary and global batch size.
        per_node: ranks of a node, which talk over NVLink.
        imbalance: times their even share that the experts of this rank get.
        order: keep the order of transfers and products.
        whole: run every micro-batch of a step, however many.

    Raises:
        UserError: for what cannot be run so, or not at all.
    """
    raise_all(problems(run))
    dims = ParallelDims.from_config(run.parallel, world_size)
    run.parallel.sequence_parallel = dims.sp
    dims.validate(run.model, run.training)
    count = dims.microbatches(run.training)
    to_run = (count,) if whole else steps_to_run(dims, count)
    with dry_world(rank, world_size):
        initialize_megatron(dims, run.parallel, run.training.seed)
        try:
            groups = groups_of_this_rank()
            with dry_tensors(), without_values(), routing_of(run, dims, imbalance):
                found = traced(run, dims, to_run, Trace(order))
        finally:
            parallel_state.destroy_model_parallel()
    step = extended(found.steps, count, found.report)
    return RankPlan(
        rank=rank,
        world_size=world_size,
        layout=dims.describe(),
        path=found.path,
        microbatches=count,
        run=to_run,
        held=found.held,
        peak=step.peak,
        at_peak=step.at_peak,
        collectives=collectives(step.counts, groups, rank, per_node),
        products=step.counts.products,
        flops=step.counts.flops,
        order=tuple(in_order(step.counts, groups)) if order else None,
    )


def problems(run: RunConfig) -> list[str]:
    """Why a run cannot be traced without values, each with what to change."""
    found = []
    if run.parallel.deepspeed:
        found.append("deepspeed: a dry run traces Megatron-Core's engine alone; leave --deepspeed out of it")
    if run.data.reset_attention_mask or run.data.packing != "none":
        found.append(
            f"reset_attention_mask={run.data.reset_attention_mask}, packing={run.data.packing}: how attention is cut "
            "depends on where documents begin, which a dry run does not know; leave both out for the most it can be"
        )
    if run.optimizer.optimizer == "muon":
        found.append("optimizer=muon reads values of its updates; use --optimizer adam for a dry run")
    transformer = run.model.transformer
    if transformer.get("moe_expert_capacity_factor") is not None:
        found.append(
            "moe_expert_capacity_factor: which rows are dropped depends on values; leave it out for the most it can be"
        )
    if transformer.get("fp8") is not None:
        found.append("fp8 is Transformer Engine's on a GPU, and a dry run traces the CPU path; leave fp8 out of it")
    return found


def routing_of(run: RunConfig, dims: ParallelDims, imbalance: float = 1.0) -> AbstractContextManager[None]:
    """Routers of this rank's world, see :func:`~phd_megatron.model.dry.routed`.

    Raises:
        UserError: an imbalance that cannot be.
    """
    experts = run.model.transformer.get("num_moe_experts")
    if experts is None:
        if imbalance != 1:
            raise UserError(f"--expert-imbalance {imbalance:g}: the model has no experts; leave it out")
        return routed(None, 0)
    mine, here = experts // dims.ep, parallel_state.get_expert_model_parallel_rank()
    topk = int(run.model.transformer.get("moe_router_topk", 2))
    return routed(experts, topk, range(here * mine, (here + 1) * mine), imbalance)


def traced(run: RunConfig, dims: ParallelDims, microbatches: Sequence[int], trace: Trace) -> Traced:
    """Build this rank's model and take steps of so many micro-batches, after one that is not counted.

    Probes, caches and the optimizer's states are made in that first one. Inside connected ranks.
    """
    model, live, steps = run.model, trace.live, []
    assert model.vocab_size is not None
    with trace:
        models = build_model(run, model.vocab_size, _CPU)
        wrapped = wrap_data_parallel(models, run)
        for parameter in (each for chunk in wrapped for each in chunk.parameters()):
            live.name(parameter, "weights")
            live.name(parameter.main_grad, "gradients")
        live.kind = "optimizer"
        engine = MegatronEngine(wrapped, build_optimizer(wrapped, run))
        path = _path(run, models)
        last = any(chunk.post_process for chunk in models)
        del models
        stepper = Stepper(engine, _CPU, run.training.micro_batch_size, model.seq_length, model.phd_repeat)
        live.kind = "batch"
        batch = _batch(run, dims)
        for number, count in enumerate((fewest(dims), *microbatches)):
            gc.collect()
            with trace.part() as counts:
                live.kind = "activations"
                stepper.train(iter([batch] * count), count, [lambda: setattr(live, "kind", "update")])
                live.kind = "other"
            if number:
                steps.append(Step(count, counts, live.most, dict(live.at_most)))
                continue
            gc.collect()
            live.rename("update", "optimizer")
            for kind in ("activations", "backward"):
                live.rename(kind, "other")
            held = dict(+live.now)
    engine.let_go()
    report = math.prod(stepper.report_shape) * torch.float64.itemsize * last
    return Traced(held, tuple(steps), path, report)


def _batch(run: RunConfig, dims: ParallelDims) -> dict[str, Tensor]:
    """One micro-batch of this rank, of token 0: its sizes are what counts."""
    shape = (run.training.micro_batch_size, run.model.seq_length // dims.cp)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    tokens = torch.zeros(shape, dtype=torch.int64)
    return {"tokens": tokens, "labels": tokens.clone(), "position_ids": positions, "loss_mask": torch.ones(shape)}


def _path(run: RunConfig, models: Sequence[PHDGPTModel]) -> dict[str, str]:
    config = models[0].config
    name, _ = choose_backend(_CPU, config.params_dtype, config.kv_channels, backend=run.model.phd_attention_backend)
    kernel, _ = causal_kernel(_CPU, config.params_dtype, config.kv_channels)
    path = {"device": "CPU path", "attention backend": name, "attention over originals": kernel.name}
    dispatchers = {
        type(module.token_dispatcher).__name__
        for chunk in models
        for module in chunk.modules()
        if hasattr(module, "token_dispatcher")
    }
    if dispatchers:
        path |= {"dispatcher": ", ".join(sorted(dispatchers)), "experts": str(config.experts_backend)}
    return path
