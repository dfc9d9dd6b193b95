"""May a run with this configuration continue from a checkpoint that was saved with that one?"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from phd_megatron.config.catalog import NOT_INHERITED, fields
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import lookup
from phd_megatron.config.unsupported import raise_all

EXECUTION_ONLY = (
    *("phd_attention_backend", "transformer_impl", "phd_last_layer_pruning", "hidden_dropout", "attention_dropout"),
    *("init", "init_method_std", "head_init_method_std"),  # weights are not drawn again
    *("recompute_*", "distribute_saved_activations", "*_fusion", "fp8*", "first_last_layers_bf16", "num_layers_at_*"),
    "cuda_graph_*",
    *("tp_comm_*", "tp_only_amax_red", "batch_p2p_*", "deallocate_pipeline_outputs", "attention_backend"),
    *("deterministic_mode", "num_microbatches_with_partial_activation_checkpoints", "barrier_with_L1_time"),
    *("async_tensor_model_parallel_allreduce", "clone_scatter_output_in_embedding", "config_logger_dir", "test_mode"),
    *("moe_token_dispatcher_type", "moe_grouped_gemm", "moe_shared_expert_overlap", "moe_router_dtype"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate"),
    *("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy"),
    "moe_router_padding_for_quantization",
    *("disable_*", "gradient_accumulation_fusion", "activation_func_fp8_input_store", "use_te_activation_func"),
)
"""Fields of the model section (with ``*`` patterns) that change how a step is computed, not what is trained."""

NO_PARAMETERS = (
    *("seq_length", "max_position_embeddings", "rotary_base"),
    *("phd_repeat", "phd_window", "phd_chunk", "phd_copy_positions"),
)
"""Architecture without parameters: ``finetune`` may change it, a plain resume may not."""

_ADDS_FROM_ZERO = ("phd_copy_embedding", "none")
"""Field and value from which ``finetune`` may add parameters, because they start at zero and change nothing."""


def check_resume(saved: RunConfig, new: RunConfig) -> list[str]:
    """Compare two resolved configurations.

    Returns:
        One line per field that changed and may change.

    Raises:
        UserError: if architecture differs, with every field that does. With ``new.checkpoint.finetune``, architecture
            that has no parameters may change.
    """
    notes, refused = [], []
    for name in _all_names(saved, new):
        before, after = lookup(saved, name), lookup(new, name)
        if before == after or name in NOT_INHERITED:
            continue
        section = fields()[name].section if name in fields() else "model"
        change = f"{name}: {_show(name, before)} -> {_show(name, after)}"
        if section != "model" or _matches(name, EXECUTION_ONLY):
            notes.append(f"changed since the checkpoint: {change}")
        elif name == "vocab_size" and after is None:
            continue  # the tokenizer has not been read yet
        elif name == "phd_repeat" and before > 1 and lookup(saved, "phd_copy_embedding") == "vector":
            refused.append(
                f"phd_repeat={after}: the checkpoint in {new.checkpoint.load} has a learned vector for each of its "
                f"phd_repeat={before} copies but the first, which another number of copies has no place for; keep "
                "phd_repeat, or train a new model without --load"
            )
        elif new.checkpoint.finetune and (name in NO_PARAMETERS or (name, before) == _ADDS_FROM_ZERO):
            notes.append(f"changed for fine-tuning: {change}")
        else:
            refused.append(
                f"{name}={_show(name, after)}: the checkpoint in {new.checkpoint.load} has "
                f"{name}={_show(name, before)}, and architecture cannot change on resume; "
                + ("add --finetune, or " if name in NO_PARAMETERS or (name, before) == _ADDS_FROM_ZERO else "")
                + "leave the field out, or train a new model without --load"
            )
    raise_all(refused)
    return notes


def _all_names(*configs: RunConfig) -> list[str]:
    extra = {name: None for config in configs for name in config.model.transformer}
    return [*fields(), *extra]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _show(name: str, value: Any) -> str:
    return "Megatron-Core's default" if value is None and name not in fields() else repr(value)
