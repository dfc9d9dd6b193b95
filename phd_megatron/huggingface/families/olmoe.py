"""OLMoE: pre-norm with norms on the query and the key of a token as a whole, and experts in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phd_megatron.huggingface.family import (
    EXPERTS,
    Family,
    expert_width,
    experts_of,
    extra,
    must,
    norm_topk_prob,
    router_words,
    softmax_experts,
)

if TYPE_CHECKING:
    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.json_values import Fields


def _accepts(architecture: Architecture) -> bool:
    moe = softmax_experts(architecture)
    return moe is not None and all(moe.layers)


def _write(architecture: Architecture) -> Fields:
    moe = experts_of(architecture)
    return {**router_words(moe), "intermediate_size": moe.ffn_hidden_size}


FAMILY = Family(
    model_class="OlmoeForCausalLM",
    model_type="olmoe",
    norm_scheme="olmoe",
    has_experts=True,
    accepts=_accepts,
    readers={
        **EXPERTS,
        "intermediate_size": expert_width,
        "num_experts": extra("num_moe_experts"),
        "norm_topk_prob": norm_topk_prob,
        "clip_qkv": must(None, reason="clipped queries, keys and values are not available"),
    },
    write=_write,
)
