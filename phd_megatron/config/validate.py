"""Checks that need no layout: each returns sentences with value, reason and cure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from phd_megatron.config.architecture import head_dim, kv_policy
from phd_megatron.config.catalog import ALTERNATIVES, fields, nearest
from phd_megatron.config.cuda_graph import graph_problems, is_graphed
from phd_megatron.config.deepspeed import deepspeed_problems
from phd_megatron.config.facts import violates
from phd_megatron.config.moe import moe_problems, overlap_problems
from phd_megatron.config.precision import precision_problems
from phd_megatron.config.rope import rope_problems
from phd_megatron.config.schema import DataConfig, ModelConfig, OptimizerConfig, RunConfig
from phd_megatron.config.serialize import values_of
from phd_megatron.config.values import is_optional
from phd_megatron.errors import raise_all, shown
from phd_megatron.norm.schemes import ALIASES, NORM_SCHEMES, norm_scheme

_EXACT_POSITIONS = 2**24  # whole numbers that RoPE's float32 angles start from


def _ranges(values: Mapping[str, Any]) -> Iterator[str]:
    for name, info in fields().items():
        value = values[name]
        if value is not None and (rule := violates(value, info.bounds)):
            yield f"{name}={shown(value)} is out of range; use a value of {rule}" + (
                ", or null" if is_optional(info.annotation) else ""
            )


def _needs(values: Mapping[str, Any]) -> Iterator[str]:
    for name, info in fields().items():
        if info.needs is None or values[name] == info.default or info.needs.are_met(values):
            continue
        yield f"{name}={shown(values[name])} without {info.needs.reason}; {info.needs.cure}, or leave it out"


def _exclusive(values: Mapping[str, Any]) -> Iterator[str]:
    for group in ALTERNATIVES:
        given = [name for name in group if values[name] != fields()[name].default]
        if len(given) > 1:
            both = " and ".join(f"{name}={values[name]!r}" for name in given)
            yield f"{both} exclude each other; give one of them"


def _model(model: ModelConfig) -> Iterator[str]:
    heads, groups, channels = model.num_attention_heads, model.num_query_groups, model.kv_channels
    if heads and groups and groups > 0 and heads % groups:
        yield (
            f"num_attention_heads={heads} is not a multiple of num_query_groups={groups}: every KV head serves the "
            f"same number of query heads; use one of {_divisors(heads)} groups"
        )
    if heads and model.hidden_size and channels is None and model.hidden_size % heads:
        yield (
            f"hidden_size={model.hidden_size} is not a multiple of num_attention_heads={heads}; set kv_channels (the "
            f"head dimension) or use hidden_size={(model.hidden_size // heads + 1) * heads}"
        )
    width = head_dim(model)
    if width and (rotary := int(width * model.rotary_percent)) < 2:
        yield (
            f"rotary_percent={model.rotary_percent} of kv_channels={width} is below the 2 that RoPE turns together: "
            f"use at least {2 / width:g}"
        )
    elif width and rotary % 2:
        yield (
            f"RoPE turns pairs, but rotary_percent={model.rotary_percent} of kv_channels={width} is {rotary}; make the "
            "head dimension even"
        )
    places = model.phd_repeat * max(model.seq_length, model.max_position_embeddings or 0)
    if model.phd_repeat > 1 and model.phd_copy_positions != "token" and places > _EXACT_POSITIONS:
        yield (
            f"phd_copy_positions={model.phd_copy_positions!r}: {places} places of repeated tokens "
            f"(phd_repeat={model.phd_repeat}) are more than the {_EXACT_POSITIONS} that float32 tells apart; use "
            "token, or a shorter seq_length"
        )
    if model.head_init_method_std is not None and not model.untie_embeddings_and_output_weights:
        yield (
            f"head_init_method_std={model.head_init_method_std} without a head of its own: it is the input embedding, "
            "whose values init_method_std says; set untie_embeddings_and_output_weights, or leave it out"
        )
    if model.max_position_embeddings is not None and model.max_position_embeddings < model.seq_length:
        yield (
            f"max_position_embeddings={model.max_position_embeddings} is below seq_length={model.seq_length}; raise it "
            "or leave it out"
        )


def _norms(model: ModelConfig) -> Iterator[str]:
    """The scheme is known, and DeepNorm's scaled residual and its initial values are together."""
    try:
        has_gain = norm_scheme(model.norm_scheme).init_gain is not None
    except ValueError as error:
        hint = nearest(model.norm_scheme, [*NORM_SCHEMES, *ALIASES])
        yield f"{error}; {hint}" if hint else str(error)
        return
    if model.init != "auto" and (model.init == "deepnorm") != has_gain:
        cure = "which brings its own; use init=auto" if has_gain else "which has no scaled residual; use another init"
        yield f"init={model.init} does not fit norm_scheme={model.norm_scheme}, {cure}"


