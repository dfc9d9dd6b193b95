"""``config.json`` in both directions: the words of every family here, those of one in its row.

A word that is read is taken over, held to a neutral value, or known to be harmless. One that is none of these is
refused by name, so nothing of a model is dropped.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from phd_megatron.config.schema import ModelConfig
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.family import Apply, Family, ignored, must, to
from phd_megatron.huggingface.json_values import JSON, Fields
from phd_megatron.huggingface.rope import read_rope, rope_words


@dataclass(frozen=True)
class TokenIds:
    """Special tokens, or None where the tokenizer has none."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None


# ---------------------------------------------------------------- writing


def write_config(a: Architecture, family: Family, dtype: str, tokens: TokenIds) -> Fields:
    """The content of ``config.json`` of a model of ``family``, whose tensors are of type ``dtype``."""
    rope = rope_words(a)
    config: Fields = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.groups,
        "head_dim": a.head_dim,
        "hidden_act": "silu" if a.gated else "gelu",
        "max_position_embeddings": a.max_position_embeddings,
        "initializer_range": a.init_std,
        "rms_norm_eps": a.epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": a.tied,
        "attention_bias": a.qkv_bias,
        "use_cache": True,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        **a.copies,
        "norm_scheme": a.norm_scheme,
        "dtype": dtype,
        "transformers_version": importlib.metadata.version("transformers"),
        **family.write(a),
    }
    if not family.is_bundled:
        # transformers 4 reads these and does not know rope_parameters, so it would take a theta of its own.
        config |= {"rope_theta": float(a.rotary_base), "torch_dtype": dtype}
        if a.rope is not None:
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return config


# ---------------------------------------------------------------- reading


def _head_dim(model: ModelConfig, value: JSON) -> None:
    if value is not None:
        to("kv_channels")(model, value)


def _tied(model: ModelConfig, value: JSON) -> None:
    model.untie_embeddings_and_output_weights = not value


#: what the words of every family do, where its row says nothing else
READERS: dict[str, Apply] = {
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
    "rope_parameters": read_rope,
    "hidden_act": must("silu", reason="the gated FFN here is SwiGLU"),
    "attention_dropout": must(0.0, 0, reason="dropout on attention weights is not available"),
    "attention_bias": must(False, None, reason="this family's biases are not what the layers here would have"),
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


def read_config(content: Mapping[str, JSON], family: Family) -> ModelConfig:
    """The architecture that ``config.json`` describes, with the defaults of its class filled in.

    Raises:
        UserError: for every field that cannot be represented, with value, reason and cure, all at once.
    """
    model = ModelConfig(norm_scheme=family.norm_scheme or "pre")
    known = {**READERS, **family.readers}
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
