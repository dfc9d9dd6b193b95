"""Data-parallel wrapping, AdamW or muon, and the scheduler of its rates, all Megatron-Core's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    _get_param_groups,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer.module import Float16Module, MegatronModule

from phd_megatron.config.plain import Plain
from phd_megatron.config.precision import fp8_recipe
from phd_megatron.config.schema import OptimizerConfig, RunConfig
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.model.gradients import finalize_model_grads
from phd_megatron.runtime.dtypes import params_dtype
from phd_megatron.runtime.fp8 import forget_fp8_scales
from phd_megatron.runtime.requirements import require_optimizer
from phd_megatron.training.cuda_graph import stream_of
from phd_megatron.training.schedule import Schedule

if TYPE_CHECKING:
    from phd_megatron.training.engine import HasGroups

_EMBEDDING = "is_embedding_or_output_parameter"


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
    """AdamW or muon with fp32 main parameters, and the hooks that the pipeline schedules call.

    Raises:
        UserError: the installed packages do not have the optimizer.
    """
    require_optimizer(run)
    options = optimizer_options(run)
    built = get_megatron_optimizer(options, models, config_overrides=_overrides(models, run.optimizer, options))
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


def optimizer_options(run: RunConfig) -> MegatronOptimizerConfig:
    """Megatron-Core's options of the optimizer."""
    optimizer = run.optimizer
    return MegatronOptimizerConfig(
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        decoupled_lr=optimizer.decoupled_lr,
        decoupled_min_lr=optimizer.decoupled_min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=run.training.bf16,
        fp16=run.training.fp16,
        params_dtype=params_dtype(run),
        **_loss_scale(run),
        **_muon(optimizer),
        **_skipped(optimizer),
        use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
        fp8_recipe=fp8_recipe(run.model) if run.model.transformer.get("fp8_param") else None,
    )


def parameter_groups(models: Sequence[MegatronModule], run: RunConfig) -> list[dict[str, Any]]:
    """Megatron-Core's groups of parameters that are treated alike; collective. Some may be empty."""
    options = optimizer_options(run)
    groups: list[dict[str, Any]] = _get_param_groups(models, options, _overrides(models, run.optimizer, options))
    return groups


def _muon(optimizer: OptimizerConfig) -> dict[str, Plain]:
    """Megatron's options of muon, which have our names; a version without it has none of them."""
    if optimizer.optimizer != "muon":
        return {}
    return {name: value for name, value in vars(optimizer).items() if name.startswith("muon_")}


def _skipped(optimizer: OptimizerConfig) -> dict[str, float]:
    """Megatron's option for steps that are left out; a version without it is not told."""
    limit = optimizer.grad_norm_skip_threshold
    return {} if limit is None else {"grad_norm_skip_threshold": limit}


def _loss_scale(run: RunConfig) -> dict[str, float]:
    """Megatron's options of fp16, which are of a mean over tokens, for the sum that is scaled here."""
    training = run.training
    if not training.fp16:
        return {}
    tokens = training.micro_batch_size * run.model.seq_length
    initial = training.initial_loss_scale or 2.0**16
    least = training.min_loss_scale or min(1.0, initial)
    scales = {"initial_loss_scale": initial / tokens, "min_loss_scale": least / tokens}
    if training.loss_scale is not None:
        scales["loss_scale"] = training.loss_scale / tokens
    return {**scales, "loss_scale_window": training.loss_scale_window, "hysteresis": training.hysteresis}


def _overrides(
    models: Sequence[MegatronModule], optimizer: OptimizerConfig, options: MegatronOptimizerConfig
) -> dict[ParamKey, ParamGroupOverride]:
    """What is not treated as everything else: what weight decay leaves out, and the rate of embedding and head.

    Whatever the reason for no decay, it is one group of parameters, which a default run has too.
    """
    # Megatron's own: one-dimensional parameters and biases, and a decoupled rate.
    overrides = get_standard_config_overrides(options)
    if optimizer.optimizer == "muon":
        _leave_to_adam(models, overrides)
    if optimizer.decay_norms:
        overrides = {key: value for key, value in overrides.items() if "wd_mult" not in value}
    undecayed = ParamGroupOverride(wd_mult=0.0)
    overrides[ParamKey(attr="never_decayed")] = undecayed
    if not optimizer.decay_embeddings:
        embeddings = {id(weight) for model in models for weight in _input_embeddings(model)}
        predicate = ParamPredicate("input embedding", lambda parameter: id(parameter) in embeddings)
        overrides[ParamKey(predicate=predicate)] = undecayed
    return overrides


def _leave_to_adam(models: Sequence[MegatronModule], overrides: dict[ParamKey, ParamGroupOverride]) -> None:
    """Keep muon off the vectors of copies, which are a matrix by their shape alone.

    Megatron leaves to AdamW what it takes for an embedding, whose rate they do not have, though.
    """
    for parameter in (each for model in models for each in model.parameters() if hasattr(each, "never_decayed")):
        parameter.is_embedding_or_output_parameter = True
    decoupled = overrides.pop(ParamKey(attr=_EMBEDDING), None)
    if decoupled is not None:
        has_rate = ParamPredicate(
            "embedding or head", lambda p: hasattr(p, _EMBEDDING) and not hasattr(p, "never_decayed")
        )
        overrides[ParamKey(predicate=has_rate)] = decoupled


def _input_embeddings(wrapped: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """The input embedding's weight where this chunk has it, as such or as the copy that a tied head reads."""
    (model,) = (module for module in wrapped.modules() if isinstance(module, PHDGPTModel))
    if model.pre_process or (model.post_process and model.share_embeddings_and_output_weights):
        yield model.shared_embedding_or_output_weight()


def build_scheduler(optimizer: HasGroups, run: RunConfig, schedule: Schedule) -> OptimizerParamScheduler:
    """Megatron-Core's schedule of learning rate and weight decay (:mod:`.schedule` says what it counts)."""
    options = run.optimizer
    decay = options.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=options.lr_warmup_init,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.decay,
        lr_decay_style=options.lr_decay_style,
        start_wd=decay if options.start_weight_decay is None else options.start_weight_decay,
        end_wd=decay if options.end_weight_decay is None else options.end_weight_decay,
        wd_incr_steps=schedule.total,
        wd_incr_style=options.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=schedule.wsd_decay,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
    )


def learning_rate(optimizer: HasGroups, run: RunConfig) -> float:
    """Of the next step, of the parameters that have no rate of their own."""
    groups = optimizer.param_groups
    return float(next((group for group in groups if group["max_lr"] == run.optimizer.lr), groups[0])["lr"])


def let_go(models: Sequence[MegatronModule]) -> None:
    """Free what wrapped models hold; they cannot be used afterwards.

    A process that trains several models one after the other would otherwise keep all of them, with the threads of their
    process groups: DDP hangs on hooks of autograd's gradient accumulators, a cycle that the garbage collector cannot
    see. So the wrappers are emptied.
    """
    for model in models:
        vars(model).clear()
    forget_fp8_scales()