def _data(data: DataConfig) -> Iterator[str]:
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        yield from _blend(name, getattr(data, name) or [])
    try:
        shares = [float(share) for share in data.split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        yield f"split={data.split!r} is not up to three shares of training, validation and test; write 969,30,1"


def _documents(config: RunConfig) -> Iterator[str]:
    """What does not go with documents that are kept apart."""
    data, model = config.data, config.model
    if data.reset_position_ids and not data.reset_attention_mask:
        yield (
            "reset_position_ids=True without reset_attention_mask: tokens would see those of other documents at "
            "positions that may be later than their own; set reset_attention_mask too, or leave it out"
        )
    if not data.reset_attention_mask:
        return
    if (size := config.parallel.context_parallel_size) > 1:
        try:
            kv_policy(model).document_halo(model.seq_length // (2 * size))
        except ValueError as error:
            yield f"reset_attention_mask=True: {error}"
    if model.phd_attention_backend == "flex":
        yield (
            "reset_attention_mask=True with phd_attention_backend=flex: it would be compiled for every length of a "
            "document; use auto, or leave it out"
        )
    if is_graphed(model):
        yield (
            "reset_attention_mask=True with cuda_graph_impl: where documents begin is read by the host, and differs "
            "from step to step; use cuda_graph_impl none, or leave it out"
        )


def _blend(name: str, words: list[str]) -> Iterator[str]:
    """Megatron's rule: an even number of words is WEIGHT PREFIX pairs, an odd one is prefixes alone."""
    if len(words) % 2:
        return
    for weight, prefix in zip(words[::2], words[1::2], strict=True):
        try:
            fits = float(weight) > 0
        except ValueError:
            fits = False
        if not fits:
            yield (
                f"{name} has {len(words)} words, so they are read as WEIGHT PREFIX pairs, but {weight!r} before "
                f"{prefix!r} is no weight above 0; write {name.replace('_', '-')} as W1 P1 W2 P2"
            )
            return


def _optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    if optimizer.min_lr > optimizer.lr:
        yield f"min_lr={optimizer.min_lr} is above lr={optimizer.lr}; lower min_lr"
    if (
        optimizer.lr_decay_style == "WSD"
        and optimizer.lr_wsd_decay_iters is None
        and optimizer.lr_wsd_decay_samples is None
    ):
        yield (
            "lr_decay_style='WSD' without the length of its annealing; set lr_wsd_decay_iters or lr_wsd_decay_samples"
        )


def _training(config: RunConfig, values: Mapping[str, Any]) -> Iterator[str]:
    ramp, training, parallel = config.training.rampup_batch_size, config.training, config.parallel
    if ramp is not None and len(ramp) != 3:
        yield f"rampup_batch_size={ramp} is not START INCREMENT SAMPLES; write three numbers"
    if ramp is not None:
        by_step = [n for n in ("train_iters", "lr_decay_iters", "lr_warmup_iters") if values[n]]
        if by_step:
            yield (
                f"rampup_batch_size={ramp} with {by_step[0]}={values[by_step[0]]}: a step has no fixed size "
                f"during the ramp; use {by_step[0].replace('iters', 'samples')}"
            )
    if training.global_batch_size is not None and training.global_batch_size % max(1, training.micro_batch_size):
        yield (
            f"global_batch_size={training.global_batch_size} is not a multiple of "
            f"micro_batch_size={training.micro_batch_size}; change one of them"
        )
    if config.optimizer.optimizer == "muon":
        if parallel.use_distributed_optimizer:
            yield (
                "use_distributed_optimizer=True with optimizer=muon: muon works on whole matrices, which that cuts "
                "into flat pieces; leave it out"
            )
        if parallel.overlap_param_gather:
            yield (
                "overlap_param_gather=True with optimizer=muon: every data-parallel rank updates all parameters, so "
                "there is nothing to gather; leave it out, or use --no-overlap-param-gather over a preset "
                "or a checkpoint"
            )
        if config.training.fp16:
            yield "fp16=True with optimizer=muon: Megatron-Core has it for bf16 and float32; use bf16"
        if config.model.moe_experts_backend == "grouped_mm":
            yield (
                "moe_experts_backend=grouped_mm with optimizer=muon: muon works on matrices of single experts, which "
                "that stacks; use auto or sequential"
            )
    elif parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "overlap_param_gather=True needs use_distributed_optimizer and overlap_grad_reduce (Megatron-Core's rule); "
            "turn them on or leave it out"
        )


def _profile(config: RunConfig) -> Iterator[str]:
    logging, steps = config.logging, config.training.train_iters
    if not logging.profile:
        return
    start, end = logging.profile_step_start, logging.profile_step_end
    if end <= start:
        yield (
            f"profile_step_end={end} is not after profile_step_start={start}: the steps after the first, up to and "
            f"including the second, are traced; use {start + 1} or more"
        )
    elif steps is not None and end > steps:
        yield (
            f"profile_step_end={end} is beyond train_iters={steps}; lower profile_step_start={start} and "
            f"profile_step_end, or train longer"
        )
    if not logging.profile_ranks or min(logging.profile_ranks) < 0:
        yield f"profile_ranks={logging.profile_ranks} are not ranks; name at least one, counted from 0"
    if logging.profile_dir is None and config.checkpoint.save is None:
        yield "profile=True without a place for the traces; set profile_dir, or save (then SAVE/profile)"


def problems(config: RunConfig) -> list[str]:
    """Everything wrong with the values themselves, whatever the layout."""
    values = values_of(config)
    return [
        *_ranges(values),
        *_needs(values),
        *_exclusive(values),
        *_model(config.model),
        *rope_problems(config.model),
        *_data(config.data),
        *_documents(config),
        *_optimizer(config.optimizer),
        *_training(config, values),
        *_profile(config),
        *moe_problems(config.model),
        *overlap_problems(config),
        *deepspeed_problems(config),
        *precision_problems(config),
        *graph_problems(config),
        *_norms(config.model),
    ]


def require_for_pretraining(config: RunConfig) -> None:
    """Check that a training run says how long it is and on what data.

    Raises:
        UserError: with everything that is missing.
    """
    missing = []
    if config.training.train_iters is None and config.training.train_samples is None:
        missing.append("neither train_iters nor train_samples is set; say how long to train: --train-iters N")
    if not config.data.data_path and not config.data.train_data_path:
        missing.append("data_path is not set; give --data-path PREFIX (made by `phd-megatron prepare`)")
    raise_all(missing)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
