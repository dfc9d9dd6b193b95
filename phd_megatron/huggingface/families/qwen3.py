"""Qwen3: pre-norm, with norms on the query and the key of each head."""

from __future__ import annotations

from phd_megatron.huggingface.family import NO_WINDOW_SWITCHED, Family, all_full, ignored, is_plain

FAMILY = Family(
    model_class="Qwen3ForCausalLM",
    model_type="qwen3",
    norm_scheme="pre_qk",
    has_experts=False,
    accepts=is_plain,
    readers={
        "use_sliding_window": NO_WINDOW_SWITCHED,
        **dict.fromkeys(("sliding_window", "max_window_layers"), ignored),  # read only where the switch is on
        "layer_types": all_full,
    },
)
