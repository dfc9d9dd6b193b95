"""Llama: pre-norm."""

from __future__ import annotations

from phd_megatron.huggingface.family import Family, is_plain, must

FAMILY = Family(
    model_class="LlamaForCausalLM",
    model_type="llama",
    norm_scheme="pre",
    has_experts=False,
    accepts=is_plain,
    readers={"mlp_bias": must(False, None, reason="biases of the FFN alone are not available")},
    write=lambda architecture: {"mlp_bias": architecture.linear_bias},
)
