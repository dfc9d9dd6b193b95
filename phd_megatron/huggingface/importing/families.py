"""The families that can be imported. Adding one: a row here, and its tensor names in :mod:`..mapping`."""

from __future__ import annotations

from typing import Any

from phd_megatron.config.schema import ModelConfig
from phd_megatron.huggingface.architecture import BUNDLED
from phd_megatron.huggingface.importing.fields import (
    EXPERTS,
    FULL_LAYERS,
    NO_WINDOW,
    Family,
    extra,
    ignored,
    must,
    to,
)


def _norm_topk_prob(model: ModelConfig, value: Any) -> None:
    model.transformer["moe_router_pre_softmax"] = not value


def _dense_layers(model: ModelConfig, value: Any) -> None:
    if value:
        assert model.num_layers is not None
        model.transformer["moe_layer_freq"] = [int(index not in value) for index in range(model.num_layers)]


def _every_layer(model: ModelConfig, value: Any) -> None:
    if value != 1:
        raise ValueError("only decoder_sparse_step 1 with mlp_only_layers can be imported")


def _expert_width(model: ModelConfig, value: Any) -> None:
    model.ffn_hidden_size = value
    model.transformer["moe_ffn_hidden_size"] = value


def _experts_or_none(model: ModelConfig, value: Any) -> None:
    if value:
        model.transformer["num_moe_experts"] = value


def _only_with_experts(name: str, default: Any) -> Any:
    """A field of our own exports that dense models have too, at its default."""

    def apply(model: ModelConfig, value: Any) -> None:
        if "num_moe_experts" in model.transformer and value != default:
            model.transformer[name] = value

    return apply


def _our_pre_softmax(model: ModelConfig, value: Any) -> None:
    if "num_moe_experts" in model.transformer and not value:
        model.transformer["moe_router_pre_softmax"] = True


def _qkv_bias(model: ModelConfig, value: Any) -> None:
    model.add_qkv_bias = bool(value)


def _linear_bias(model: ModelConfig, value: Any) -> None:
    model.add_bias_linear = bool(value)
    if value:
        model.add_qkv_bias = False  # add_bias_linear says it


#: model_type -> family
FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        "pre",
        {"mlp_bias": must(False, None, reason="biases of the FFN alone are not available")},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "pre_qk",
        {
            "use_sliding_window": must(False, reason="attention with a sliding window is not available"),
            "sliding_window": ignored,  # read only where the switch above is on
            "max_window_layers": ignored,
            "layer_types": FULL_LAYERS,
        },
    ),
    "olmo2": Family("Olmo2ForCausalLM", "olmo2", {}),
    "mixtral": Family(
        "MixtralForCausalLM",
        "pre",
        {
            **EXPERTS,
            "intermediate_size": _expert_width,
            "num_local_experts": extra("num_moe_experts"),
            "sliding_window": NO_WINDOW,
            "router_jitter_noise": must(0.0, 0, reason="noise on the router's input is not available"),
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "pre_qk",
        {
            **EXPERTS,
            "num_experts": extra("num_moe_experts"),
            "num_local_experts": extra("num_moe_experts"),
            "moe_intermediate_size": extra("moe_ffn_hidden_size"),
            "norm_topk_prob": _norm_topk_prob,
            "mlp_only_layers": _dense_layers,
            "decoder_sparse_step": _every_layer,
            "use_sliding_window": must(False, reason="attention with a sliding window is not available"),
            "sliding_window": ignored,
            "max_window_layers": ignored,
            "layer_types": FULL_LAYERS,
        },
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        "olmoe",
        {
            **EXPERTS,
            "intermediate_size": _expert_width,
            "num_experts": extra("num_moe_experts"),
            "norm_topk_prob": _norm_topk_prob,
            "clip_qkv": must(None, reason="clipped queries, keys and values are not available"),
        },
    ),
    "phd_transformer": Family(
        BUNDLED,
        None,
        {
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
            "mlp_only_layers": _dense_layers,
            "norm_topk_prob": _our_pre_softmax,
            "scoring_func": _only_with_experts("moe_router_score_function", "softmax"),
            "use_expert_bias": _only_with_experts("moe_router_enable_expert_bias", False),
            "n_group": _only_with_experts("moe_router_num_groups", None),
            "topk_group": _only_with_experts("moe_router_group_topk", None),
            "routed_scaling_factor": _only_with_experts("moe_router_topk_scaling_factor", 1.0),
            "shared_expert_intermediate_size": _only_with_experts("moe_shared_expert_intermediate_size", 0),
            "use_shared_expert_gate": _only_with_experts("moe_shared_expert_gate", False),
            "router_dtype": _only_with_experts("moe_router_dtype", None),
        },
    ),
}
