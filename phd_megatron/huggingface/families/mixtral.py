"""Mixtral: pre-norm, with experts in every layer and a softmax over the chosen ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phd_megatron.huggingface.family import (
    EXPERTS,
    NO_WINDOW,
    Family,
    TensorNames,
    expert_width,
    experts_of,
    extra,
    must,
    softmax_experts,
)

if TYPE_CHECKING:
    from phd_megatron.huggingface.architecture import Architecture
    from phd_megatron.huggingface.json_values import Fields


def _accepts(architecture: Architecture) -> bool:
    moe = softmax_experts(architecture)
    return moe is not None and all(moe.layers) and not moe.pre_softmax  # its weights add up to 1


def _write(architecture: Architecture) -> Fields:
    moe = experts_of(architecture)
    return {
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.topk,
        "intermediate_size": moe.ffn_hidden_size,
    }


FAMILY = Family(
    model_class="MixtralForCausalLM",
    model_type="mixtral",
    norm_scheme="pre",
    has_experts=True,
    accepts=_accepts,
    readers={
        **EXPERTS,
        "intermediate_size": expert_width,
        "num_local_experts": extra("num_moe_experts"),
        "sliding_window": NO_WINDOW,
        "router_jitter_noise": must(0.0, 0, reason="noise on the router's input is not available"),
    },
    write=_write,
    names=TensorNames(experts="block_sparse_moe", gate="w1", up="w3", down="w2"),
)
