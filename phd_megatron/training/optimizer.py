"""Data-parallel wrapping, AdamW and the learning-rate schedule, all Megatron-Core's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer.module import Float16Module

from phd_megatron.config.precision import fp8_recipe
from phd_megatron.config.schema import OptimizerConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.model.gradients import finalize_model_grads
from phd_megatron.model.transformer_config import params_dtype
from phd_megatron.runtime.fp8 import forget_fp8_scales
from phd_megatron.training.cuda_graph import stream_of


@dataclass(frozen=True)
class Schedule:
    """Lengths of the run and of the learning-rate schedule, all in samples."""

    total: int
    decay: int
    warmup: int
    wsd_decay: int | None


def plan_schedule(run: RunConfig, global_batch_size: int) -> Schedule:
    """Bring iterations, samples, tokens and fractions to samples.

    Raises:
        UserError: when a warm-up does not fit into the decay, the run is shorter than one batch, or a ramp-up does not
            reach the global batch size.
    """
    training, optimizer = run.training, run.optimizer
    if training.train_samples is not None:
        total = training.train_samples
    elif training.train_iters is not None:
        if training.rampup_batch_size is not None:
            raise UserError("rampup_batch_size with train_iters: the steps have no fixed size; give train_samples")
        total = training.train_iters * global_batch_size
    else:
        raise UserError("train_iters and train_samples are both missing: set one of them")

    first_batch = _check_ramp_up(training.rampup_batch_size, global_batch_size)
    if total < first_batch:
        raise UserError(
            f"train_samples={total} is less than one batch of {first_batch} samples; raise it to {first_batch} or more"
        )

    def samples(iters: int | None, given: int | None, default: int) -> int:
        return given if given is not None else iters * global_batch_size if iters is not None else default

    decay = samples(optimizer.lr_decay_iters, optimizer.lr_decay_samples, total)
    if optimizer.lr_warmup_fraction is not None:
        warmup = int(optimizer.lr_warmup_fraction * decay)
    else:
        warmup = (
            optimizer.lr_warmup_iters * global_batch_size
            + optimizer.lr_warmup_samples
            + math.ceil(optimizer.lr_warmup_tokens / run.model.seq_length)
        )
    if warmup >= decay:
        raise UserError(
            f"the warm-up of {warmup} samples is not shorter than the decay of {decay} samples; shorten "
            "lr_warmup_iters / lr_warmup_samples / lr_warmup_tokens, or lengthen the run"
        )
    wsd = None
    if optimizer.lr_decay_style == "WSD":
        wsd = samples(optimizer.lr_wsd_decay_iters, optimizer.lr_wsd_decay_samples, max(decay // 10, 1))
    return Schedule(total, decay, warmup, wsd)


def _check_ramp_up(ramp: list[int] | None, global_batch_size: int) -> int:
    """Samples of the first step."""
    if ramp is None:
        return global_batch_size
    start, increment, _ = ramp
    missing = global_batch_size - start
    if missing <= 0 or missing % increment:
        raise UserError(
            f"rampup_batch_size={ramp}: steps of {increment} from {start} do not end at "
            f"global_batch_size={global_batch_size}; start below it, with an increment that divides the difference"
        )
    return start


def in_run_precision(models: Sequence[PHDGPTModel], run: RunConfig) -> list[PHDGPTModel | Float16Module]:
    """``Float16Module`` around each chunk where half precision is asked for."""
    half = run.training.bf16 or run.training.fp16
    return [Float16Module(model.config, model) if half else model for model in models]


def wrap_data_parallel(models: Sequence[PHDGPTModel], run: RunConfig) -> list[DistributedDataParallel]:
    """Chunks in the run's precision, each in Megatron-Core's DDP with its gradient buffers."""
    half = run.training.bf16 or run.training.fp16
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=half and run.training.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=run.parallel.overlap_grad_reduce,
        overlap_param_gather=run.parallel.overlap_param_gather,
        # An interleaved schedule starts the gathering of a chunk itself, at the same moment on all stages.
        align_param_gather=run.parallel.overlap_param_gather and len(models) > 1,
        use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        bucket_size=run.parallel.ddp_bucket_size,
        fp8_param_gather=bool(run.model.transformer.get("fp8_param")),
    )
    with stream_of(run):
        return [
            DistributedDataParallel(
                model.config,
                ddp_config,
                model,
                # The communication of later chunks is hidden behind the first chunk's compute as it is.
                disable_bucketing=number > 0,
            )
            for number, model in enumerate(in_run_precision(models, run))
        ]


def build_optimizer(models: list[DistributedDataParallel], run: RunConfig) -> MegatronOptimizer:
    """AdamW with fp32 main parameters, and the hooks that the pipeline schedules call."""
    optimizer = run.optimizer
    options = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=run.training.bf16,
        fp16=run.training.fp16,
        params_dtype=params_dtype(run),
        use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
        fp8_recipe=fp8_recipe(run.model) if run.model.transformer.get("fp8_param") else None,
    )
    built = get_megatron_optimizer(options, models, config_overrides=_undecayed(models, optimizer, options))
    config = models[0].config
    config.grad_scale_func = built.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    interleaved = len(models) > 1
    if run.parallel.overlap_grad_reduce:
        config.no_sync_func = [model.no_sync for model in models] if interleaved else models[0].no_sync
    if run.parallel.overlap_grad_reduce and interleaved:
        config.grad_sync_func = [model.start_grad_sync for model in models]
    if run.parallel.overlap_param_gather and interleaved:
        config.param_sync_func = [model.start_param_sync for model in models]
    return built


def _undecayed(
    models: Sequence[DistributedDataParallel], optimizer: OptimizerConfig, options: MegatronOptimizerConfig
) -> dict[ParamKey, ParamGroupOverride]:
    """What weight decay leaves out; everything else is decayed.

    Whatever the reason, it is one group of parameters, which a default run has too.
    """
    # Megatron's own: one-dimensional parameters and biases.
    overrides = {} if optimizer.decay_norms else get_standard_config_overrides(options)
    undecayed = ParamGroupOverride(wd_mult=0.0)
    overrides[ParamKey(attr="never_decayed")] = undecayed
    if not optimizer.decay_embeddings:
        embeddings = {id(weight) for model in models for weight in _input_embeddings(model)}
        predicate = ParamPredicate("input embedding", lambda parameter: id(parameter) in embeddings)
        overrides[ParamKey(predicate=predicate)] = undecayed
    return overrides


def _input_embeddings(wrapped: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The input embedding's weight where this chunk has it, as such or as the copy that a tied head reads."""
    (model,) = (module for module in wrapped.modules() if isinstance(module, PHDGPTModel))
    if model.pre_process or (model.post_process and model.share_embeddings_and_output_weights):
        yield model.shared_embedding_or_output_weight()


def build_scheduler(optimizer: MegatronOptimizer, run: RunConfig, schedule: Schedule) -> OptimizerParamScheduler:
    """Megatron-Core's schedule; it counts samples, so a change of batch size does not move it."""
    options = run.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.decay,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=schedule.total,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=schedule.wsd_decay,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
    )


def let_go(models: Sequence[DistributedDataParallel]) -> None:
    """Free what wrapped models hold; they cannot be used afterwards.

    A process that trains several models one after the other would otherwise keep all of them, with the threads of their
    process groups: DDP hangs on hooks of autograd's gradient accumulators, a cycle that the garbage collector cannot
    see. So the wrappers are emptied.
    """
    for model in models:
        vars(model).clear()
    forget_fp8_scales()
