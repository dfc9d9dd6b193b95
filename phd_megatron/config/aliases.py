"""Megatron-LM's flags that are not field names here: one row each, saying what becomes of it.

A row renames (:class:`Rename`), sets a field (:class:`Set`), is true anyway (:class:`Accept`), accepts some values
(:class:`Choice`), or is refused by name with a reason and a cure (:class:`Refuse`). Flags that are field names, or
``TransformerConfig`` fields, need no row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from phd_megatron.config.plain import Plain


@dataclass(frozen=True)
class Rename:
    """The flag takes the value of ``field``."""

    field: str
    note: str = ""


@dataclass(frozen=True)
class Set:
    """The flag takes no value and sets ``field`` to ``value``.

    ``only_over``: values of the field, wherever they come from, that it may replace; another one is a conflict.
    """

    field: str
    value: Plain
    only_over: tuple[Plain, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Accept:
    """The flag takes no value and asks for what is always so. ``needs``: a field that must be set with it."""

    note: str
    needs: str | None = None


@dataclass(frozen=True)
class Choice:
    """The flag takes one value. ``values`` maps each accepted one to the fields it sets."""

    values: dict[str, dict[str, Plain]] = field(default_factory=dict)
    reason: str = ""
    cure: str = ""


@dataclass(frozen=True)
class Refuse:
    """The flag is known and cannot be honoured."""

    reason: str
    cure: str


Alias = Rename | Set | Accept | Choice | Refuse

_FILES = Refuse("tokenizers are read from a directory", "put tokenizer.json there and give --tokenizer DIRECTORY")
_SAVES_ALL = Refuse("a checkpoint always holds everything", "skip it when loading: --no-load-optim, --no-load-rng")
_FSDP = Refuse("FSDP is not available", "use --use-distributed-optimizer, which shards optimizer states")

ALIASES: dict[str, Alias] = {
    # model
    "group_query_attention": Accept("num_query_groups says it", needs="num_query_groups"),
    "swiglu": Set("gated_linear_unit", True),
    "norm_epsilon": Rename("layernorm_epsilon"),
    "disable_bias_linear": Set("add_bias_linear", False),
    "qk_layernorm": Set("norm_scheme", "pre_qk", only_over=("pre", "pre_qk", "pre_qk_pre")),
    "apply_layernorm_1p": Rename("layernorm_zero_centered_gamma"),
    "use_rotary_position_embeddings": Accept("positions are always rotary"),
    "no_position_embedding": Accept("there are no learned positions; they are rotary"),
    "squared_relu": Refuse("the FFN is SwiGLU or GELU", "use --gated-linear-unit or --no-gated-linear-unit"),
    "quick_geglu": Refuse("the FFN is SwiGLU or GELU", "use --gated-linear-unit or --no-gated-linear-unit"),
    "use_mcore_models": Accept("models are always Megatron-Core's"),
    "use_flash_attn": Accept("--phd-attention-backend auto takes a flash kernel where there is one"),
    "num_experts": Rename("num_moe_experts"),
    "moe_use_upcycling": Refuse("training does not change the model", "use import --upcycle-experts"),
    "spec": Refuse("layers come from --norm-scheme and the --phd-* fields", "leave it out"),
    # precision
    "fp8_format": Rename("fp8"),
    "fp4_format": Rename("fp4"),
    "fp8_param_gather": Rename("fp8_param"),
    # layout
    "num_virtual_stages_per_pipeline_rank": Rename("virtual_pipeline_model_parallel_size"),
    "no_overlap_p2p_communication": Set("overlap_p2p_comm", False),
    "decoder_first_pipeline_num_layers": Rename("num_layers_in_first_pipeline_stage"),
    "decoder_last_pipeline_num_layers": Rename("num_layers_in_last_pipeline_stage"),
    "distributed_backend": Choice(
        {}, "the backend follows the device: nccl on cuda, gloo on cpu", "use --device cpu|cuda"
    ),
    "use_megatron_fsdp": _FSDP,
    "use_torch_fsdp2": _FSDP,
    "use_tp_pp_dp_mapping": Refuse("ranks are ordered tp-cp-ep-dp-pp", "leave it out"),
    "grad_reduce_in_bf16": Set("accumulate_allreduce_grads_in_fp32", False),
    "init_method_xavier_uniform": Refuse(
        "weights are drawn from a truncated normal, as the papers have it", "use --init and --init-method-std"
    ),
    # training
    "muon_use_nesterov": Set("muon_nesterov", True),
    "muon_no_split_qkv": Set("muon_split_qkv", False),
    "exit_signal_handler": Accept("SIGTERM and SIGINT always save and stop"),
    "calculate_per_token_loss": Accept("the loss is always a mean over tokens"),
    "recompute_activations": Set("recompute_granularity", "selective"),
    "override_opt_param_scheduler": Accept("what is given on resume always replaces what was saved"),
    "manual_gc": Refuse("garbage collection is not steered", "leave it out"),
    # fusions
    "no_bias_swiglu_fusion": Set("bias_activation_fusion", False),
    "no_bias_gelu_fusion": Set("bias_activation_fusion", False),
    "no_bias_dropout_fusion": Set("bias_dropout_fusion", False),
    "no_masked_softmax_fusion": Accept("attention never materialises its softmax"),
    "no_rope_fusion": Accept("RoPE is not fused"),
    "no_persist_layer_norm": Accept("norms are not apex's"),
    # data
    "tokenizer_type": Choice(
        {"HuggingFaceTokenizer": {}},
        "tokenizers are `byte` or a directory with a Hugging Face tokenizer",
        "use --tokenizer-type HuggingFaceTokenizer --tokenizer-model DIRECTORY, or --tokenizer byte|DIRECTORY",
    ),
    "tokenizer_model": Rename("tokenizer"),
    "vocab_file": _FILES,
    "merge_file": _FILES,
    "mock_data": Refuse("there is no made-up data", "run `phd-megatron prepare` on any text; --data-path PREFIX"),
    "dataloader_type": Choice({"single": {}}, "samples are read once in a fixed order", "use single"),
    "no_create_attention_mask_in_dataloader": Accept("no mask is ever built in the data loader"),
    "no_mmap_bin_files": Refuse("data files are always memory-mapped", "leave it out"),
    # checkpoints
    "use_checkpoint_args": Accept("the configuration saved in --load is always read"),
    "ckpt_format": Choice({"torch_dist": {}}, "checkpoints are torch_dist directories", "use torch_dist"),
    "use_dist_ckpt": Accept("checkpoints are always torch_dist"),
    "dist_ckpt_optim_fully_reshardable": Accept("optimizer states are always saved so that any layout can load them"),
    "no_save_optim": _SAVES_ALL,
    "no_save_rng": _SAVES_ALL,
    "pretrained_checkpoint": Refuse("there is one --load", "use --load DIR --finetune"),
    "ckpt_step": Refuse("--load takes the newest checkpoint of a directory", "use --load DIR/iter_0000100"),
    "non_persistent_save_interval": Refuse("there is one kind of checkpoint", "use --save-interval and --keep-last"),
    "save_retain_interval": Refuse("old checkpoints are kept by count", "use --keep-last N"),
    # logging
    "use_pytorch_profiler": Accept("--profile uses torch's profiler"),
    "log_throughput": Accept("throughput is in every log line"),
    "log_params_norm": Refuse("the parameters' norm is not logged", "leave it out"),
    "log_num_zeros_in_grad": Refuse("zeros in gradients are not counted", "leave it out"),
    "timing_log_level": Refuse("there are no timer levels", "leave it out"),
}
"""Megatron flag without its dashes, underscores inside -> its row."""


def describe_alias(alias: Alias) -> str:
    """One line for ``--help``."""
    match alias:
        case Rename(field=name):
            return f"same as --{name.replace('_', '-')}"
        case Set(field=name, value=value):
            return f"sets {name} to {str(value).lower() if isinstance(value, bool) else value}"
        case Accept(note=note):
            return f"accepted: {note}"
        case Choice(values=values, reason=reason):
            return f"accepts {', '.join(values)}: {reason}" if values else f"refused: {reason}"
        case Refuse(reason=reason, cure=cure):
            return f"refused: {reason}; {cure}"
