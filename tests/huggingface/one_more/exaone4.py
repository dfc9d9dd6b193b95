"""A family that the product does not have: EXAONE 4 without windows, which is the scheme ``outputnorm``.

Not a test. ``test_families.py`` puts this folder beside ``phd_megatron/huggingface/families``.
"""

from __future__ import annotations

from phd_megatron.huggingface.family import NO_WINDOW, Family, TensorNames, all_full, ignored, is_plain

FAMILY = Family(
    model_class="Exaone4ForCausalLM",
    model_type="exaone4",
    norm_scheme="outputnorm",
    has_experts=False,
    accepts=is_plain,
    readers={
        "sliding_window": NO_WINDOW,
        "sliding_window_pattern": ignored,  # of no use without a window
        "layer_types": all_full,
    },
    write=lambda a: {"sliding_window": None, "layer_types": ["full_attention"] * a.num_layers},
    names=TensorNames("post_attention_layernorm", "post_feedforward_layernorm"),
)
