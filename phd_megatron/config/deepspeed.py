"""``--deepspeed_config``: what of DeepSpeed's file is passed on, what this program fills in, and what it refuses.

The file is that of DeepSpeed's documentation ("DeepSpeed Configuration JSON"). Of a field that has a namesake here, the
file may say ``auto``, nothing, or the same; so there is one place for each value, and a file of another program cannot
change a recipe unseen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from phd_megatron.config.catalog import nearest
from phd_megatron.config.files import read_json
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError, shown

AUTO = "auto"
_LIMIT = 1 << 20  # bytes of the file
_CURE = "correct deepspeed_config"

#: of ``zero_optimization``, as DeepSpeed names them: how much is held and sent at a time, which changes no number
ZERO_FIELDS = frozenset(
    {
        "stage",
        "offload_optimizer",
        "offload_param",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "allgather_partitions",
        "allgather_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "overlap_comm",
        "round_robin_gradients",
        "sub_group_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_module_granularity_threshold",
    }
)
#: of ``offload_optimizer`` and ``offload_param``
OFFLOAD_FIELDS = {
    "offload_optimizer": frozenset({"device", "pin_memory", "buffer_count"}),
    "offload_param": frozenset({"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"}),
}
#: top-level switches that are passed on
SWITCHES = frozenset({"wall_clock_breakdown", "memory_breakdown", "zero_force_ds_cpu_optimizer"})
#: what is refused with a reason of its own
REFUSED = {
    "scheduler": "rates follow lr_decay_style and its companions",
    "amp": "apex's amp is not supported; use bf16",
    "activation_checkpointing": "recompute_granularity and its companions recompute",
    "tensorboard": "tensorboard_dir writes it",
    "wandb": "wandb_project writes it",
    "csv_monitor": "metrics_file writes it",
    "monitor_config": "metrics_file, tensorboard_dir and wandb_project write metrics",
    "flops_profiler": "the log has FLOP/s by formula, and profile traces",
    "tensor_parallel": "tensor_model_parallel_size divides the model",
    "autotp_size": "tensor_model_parallel_size divides the model",
    "pipeline": "pipeline_model_parallel_size is the other engine's",
    "sequence_parallel_size": "context_parallel_size divides sequences",
    "sparse_attention": "PHD's attention is this program's",
    "compression_training": "it would train another model",
    "data_efficiency": "the data and its order are this program's",
    "curriculum_learning": "the data and its order are this program's",
    "progressive_layer_drop": "it would train another model",
    "prescale_gradients": "gradients are divided by the tokens of the global batch",
    "gradient_predivide_factor": "gradients are divided by the tokens of the global batch",
    "checkpoint": "checkpoints are Megatron-Core's torch_dist, which both engines load",
    "elasticity": "the layout is that of the launch, and any other loads its checkpoints",
    "steps_per_print": "log_interval says how often a row is written",
    "dump_state": "the start prints the resolved configuration",
    "aio": "offloading to NVMe has not been run here; use the device cpu",
    "torch_autocast": "use bf16",
    "compile": "it has not been run here",
}
_REFUSED_OF_ZERO = {
    "zero_quantized_weights": "it rounds what is sent, so the numbers are no longer those of one rank",
    "zero_quantized_gradients": "it rounds what is sent, so the numbers are no longer those of one rank",
    "zero_quantized_nontrainable_weights": "it rounds what is sent, so the numbers are no longer those of one rank",
    "stage3_gather_16bit_weights_on_model_save": "checkpoints are written whole by this program",
    "stage3_gather_fp16_weights_on_model_save": "checkpoints are written whole by this program",
    "elastic_checkpoint": "checkpoints are Megatron-Core's torch_dist",
    "cpu_offload": "use offload_optimizer with the device cpu",
    "cpu_offload_param": "use offload_param with the device cpu",
}


def read_deepspeed(run: RunConfig) -> dict[str, Any]:
    """The file of a run, as it stands there.

    Raises:
        UserError: if it cannot be read, or is no JSON object.
    """
    path = run.parallel.deepspeed_config
    if path is None:
        raise UserError(
            "deepspeed=True without deepspeed_config: nothing says which ZeRO stage; give --deepspeed_config FILE, "
            'such as {"zero_optimization": {"stage": 1}}'
        )
    content = read_json(path, _CURE, _LIMIT)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {shown(content)}, no JSON object; {_CURE}")
    return content


def zero_stage(run: RunConfig) -> int:
    """1, 2 or 3; of a run whose file was checked."""
    return int(read_deepspeed(run)["zero_optimization"]["stage"])


def offloads(run: RunConfig, what: str) -> bool:
    """Whether ``offload_optimizer`` or ``offload_param`` moves it to the host."""
    section = read_deepspeed(run)["zero_optimization"].get(what)
    return isinstance(section, dict) and section.get("device", "none") == "cpu"


# ---------------------------------------------------------------- what is wrong


def deepspeed_problems(run: RunConfig) -> Iterator[str]:
    """What the engine does not do, and what the file says otherwise, one sentence each."""
    if not run.parallel.deepspeed:
        return
    yield from _engine_problems(run)
    try:
        content = read_deepspeed(run)
    except UserError as error:
        yield str(error)
        return
    place = run.parallel.deepspeed_config
    for problem in (*_unknown(content), *_contradictions(content, run), *_zero_problems(content)):
        yield f"{place}: {problem}"


def batch_problems(run: RunConfig, dp: int) -> Iterator[str]:
    """What the file says of the batch otherwise than the run, which knows its data-parallel size by now."""
    if not run.parallel.deepspeed:
        return
    training, content = run.training, read_deepspeed(run)
    assert training.global_batch_size is not None
    steps = training.global_batch_size // (training.micro_batch_size * dp)
    ours: dict[str, tuple[int, str]] = {
        "train_batch_size": (training.global_batch_size, "global_batch_size"),
        "gradient_accumulation_steps": (steps, f"global_batch_size / (micro_batch_size x data-parallel size {dp})"),
    }
    for name, (value, source) in ours.items():
        yield from (f"{run.parallel.deepspeed_config}: {text}" for text in _other(name, content, value, source))


def _engine_problems(run: RunConfig) -> Iterator[str]:
    parallel, training, extra = run.parallel, run.training, run.model.transformer
    other = "leave --deepspeed out"
    for name, what in (
        ("pipeline_model_parallel_size", "the pipeline schedules are Megatron-Core's, with its gradient buffers"),
        ("expert_model_parallel_size", "experts that lie on other ranks would need gradient groups of their own"),
    ):
        size = getattr(parallel, name)
        if size > 1:
            yield f"deepspeed=True with {name}={size}: {what}; use 1, or {other}"
    if parallel.virtual_pipeline_model_parallel_size is not None:
        yield (
            "deepspeed=True with virtual_pipeline_model_parallel_size="
            f"{parallel.virtual_pipeline_model_parallel_size}: there is no pipeline to divide; leave it out, or {other}"
        )
    etp, tp = parallel.expert_tensor_parallel_size, parallel.tensor_model_parallel_size
    if extra.get("num_moe_experts") is not None and etp not in (None, tp):
        yield (
            f"deepspeed=True with expert_tensor_parallel_size={etp}: experts lie on the data-parallel ranks of the "
            f"rest; use {tp}, or {other}"
        )
    for name in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size"):
        value = getattr(parallel, name)
        if value:
            yield (
                f"deepspeed=True with {name}={value}: that is of Megatron-Core's gradient buffers; zero_optimization "
                f"of the file has its like (stage, overlap_comm, reduce_bucket_size); leave it out, or {other}"
            )
    if training.fp16:
        yield f"deepspeed=True with fp16=True: the loss scale would be another's; use bf16, or {other}"
    if run.optimizer.optimizer != "adam":
        yield (
            f"deepspeed=True with optimizer={run.optimizer.optimizer}: ZeRO cuts parameters into flat pieces, and that "
            f"works on whole matrices; use adam, or {other}"
        )
    if run.optimizer.grad_norm_skip_threshold is not None:
        yield (
            f"deepspeed=True with grad_norm_skip_threshold={run.optimizer.grad_norm_skip_threshold:g}: DeepSpeed "
            f"takes every step whose gradients are finite; leave it out, or {other}"
        )
    for name in ("fp8", "gradient_accumulation_fusion", "tp_comm_overlap"):
        if extra.get(name):
            yield (
                f"deepspeed=True with {name}={extra[name]}: it needs Megatron-Core's gradient buffers or whole "
                f"weights; leave it out, or {other}"
            )
    if extra.get("cuda_graph_impl") not in (None, "none"):
        yield (
            f"deepspeed=True with cuda_graph_impl={extra['cuda_graph_impl']}: ZeRO moves weights and gradients "
            f"between the kernels of a step; use none, or {other}"
        )


def _unknown(content: Mapping[str, Any]) -> Iterator[str]:
    known = {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("zero_optimization", "optimizer", "bf16", "fp16", "data_types", "zero_allow_untested_optimizer"),
        *("communication_data_type", *SWITCHES),
    }
    for name, value in content.items():
        if name in SWITCHES and not isinstance(value, bool):
            yield f"{name} is {shown(value)}, neither true nor false; {_CURE}"
        if name in known:
            continue
        if name in REFUSED:
            yield f"{name} is not taken: {REFUSED[name]}; take it out of the file"
        else:
            yield f"{shown(name)} is no field that is passed on{_hint(name, known)}; correct it, or take it out"


def _hint(name: str, known: Iterable[str]) -> str:
    return nearest(name, known, " (did you mean {}?)") or ""


def _zero_problems(content: Mapping[str, Any]) -> Iterator[str]:
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict):
        yield f"zero_optimization is {shown(zero)}; name a stage, such as {{'stage': 1}}"
        return
    stage = zero.get("stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        yield f"zero_optimization.stage is {shown(stage)}; use 1, 2 or 3, or leave --deepspeed out"
    for name, value in zero.items():
        if name in _REFUSED_OF_ZERO:
            if value not in (False, None):
                yield f"zero_optimization.{name} is not taken: {_REFUSED_OF_ZERO[name]}; take it out of the file"
        elif name not in ZERO_FIELDS:
            yield f"zero_optimization.{name} is not passed on{_hint(name, ZERO_FIELDS)}; correct it, or take it out"
        elif name in OFFLOAD_FIELDS:
            yield from _offload_problems(name, value, stage)
        elif isinstance(value, str) and value != AUTO:
            yield f"zero_optimization.{name} is {shown(value)}; write a number, true or false, or auto"
        elif isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < math.inf:
            yield f"zero_optimization.{name} is {value}; use a number that is not negative"


def _offload_problems(name: str, section: Any, stage: Any) -> Iterator[str]:
    if section is None:
        return
    if not isinstance(section, dict):
        yield f"zero_optimization.{name} is {shown(section)}; write {{'device': 'cpu'}}"
        return
    device = section.get("device", "none")
    if device not in ("none", "cpu"):
        cure = "offloading to NVMe has not been run here; use cpu" if device == "nvme" else "use cpu or none"
        yield f"zero_optimization.{name}.device is {shown(device)}: {cure}"
    if name == "offload_param" and device == "cpu" and stage != 3:
        yield f"zero_optimization.offload_param needs stage 3, which alone divides parameters, and stage is {stage}"
    for key in section.keys() - OFFLOAD_FIELDS[name]:
        yield f"zero_optimization.{name}.{key} is not passed on; take it out of the file"


def _contradictions(content: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    training, optimizer = run.training, run.optimizer
    size, name = training.micro_batch_size, "train_micro_batch_size_per_gpu"
    yield from _other(name, content, size, "micro_batch_size")
    yield from _other("gradient_clipping", content, optimizer.clip_grad, "clip_grad")
    yield from _section(content, "bf16", {"enabled": (training.bf16, "bf16")})
    yield from _section(content, "fp16", {"enabled": (False, "fp16, which this engine does not do")})
    kind = "fp32" if not training.bf16 or training.accumulate_allreduce_grads_in_fp32 else "bf16"
    source = "accumulate_allreduce_grads_in_fp32"
    yield from _section(content, "data_types", {"grad_accum_dtype": (kind, source)})
    yield from _other("communication_data_type", content, kind, source)
    yield from _other("zero_allow_untested_optimizer", content, True, "the optimizer, which is torch's AdamW")
    yield from _optimizer_problems(content.get("optimizer"), run)


def _optimizer_problems(section: Any, run: RunConfig) -> Iterator[str]:
    if section is None:
        return
    if not isinstance(section, dict) or section.keys() - {"type", "params"}:
        yield f"optimizer is {shown(section)}; write {{'type': 'AdamW', 'params': {{...}}}}, or leave it out"
        return
    kind = section.get("type")
    if str(kind).lower() not in ("adam", "adamw"):
        yield f"optimizer.type is {shown(kind)}, and the optimizer is AdamW; write AdamW, or leave it out"
    params, ours = section.get("params") or {}, run.optimizer
    if not isinstance(params, dict):
        yield f"optimizer.params is {shown(params)}, no JSON object; leave it out"
        return
    values: dict[str, tuple[Plain, str]] = {
        "lr": (ours.lr, "lr"),
        "betas": ([ours.adam_beta1, ours.adam_beta2], "adam_beta1 and adam_beta2"),
        "eps": (ours.adam_eps, "adam_eps"),
        "weight_decay": (ours.weight_decay, "weight_decay"),
        "adam_w_mode": (True, "decoupled weight decay, which is the only one here"),
    }
    for key in params.keys() - values.keys():
        yield f"optimizer.params.{key} is not taken; take it out of the file"
    for key, (value, source) in values.items():
        yield from (f"optimizer.params.{text}" for text in _other(key, params, value, source))


def _section(content: Mapping[str, Any], name: str, fields: Mapping[str, tuple[Plain, str]]) -> Iterator[str]:
    section = content.get(name)
    if section is None:
        return
    if not isinstance(section, dict):
        yield f"{name} is {shown(section)}, no JSON object; {_CURE}"
        return
    for key in section.keys() - fields.keys():
        yield f"{name}.{key} is not taken; take it out of the file"
    for key, (value, source) in fields.items():
        yield from (f"{name}.{text}" for text in _other(key, section, value, source))


def _other(name: str, section: Mapping[str, Any], ours: Plain, source: str) -> Iterator[str]:
    """The file's value, unless it says nothing or the same."""
    theirs = section.get(name)
    if theirs in (None, AUTO) or (theirs == ours and isinstance(theirs, bool) == isinstance(ours, bool)):
        return
    yield f"{name} is {shown(theirs)}, and {ours} follows from {source}; write auto, or make them the same"


