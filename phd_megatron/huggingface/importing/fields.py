"""What the fields of a ``config.json`` mean here: each is taken over, held to a neutral value, or known to be harmless.

A field that is none of these is refused by name, so nothing of a model is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phd_megatron.config.schema import ModelConfig
from phd_megatron.errors import UserError

#: puts a value into the model's configuration; raises ValueError(reason) for one that cannot be represented
Apply = Callable[[ModelConfig, Any], None]


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        model_class: class of transformers, which also says how its tensors are called.
        norm_scheme: row of the norm-scheme table; ``None`` where ``config.json`` says it.
        fields: what its own fields do, beside :data:`COMMON`.
    """

    model_class: str
    norm_scheme: str | None
    fields: Mapping[str, Apply]


def to(name: str) -> Apply:
    """The value of a :class:`ModelConfig` field."""
    return lambda model, value: setattr(model, name, value)


def extra(name: str) -> Apply:
    """The value of a ``TransformerConfig`` field; null leaves it out."""

    def apply(model: ModelConfig, value: Any) -> None:
        if value is not None:
            model.transformer[name] = value

    return apply


def must(*values: Any, reason: str) -> Apply:
    """Refuse everything but these values."""

    def apply(model: ModelConfig, value: Any) -> None:
        if not any(value is one or (value == one and type(value) is type(one)) for one in values):
            raise ValueError(f"{reason}; only {' or '.join(map(str, values))} can be imported")

    return apply


def ignored(model: ModelConfig, value: Any) -> None:
    """It does not change what the model computes."""


def _head_dim(model: ModelConfig, value: Any) -> None:
    if value is not None:
        model.kv_channels = value


def _tied(model: ModelConfig, value: Any) -> None:
    model.untie_embeddings_and_output_weights = not value


def _rope(model: ModelConfig, value: Any) -> None:
    value = dict(value or {})
    kind = value.pop("rope_type", "default")
    if kind != "default":
        raise ValueError(f"RoPE of type {kind!r} changes its frequencies, and the layers here have plain RoPE")
    model.rotary_base = float(value.pop("rope_theta", 10000.0))
    model.rotary_percent = float(value.pop("partial_rotary_factor", 1.0))
    if not 1 < model.rotary_base < math.inf:
        raise ValueError("rope_theta must be a finite number above 1")
    if not 0 < model.rotary_percent <= 1:
        raise ValueError("partial_rotary_factor must be above 0 and at most 1")
    if value:
        raise ValueError(f"nothing here corresponds to {sorted(value)}")


def _all_full(model: ModelConfig, value: Any) -> None:
    if value is not None and set(value) != {"full_attention"}:
        raise ValueError("layers with a sliding window are not available; only full_attention can be imported")


NO_BIAS = must(False, None, reason="this family's biases are not what the layers here would have")
NO_WINDOW = must(None, reason="attention with a sliding window is not available")
FULL_LAYERS = _all_full

#: fields of every family
COMMON: dict[str, Apply] = {
    "vocab_size": to("vocab_size"),
    "hidden_size": to("hidden_size"),
    "intermediate_size": to("ffn_hidden_size"),
    "num_hidden_layers": to("num_layers"),
    "num_attention_heads": to("num_attention_heads"),
    "num_key_value_heads": to("num_query_groups"),
    "head_dim": _head_dim,
    "max_position_embeddings": to("max_position_embeddings"),
    "rms_norm_eps": to("layernorm_epsilon"),
    "initializer_range": to("init_method_std"),
    "tie_word_embeddings": _tied,
    "rope_parameters": _rope,
    "hidden_act": must("silu", reason="the gated FFN here is SwiGLU"),
    "attention_dropout": must(0.0, 0, reason="dropout on attention weights is not available"),
    "attention_bias": NO_BIAS,
    # Exports of K = 1 models say what they were trained as; the other words of the policy follow from K = 1.
    "phd_repeat": must(1, reason="a class of transformers' own has no copies"),
    **dict.fromkeys(("phd_window", "phd_chunk", "phd_copy_positions", "phd_copy_embedding", "norm_scheme"), ignored),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "pretraining_tp"), ignored),
    **dict.fromkeys(
        ("architectures", "model_type", "auto_map", "transformers_version", "dtype", "torch_dtype"), ignored
    ),
    **dict.fromkeys(("_name_or_path", "id2label", "label2id", "return_dict", "problem_type"), ignored),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "chunk_size_feed_forward"), ignored),
    "is_encoder_decoder": must(False, reason="only decoders can be imported"),
}
#: fields of every family with experts
EXPERTS: dict[str, Apply] = {
    "num_experts_per_tok": extra("moe_router_topk"),
    # A choice of training that transformers itself reads only when asked for router logits.
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), ignored),
}


def read_fields(content: Mapping[str, Any], family: Family) -> ModelConfig:
    """The architecture that ``config.json`` describes, with the defaults of its class filled in.

    Raises:
        UserError: for every field that cannot be represented, with value, reason and cure, all at once.
    """
    model = ModelConfig(norm_scheme=family.norm_scheme or "pre")
    known = {**COMMON, **family.fields}
    problems = []
    problems += [f"{name}={content[name]!r}: nothing here corresponds to it" for name in content.keys() - known.keys()]
    for name, apply in known.items():  # in this order: what a later one needs is known by then
        if name in content:
            try:
                apply(model, content[name])
            except (ValueError, TypeError, AttributeError, OverflowError) as error:  # of another type, too
                problems.append(f"{name}={content[name]!r}: {error}")
    if problems:
        lines = ["the model cannot be imported exactly:", *problems]
        raise UserError("\n  ".join(lines) + "\nnothing is dropped silently; import a model without them")
    return model
