"""What is accepted as a name and not as a value.

Features that are not built, and ``TransformerConfig`` fields that the model would silently ignore or get wrong. One row
each; building the feature deletes its row.

Fields are those of Megatron-Core 0.16 to 0.19 (``runtime/mcore_versions.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from phd_megatron.config.cuda_graph import is_full_iteration
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import values_of

Test = Callable[[Plain, RunConfig], bool]


def _set(value: Plain, config: RunConfig) -> bool:
    return value is not None and value is not False


def _not(*harmless: Plain) -> Test:
    return lambda value, config: value not in harmless


def _with_local_layers(value: Plain, config: RunConfig) -> bool:
    """The machine that the run is for may have Transformer Engine; a run is held against its machine when it starts."""
    return _set(value, config) and config.model.transformer_impl == "local"


def _without(switch: str) -> Test:
    """The value is set while the ``TransformerConfig`` field that would make it matter is not."""
    return lambda value, config: _set(value, config) and config.model.transformer.get(switch) in (None, False)


def _without_flex(value: Plain, config: RunConfig) -> bool:
    return _set(value, config) and config.model.transformer.get("moe_token_dispatcher_type") != "flex"


def _asked_without(switch: str) -> Test:
    """The same of a field whose ``auto`` asks for nothing."""
    return lambda value, config: value != "auto" and _without(switch)(value, config)


def _one_by_one(value: Plain, config: RunConfig) -> bool:
    return _set(value, config) and config.model.moe_experts_backend == "sequential"


def _holds(*items: str) -> Test:
    return lambda value, config: any(item in items for item in (value if isinstance(value, list) else [value]))


def _holds_without(switch: str, *items: str) -> Test:
    return lambda value, config: _holds(*items)(value, config) and _without(switch)(value, config)


def _graph_of_layers(value: Plain, config: RunConfig) -> bool:
    if value in (None, "none"):
        return False
    return value != "local" or not is_full_iteration(config.model.transformer.get("cuda_graph_scope"))


@dataclass(frozen=True)
class Unsupported:
    """One row. ``field`` is a name or a pattern with ``*`` of names; ``refused(value, config)`` says which values."""

    field: str
    reason: str
    cure: str = "leave it out"
    refused: Test = _set


_OURS = "use norm_scheme, the one place that says what is normed"
_ATTENTION = "PHD attention has one form and would ignore it"
_TE = "it needs Transformer Engine's layers, and would be silently ignored without them"
_TE_CURE = "leave out transformer_impl=local, or leave it out itself"
_NO_FP8 = "it has no effect without fp8"
_RECIPES = "use fp8_recipe delayed, tensorwise, blockwise or mxfp8"
_NO_RECOMPUTE = "it has no effect without recompute_granularity"
_RECOMPUTE = "set recompute_granularity to full or selective"
_SCHEDULE = "weight gradients or transfers on streams of their own have not been held against one rank"
_NO_EXPERTS = "it has no effect without experts"
_EXPERTS = "set num_moe_experts, or leave it out"
_EITHER = "leave one of them out"
_FLEX = "set moe_token_dispatcher_type flex, or leave it out"
_HYBRIDEP = "what HybridEP permutes and pads by itself has not been held against one rank"
_LAYERS = "the norm plan and the checkpoint keys assume plain decoder layers"
_FLAT_CP = "every sample is cut over all context-parallel ranks alike, in one group"
_FLAT_CP_CURE = "use context_parallel_size and cp_comm_type"
_NO_GRAPH = "it has no effect without cuda_graph_impl"
_LAYER_GRAPHS = "graphs of single layers are not supported: Megatron-Core's know the inputs of its own layers alone"
_GRAPH_CURE = "use cuda_graph_impl local with cuda_graph_scope full_iteration"
_SHARDS = "weights cut further than tensor parallelism cuts them have not been held against one rank"
_INTERLEAVED = "gate and value are the two halves of a weight, as in exports"
_OP_FUSER = "it needs the operation fuser of Transformer Engine, which is not used here"
_MUP = "its multipliers would act beside the norm scheme and its initial weights"
_INFERENCE = "Megatron-Core's inference engine does not know PHD's copies"

UNSUPPORTED: tuple[Unsupported, ...] = (
    # --- not built yet
    Unsupported(
        "attention_dropout", "PHD attention has no dropout on its weights", "use 0, or hidden_dropout", _not(0)
    ),
    # --- parallel features of Megatron-Core
    Unsupported("hierarchical_context_parallel_sizes", _FLAT_CP, _FLAT_CP_CURE),
    Unsupported("hybrid_context_parallel", _FLAT_CP, _FLAT_CP_CURE),
    Unsupported("max_seqlen_per_dp_cp_rank", _FLAT_CP, _FLAT_CP_CURE),
    Unsupported("pipeline_model_parallel_comm_backend", "process groups exist before this field is read"),
    Unsupported("pipeline_dtype", "it follows bf16 and fp16"),
    Unsupported("variable_seq_lengths", "every sample has seq_length tokens"),
    Unsupported("defer_embedding_wgrad_compute", "the output layer of PHD models does not keep what it needs"),
    Unsupported("wgrad_deferral_limit", "the output layer of PHD models does not keep what it needs", refused=_not(0)),
    Unsupported("ep_overlap_early_attn_memory_release", _SCHEDULE),
    Unsupported("delay_wgrad_compute", _SCHEDULE),
    Unsupported("high_priority_a2a_comm_stream", _SCHEDULE),
    Unsupported("overlap_dispatch_backward_with_experts_wgrad", _SCHEDULE),
    Unsupported("*gtp_weight_remat_size", _SHARDS),
    Unsupported("*tensor_parallel_num_weight_shards", _SHARDS),
    Unsupported("use_ring_exchange_p2p", "it needs a PyTorch built with ring exchange"),
    Unsupported("tp_comm_overlap", _TE, _TE_CURE, _with_local_layers),
    Unsupported(
        "tp_comm_*", "it has no effect without tp_comm_overlap", "set tp_comm_overlap", _without("tp_comm_overlap")
    ),
    # --- mixture of experts
    Unsupported("expert_tensor_parallel_size", _NO_EXPERTS, _EXPERTS, _without("num_moe_experts")),
    Unsupported("moe_*", _NO_EXPERTS, _EXPERTS, _asked_without("num_moe_experts")),
    Unsupported("moe_experts_backend", _TE, _TE_CURE, lambda v, config: v == "te" and _with_local_layers(v, config)),
    Unsupported("moe_grouped_gemm", "moe_experts_backend=sequential says the opposite", _EITHER, _one_by_one),
    Unsupported(
        "moe_use_legacy_grouped_gemm", "Megatron-Core has given its grouped_gemm layer up", "use moe_experts_backend"
    ),
    Unsupported("moe_enable_deepep", "Megatron-Core has renamed it", "use moe_flex_dispatcher_backend deepep"),
    Unsupported("moe_flex_dispatcher_backend", _OP_FUSER, "use deepep or hybridep", _holds("ncclep")),
    Unsupported("moe_ncclep_*", _OP_FUSER),
    Unsupported("moe_permute_fusion_into_hybridep", _HYBRIDEP),
    Unsupported("moe_hybridep_pad_uneven_dispatch_inputs", _HYBRIDEP),
    Unsupported("moe_hybridep_num_blocks_*", _HYBRIDEP),
    Unsupported("moe_hybridep_num_sms_preprocessing", _HYBRIDEP),
    *(
        Unsupported(name, "it has no effect without the flex dispatcher", _FLEX, _without_flex)
        for name in (
            "moe_flex_dispatcher_backend",
            "moe_flex_dispatcher_num_sms",
            "moe_deepep_num_sms",
            "moe_hybridep_num_sms",
        )
    ),
    Unsupported("moe_permute_fusion", _TE, _TE_CURE, _with_local_layers),
    Unsupported("moe_router_fusion", _TE, _TE_CURE, _with_local_layers),
    Unsupported("moe_latent_size", "latent projections around experts are not available, and not in any export"),
    Unsupported("moe_mlp_glu_interleave_size", _INTERLEAVED),
    Unsupported("moe_shared_expert_glu_interleave_size", _INTERLEAVED),
    Unsupported("moe_single_grouped_*", "one tensor for all experts has other checkpoint keys, which no export knows"),
    Unsupported("moe_paged_stash*", _OP_FUSER),
    Unsupported("moe_expert_rank_capacity_factor", _OP_FUSER),
    Unsupported(
        "moe_router_load_balancing_type",
        "Sinkhorn balances the rows of one rank, so each layout would route differently",
        "use aux_loss, seq_aux_loss or global_aux_loss",
        _holds("sinkhorn"),
    ),
    Unsupported(
        "moe_router_load_balancing_type",
        "quantile balancing has not been held against one rank for any layout",
        "use aux_loss, seq_aux_loss or global_aux_loss",
        _holds("quantile_balancing"),
    ),
    Unsupported(
        "moe_router_quantile_balancing_ema",
        "quantile balancing has not been held against one rank for any layout",
        refused=_not(0),
    ),
    Unsupported("moe_input_jitter_eps", "noise on the router's input would differ from layout to layout"),
    Unsupported("moe_router_force_load_balancing", "it routes at random, for measurements only"),
    Unsupported("moe_router_force_biased", "it routes at random, for measurements only"),
    Unsupported("moe_enable_routing_replay", "nothing here records or replays routes"),
    Unsupported("moe_apply_probs_on_input", "probabilities scale what experts put out, as in exports"),
    Unsupported(
        "moe_token_dropping", "Megatron-Core accepts it and reads it nowhere", "use moe_expert_capacity_factor"
    ),
    Unsupported("moe_layer_recompute", "Megatron-Core has given it up", "use recompute_modules: [moe]"),
    Unsupported(
        "moe_router_topk_limited_devices",
        "it ties the model to a layout",
        "use moe_router_num_groups and moe_router_group_topk",
    ),
    Unsupported(
        "moe_router_padding_for_fp8", "Megatron-Core has renamed it", "use moe_router_padding_for_quantization"
    ),
    Unsupported("moe_router_padding_for_quantization", _NO_FP8, "set fp8 to hybrid or e4m3", _without("fp8")),
    Unsupported("moe_per_layer_logging", "the metrics file holds the load of every layer's experts"),
    Unsupported(
        "moe_router_bias_update_rate",
        "it has no effect without an expert bias",
        "set moe_router_enable_expert_bias",
        _without("moe_router_enable_expert_bias"),
    ),
    Unsupported(
        "moe_token_drop_policy",
        "it has no effect without a capacity",
        "set moe_expert_capacity_factor",
        _without("moe_expert_capacity_factor"),
    ),
    # --- precision
    Unsupported("fp8", _TE, _TE_CURE, _with_local_layers),
    Unsupported("fp8_dot_product_attention", _ATTENTION),
    Unsupported("fp8_multi_head_attention", _ATTENTION),
    Unsupported("fp8_recipe", "it names Python code that would be imported", _RECIPES, _holds("custom")),
    Unsupported("fp8_quantizer_factory", "it names Python code that would be imported", _RECIPES),
    Unsupported("fp8_output_proj", "the output layer is Megatron-Core's local one, which multiplies in bfloat16"),
    Unsupported("fp8_*", _NO_FP8, "set fp8 to hybrid or e4m3", _without("fp8")),
    Unsupported("tp_only_amax_red", _NO_FP8, "set fp8 to hybrid or e4m3", _without("fp8")),
    Unsupported("first_last_layers_bf16", _NO_FP8, "set fp8 to hybrid or e4m3", _without("fp8")),
    Unsupported(
        "num_layers_at_*_in_bf16",
        "it has no effect without first_last_layers_bf16",
        "set fp8 and first_last_layers_bf16",
        _without("first_last_layers_bf16"),
    ),
    Unsupported("activation_func_fp8_input_store", "SwiGLU is a function of this package, which keeps its input as is"),
    Unsupported("fp4", "FP4 needs a Blackwell GPU, and has not been built or run on one", "use fp8 on Ada or newer"),
    Unsupported("fp4_*", "FP4 needs a Blackwell GPU, and has not been built or run on one", "use fp8 on Ada or newer"),
    Unsupported("enable_autocast", "parameters are cast once, with bf16 or fp16", "use bf16 or fp16"),
    Unsupported("fp32_residual_connection", "the residual streams of the norm schemes are not tested with it"),
    Unsupported("use_kitchen*", "kitchen layers are not wired up"),
    Unsupported("kitchen_*", "kitchen layers are not wired up"),
    Unsupported(
        "deterministic_mode",
        "attention kernels on CUDA may sum gradients in any order, whatever Megatron-Core's layers do",
        "leave it out; on CPU runs are repeatable",
    ),
    Unsupported(
        "cross_entropy_fusion_impl",
        _TE,
        "use native",
        lambda value, config: value == "te" and _with_local_layers(value, config),
    ),
    # --- attention
    Unsupported("multi_latent_attention", "the layers have plain q, k and v projections, which PHD repeats"),
    Unsupported("experimental_attention_variant", _ATTENTION),
    Unsupported("dsa_*", "it belongs to an attention variant that is not available"),
    Unsupported("linear_*", "it belongs to an attention variant that is not available"),
    Unsupported("window_size", "sliding windows over original tokens are not part of PHD", "see phd_window"),
    Unsupported("window_attn_skip_freq", "sliding windows over original tokens are not part of PHD", "see phd_window"),
    Unsupported("softmax_scale", "scores are divided by sqrt(kv_channels), as in the Hugging Face export"),
    Unsupported("softmax_type", _ATTENTION, "use vanilla", _not("vanilla")),
    Unsupported("apply_query_key_layer_scaling", _ATTENTION, "norm q and k: norm_scheme pre_qk or hybrid"),
    Unsupported("attention_softmax_in_fp32", "softmax always accumulates in fp32", "use true", _not(True)),
    Unsupported("masked_softmax_fusion", "attention never materialises its softmax"),
    Unsupported("attention_output_gate", "the attention output has no gate in any norm scheme or in the export"),
    Unsupported("qk_layernorm", "it would norm q and k beside the norm scheme", "use norm_scheme: pre_qk, or a hybrid"),
    Unsupported("qk_l2_norm", "it would norm q and k beside the norm scheme", _OURS),
    Unsupported("qk_clip", "PHD attention does not report its largest logit", "norm q and k: norm_scheme pre_qk"),
    Unsupported("qk_clip_*", "PHD attention does not report its largest logit"),
    Unsupported("log_max_attention_logit", "PHD attention does not report its largest logit"),
    Unsupported("batch_invariant_mode", _ATTENTION),
    Unsupported("flash_attention_version", _ATTENTION, "use phd_attention_backend"),
    Unsupported("test_mode", "its checks read biases that RMSNorm does not have"),
    # --- positions
    Unsupported("rotary_interleaved", "RoPE turns halves, as in the Hugging Face export"),
    Unsupported("no_rope_freq", "every layer has RoPE, as in the Hugging Face export"),
    Unsupported("mrope_section", "positions are one-dimensional"),
    Unsupported("apply_rope_fusion", "the fused kernel is not tested with repeated positions"),
    Unsupported("fused_single_qkv_rope", "the fused kernel skips the norms on q, k and v"),
    # --- layers
    Unsupported("apply_residual_connection_post_layernorm", "Megatron-Core accepts it and reads it nowhere", _OURS),
    Unsupported("layernorm_zero_centered_gamma", "norm weights are plain, as in the Hugging Face export"),
    Unsupported("persist_layer_norm", "it chooses an apex kernel, and norms are not apex's"),
    Unsupported("memory_efficient_layer_norm", "it chooses an apex kernel, and norms are not apex's"),
    Unsupported("glu_linear_offset", "the FFN is SwiGLU or GELU, as in the export", refused=_not(0)),
    Unsupported("activation_func_clamp_value", "the FFN is SwiGLU or GELU, as in the export"),
    Unsupported("use_fused_weighted_squared_relu", "the FFN is SwiGLU or GELU, as in the export"),
    Unsupported("use_te_activation_func", _TE, _TE_CURE, _with_local_layers),
    Unsupported("fused_residual_rmsnorm", "residuals are added by the norm scheme, outside of the norms"),
    Unsupported("use_transformer_engine_op_fuser", "its fused FFN takes its own activation, which exports do not have"),
    Unsupported("use_grouped_gemm_for_*", _OP_FUSER),
    Unsupported("mlp_chunks_for_training", "it has not been run with repeated tokens", refused=_not(1)),
    Unsupported("mtp_*", "multi-token prediction is not available; the loss sees the last copy only"),
    Unsupported("heterogeneous_block_specs", _LAYERS),
    Unsupported("hetereogenous_dist_checkpoint", _LAYERS),
    Unsupported("is_hybrid_model", _LAYERS),
    Unsupported("mamba_*", _LAYERS),
    Unsupported("use_mamba_mem_eff_path", _LAYERS),
    Unsupported("calculate_per_token_loss", "the loss is always a mean over tokens", "leave it out", _not(True)),
    # --- initialisation
    Unsupported("embedding_init_method_std", "weights are drawn by init and init_method_std", "set init_method_std"),
    Unsupported("use_mup", _MUP, "set init, init_method_std and decoupled_lr by hand"),
    Unsupported("mup_*", _MUP, "set init, init_method_std and decoupled_lr by hand"),
    Unsupported("perform_initialization", "weights are always drawn by name, for any layout alike", refused=_not(True)),
    Unsupported(
        "use_cpu_initialization", "weights are always drawn on the CPU, for any layout alike", refused=_not(True)
    ),
    Unsupported("init_model_with_meta_device", "it works with FSDP only, not available"),
    Unsupported("use_te_rng_tracker", "random state is kept by Megatron-Core's own tracker"),
    # --- memory, graphs, timers
    Unsupported("recompute_method", _NO_RECOMPUTE, _RECOMPUTE, _without("recompute_granularity")),
    Unsupported("recompute_num_layers", _NO_RECOMPUTE, _RECOMPUTE, _without("recompute_granularity")),
    Unsupported("recompute_modules", _NO_RECOMPUTE, _RECOMPUTE, _without("recompute_granularity")),
    Unsupported(
        "recompute_modules",
        "mla_up_proj is a part that the model does not have",
        "use core_attn, layernorm, mlp or moe",
        _holds("mla_up_proj"),
    ),
    Unsupported(
        "recompute_modules",
        "moe, moe_act and shared_experts are parts that the model does not have",
        "set num_moe_experts, or use core_attn, layernorm or mlp",
        _holds_without("num_moe_experts", "moe", "moe_act", "shared_experts"),
    ),
    Unsupported(
        "recompute_modules",
        "moe_act is a part of grouped experts",
        "use moe, or another moe_experts_backend than sequential",
        lambda value, config: _holds("moe_act")(value, config) and _one_by_one(value, config),
    ),
    Unsupported(
        "recompute_modules",
        "there are no shared experts",
        "set moe_shared_expert_intermediate_size, or leave shared_experts out",
        _holds_without("moe_shared_expert_intermediate_size", "shared_experts"),
    ),
    Unsupported("distribute_saved_activations", _NO_RECOMPUTE, _RECOMPUTE, _without("recompute_granularity")),
    Unsupported("cpu_offloading*", "activation offloading is not available yet", "use recompute_granularity"),
    Unsupported("fine_grained_activation_offloading", "it is not available yet", "use recompute_granularity"),
    Unsupported("offload_modules", "activation offloading is not available yet", refused=_not(None, [])),
    Unsupported("min_offloaded_tensor_size", "activation offloading is not available yet"),
    Unsupported("fine_grained_offloading_max_inflight_offloads", "activation offloading is not available yet"),
    Unsupported("activation_offload_fraction", "activation offloading is not available yet", refused=_not(1)),
    Unsupported("delay_offload_until_cuda_graph", "activation offloading is not available yet"),
    Unsupported("delta_offload_bytes_across_pp_ranks", "activation offloading is not available yet"),
    Unsupported("enable_cuda_graph", "Megatron-Core has renamed it", _GRAPH_CURE),
    Unsupported("external_cuda_graph", _LAYER_GRAPHS, _GRAPH_CURE),
    Unsupported("cuda_graph_modules", _LAYER_GRAPHS, _GRAPH_CURE),
    Unsupported("cuda_graph_impl", _LAYER_GRAPHS, f"{_GRAPH_CURE}, or none", _graph_of_layers),
    Unsupported("cuda_graph_scope", _NO_GRAPH, _GRAPH_CURE, _without("cuda_graph_impl")),
    Unsupported("cuda_graph_warmup_steps", _NO_GRAPH, _GRAPH_CURE, _without("cuda_graph_impl")),
    Unsupported("cuda_graph_use_single_mempool", "it belongs to graphs of single layers, which are not supported"),
    Unsupported("cuda_graph_retain_backward_graph", "it belongs to graphs of single layers, which are not supported"),
    Unsupported("barrier_with_L1_time", "there are no timer levels", refused=_not(True)),
    # --- inference
    Unsupported("flash_decode", _INFERENCE, "use `phd-megatron generate`"),
    Unsupported("inference_*", _INFERENCE, "use `phd-megatron generate`"),
    Unsupported("use_inference_optimized_layers", _INFERENCE, "use `phd-megatron generate`"),
    Unsupported("symmetric_ar_type", _INFERENCE, "use `phd-megatron generate`"),
    Unsupported("nccl_all_reduce_for_prefill", _INFERENCE, "use `phd-megatron generate`"),
    Unsupported("moe_pad_experts_for_cuda_graph_inference", _INFERENCE, "use `phd-megatron generate`"),
    Unsupported("mlp_chunks_for_prefill", _INFERENCE, "use `phd-megatron generate`", _not(1)),
)


def is_refused_by_name(name: str) -> bool:
    """Whether a ``TransformerConfig`` field has no use at all; ``--help`` does not list it then."""
    return any(fnmatchcase(name, row.field) and row.refused is _set for row in UNSUPPORTED)


def refusals(config: RunConfig) -> list[str]:
    """What this release cannot honour, one sentence each with value, reason and cure."""
    found = []
    for name, value in values_of(config).items():
        for row in UNSUPPORTED:
            if fnmatchcase(name, row.field) and row.refused(value, config):
                found.append(f"{name}={value!r}: {row.reason}; {row.cure}")
                break
    return found
