"""What the fields of Megatron-Core's ``TransformerConfig`` are that stand below ``model.transformer``.

The counterpart of the annotations in :mod:`phd_megatron.config.schema`, for fields that are not ours to declare. What
is of no use here at all has a row in :mod:`phd_megatron.config.unsupported` instead. Fields are those of
Megatron-Core 0.16 to 0.19.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from phd_megatron.config.facts import COMPUTING, PLACE, RECIPE, SHAPE, Role

ROLES: dict[str, Role] = {
    # experts
    "num_moe_experts": SHAPE,
    "moe_layer_freq": SHAPE,
    "moe_ffn_hidden_size": SHAPE,
    "moe_shared_expert_intermediate_size": SHAPE,
    "moe_shared_expert_gate": SHAPE,
    "moe_router_topk": SHAPE,
    "moe_router_topk_scaling_factor": SHAPE,
    "moe_router_score_function": SHAPE,
    "moe_router_pre_softmax": SHAPE,
    "moe_router_enable_expert_bias": SHAPE,
    "moe_router_num_groups": SHAPE,
    "moe_router_group_topk": SHAPE,
    "moe_router_load_balancing_type": RECIPE,
    "moe_router_bias_update_rate": RECIPE,
    "moe_router_quantile_balancing_ema": RECIPE,
    "moe_aux_loss_coeff": RECIPE,
    "moe_z_loss_coeff": RECIPE,
    # A capacity holds for training alone: inference drops nothing.
    "moe_expert_capacity_factor": RECIPE,
    "moe_pad_expert_input_to_capacity": RECIPE,
    "moe_token_drop_policy": RECIPE,
    "moe_router_dtype": COMPUTING,
    "moe_router_padding_for_quantization": COMPUTING,
    "moe_router_fusion": COMPUTING,
    "moe_permute_fusion": COMPUTING,
    "moe_grouped_gemm": COMPUTING,
    "moe_token_dispatcher_type": COMPUTING,
    "moe_flex_dispatcher_*": COMPUTING,
    "moe_*ep_num_sms": COMPUTING,
    "overlap_moe_expert_parallel_comm": COMPUTING,
    "moe_shared_expert_overlap": COMPUTING,
    "moe_extended_tp": COMPUTING,
    # attention and layers; other values than these fields' defaults are refused
    "softmax_type": SHAPE,
    "glu_linear_offset": SHAPE,
    "attention_backend": COMPUTING,
    "attention_softmax_in_fp32": COMPUTING,
    "calculate_per_token_loss": COMPUTING,
    # precision
    "fp8": COMPUTING,
    "fp8_*": COMPUTING,
    "first_last_layers_bf16": COMPUTING,
    "num_layers_at_*_in_bf16": COMPUTING,
    "disable_bf16_reduced_precision_matmul": COMPUTING,
    "use_te_activation_func": COMPUTING,
    # memory
    "recompute_*": COMPUTING,
    "distribute_saved_activations": COMPUTING,
    "num_microbatches_with_partial_activation_checkpoints": COMPUTING,
    "offload_modules": COMPUTING,
    "activation_offload_fraction": COMPUTING,
    "mlp_chunks_for_training": COMPUTING,
    "disable_parameter_transpose_cache": COMPUTING,
    "clone_scatter_output_in_embedding": COMPUTING,
    "deallocate_pipeline_outputs": COMPUTING,
    # kernels, graphs and transfers
    "bias_*_fusion": COMPUTING,
    "cross_entropy_*": COMPUTING,
    "gradient_accumulation_fusion": COMPUTING,
    "async_tensor_model_parallel_allreduce": COMPUTING,
    "cuda_graph_*": COMPUTING,
    "tp_comm_*": COMPUTING,
    "tp_only_amax_red": COMPUTING,
    "batch_p2p_*": COMPUTING,
    "wgrad_deferral_limit": COMPUTING,
    "barrier_with_L1_time": COMPUTING,
    "mlp_chunks_for_prefill": COMPUTING,
    "perform_initialization": COMPUTING,
    "use_cpu_initialization": COMPUTING,
    "config_logger_dir": PLACE,
}
"""Field, or pattern with ``*`` of names -> its role. No name fits two rows."""


def transformer_role(name: str) -> Role:
    """The field's role. One that has no row is taken for a part of the model, which never changes."""
    return next((role for pattern, role in ROLES.items() if fnmatchcase(name, pattern)), SHAPE)
