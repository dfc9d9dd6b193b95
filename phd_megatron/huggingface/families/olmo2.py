"""OLMo 2: norms after each sublayer, and on the query and the key of a token as a whole."""

from __future__ import annotations

from phd_megatron.huggingface.family import Family, TensorNames, is_plain

FAMILY = Family(
    model_class="Olmo2ForCausalLM",
    model_type="olmo2",
    norm_scheme="olmo2",
    has_experts=False,
    accepts=is_plain,
    readers={},
    names=TensorNames("post_attention_layernorm", "post_feedforward_layernorm"),
)