# ---------------------------------------------------------------- what DeepSpeed is given


def deepspeed_settings(run: RunConfig, dp: int) -> dict[str, Any]:
    """The whole configuration for ``deepspeed.initialize``.

    Args:
        run: resolved and checked.
        dp: data-parallel size, context-parallel ranks included: ranks among which parameters are divided.
    """
    content, training = read_deepspeed(run), run.training
    full = not training.bf16 or training.accumulate_allreduce_grads_in_fp32
    width = run.model.hidden_size or 0
    zero = {name: value for name, value in content["zero_optimization"].items() if name in ZERO_FIELDS}
    # As in Hugging Face's integration: by the size of one square matrix of the model.
    automatic = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for name in [name for name, value in zero.items() if value == AUTO]:
        del zero[name]
        if name in automatic:
            zero[name] = automatic[name]
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        # One: the step says which micro-batch is its last, and a ramp changes their number.
        "gradient_accumulation_steps": 1,
        "train_batch_size": training.micro_batch_size * dp,
        "gradient_clipping": run.optimizer.clip_grad,
        "bf16": {"enabled": training.bf16},
        "data_types": {"grad_accum_dtype": "fp32" if full else "bf16"},
        "communication_data_type": "fp32" if full else "bf16",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": bool(content.get("zero_force_ds_cpu_optimizer", False)),
        "steps_per_print": 10**9,
        **{name: content[name] for name in SWITCHES - {"zero_force_ds_cpu_optimizer"} if name in content},
    }
