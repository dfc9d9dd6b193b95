"""Qwen3-MoE: as Qwen3, with experts in some or all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phd_megatron.huggingface.families import qwen3
from phd_megatron.huggingface.family import (
    EXPERTS,
    Family,
    dense_layers,
    experts_of,
    extra,
    layer_words,
    norm_topk_prob,
    router_words,
    softmax_experts,
)

if TYPE_CHECKING:
    from phd_megatron.config.schema import ModelConfig
    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.json_values import JSON, Fields


def _every_layer(model: ModelConfig, value: JSON) -> None:
    if value != 1:
        raise ValueError("only decoder_sparse_step 1 with mlp_only_layers can be imported")


def _write(architecture: Architecture) -> Fields:
    moe = experts_of(architecture)
    return {**router_words(moe), **layer_words(moe), "decoder_sparse_step": 1}


FAMILY = Family(
    model_class="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    norm_scheme="pre_qk",
    has_experts=True,
    accepts=lambda architecture: softmax_experts(architecture) is not None,
    readers={
        **EXPERTS,
        "num_experts": extra("num_moe_experts"),
        "num_local_experts": extra("num_moe_experts"),
        "moe_intermediate_size": extra("moe_ffn_hidden_size"),
        "norm_topk_prob": norm_topk_prob,
        "mlp_only_layers": dense_layers,
        "decoder_sparse_step": _every_layer,
        **qwen3.FAMILY.readers,
    },
    write=_write,
)
