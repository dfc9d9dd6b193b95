"""The model of this package, whose code travels with the export: every norm scheme, copies, any experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phd_megatron.huggingface.family import (
    Apply,
    Family,
    dense_layers,
    ignored,
    layer_words,
    must,
    router_words,
    to,
)

if TYPE_CHECKING:
    from phd_megatron.config.schema import ModelConfig
    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.json_values import JSON, Fields

MODEL_CLASS, MODEL_TYPE = "PHDForCausalLM", "phd_transformer"
#: transformers' word for what it loads -> file and class of the bundled code
AUTO_MAP = {
    "AutoConfig": "configuration_phd.PHDConfig",
    "AutoModel": "modeling_phd.PHDModel",
    "AutoModelForCausalLM": f"modeling_phd.{MODEL_CLASS}",
}


def _write(a: Architecture) -> Fields:
    words: Fields = {"mlp_bias": a.linear_bias}
    if (moe := a.moe) is not None:
        words |= {
            **router_words(moe),
            **layer_words(moe),
            "scoring_func": moe.score_function,
            "use_expert_bias": moe.expert_bias,
            "n_group": moe.groups,
            "topk_group": moe.group_topk,
            "routed_scaling_factor": moe.scaling,
            "shared_expert_intermediate_size": moe.shared_hidden_size,
            "use_shared_expert_gate": moe.shared_gate,
            "router_dtype": moe.router_dtype,
        }
    return words | {
        "auto_map": AUTO_MAP,
        "mlp_gated": a.gated,
        "normalization": a.normalization,
        "attention_output_bias": a.linear_bias,
    }


def _experts_or_none(model: ModelConfig, value: JSON) -> None:
    if value:
        model.transformer["num_moe_experts"] = value


def _only_with_experts(name: str, default: JSON) -> Apply:
    """A field of our own exports that dense models have too, at its default."""

    def apply(model: ModelConfig, value: JSON) -> None:
        if "num_moe_experts" in model.transformer and value != default:
            model.transformer[name] = value

    return apply


def _pre_softmax(model: ModelConfig, value: JSON) -> None:
    if "num_moe_experts" in model.transformer and not value:
        model.transformer["moe_router_pre_softmax"] = True


def _qkv_bias(model: ModelConfig, value: JSON) -> None:
    model.add_qkv_bias = bool(value)


def _linear_bias(model: ModelConfig, value: JSON) -> None:
    model.add_bias_linear = bool(value)
    if value:
        model.add_qkv_bias = False  # add_bias_linear says it


FAMILY = Family(
    model_class=MODEL_CLASS,
    model_type=MODEL_TYPE,
    norm_scheme=None,
    has_experts=None,
    accepts=lambda architecture: True,
    readers={
        "phd_repeat": to("phd_repeat"),
        "phd_window": to("phd_window"),
        "phd_chunk": to("phd_chunk"),
        "phd_copy_positions": to("phd_copy_positions"),
        "phd_copy_embedding": to("phd_copy_embedding"),
        "norm_scheme": to("norm_scheme"),
        "normalization": to("normalization"),
        "mlp_gated": to("gated_linear_unit"),
        "hidden_act": must("silu", "gelu", reason="FFNs here are SwiGLU, or GELU without a gate"),
        "attention_bias": _qkv_bias,
        "mlp_bias": _linear_bias,
        "attention_output_bias": ignored,  # the same switch as mlp_bias, as every export writes it
        "num_experts": _experts_or_none,
        "num_experts_per_tok": _only_with_experts("moe_router_topk", None),
        "moe_intermediate_size": _only_with_experts("moe_ffn_hidden_size", None),
        "mlp_only_layers": dense_layers,
        "norm_topk_prob": _pre_softmax,
        "scoring_func": _only_with_experts("moe_router_score_function", "softmax"),
        "use_expert_bias": _only_with_experts("moe_router_enable_expert_bias", False),
        "n_group": _only_with_experts("moe_router_num_groups", None),
        "topk_group": _only_with_experts("moe_router_group_topk", None),
        "routed_scaling_factor": _only_with_experts("moe_router_topk_scaling_factor", 1.0),
        "shared_expert_intermediate_size": _only_with_experts("moe_shared_expert_intermediate_size", 0),
        "use_shared_expert_gate": _only_with_experts("moe_shared_expert_gate", False),
        "router_dtype": _only_with_experts("moe_router_dtype", None),
    },
    write=_write,
    is_bundled=True,
)
