"""A model in the words of Megatron-LM's ``args`` and of Megatron-Core's ``TransformerConfig``.

What tensors cannot show, such as the number of heads or the base of RoPE, is compared by these words when a checkpoint
of Megatron-LM or Megatron-Bridge is loaded, and said in them when one is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from phd_megatron.config.architecture import Architecture
from phd_megatron.config.plain import Json, Plain
from phd_megatron.config.rope import Llama3, Yarn
from phd_megatron.errors import UserError, shown
from phd_megatron.norm.schemes import norm_scheme

#: our option -> what others call it; ``not`` inverts the value
_OTHER_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "gated_linear_unit": "swiglu",
    "num_moe_experts": "num_experts",
    "untie_embeddings_and_output_weights": "not share_embeddings_and_output_weights",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}

#: what no model of ours has, as it is in models that have none of it either; where False is such a value None is too
_NEUTRAL: dict[str, tuple[Plain, ...]] = {
    "activation_func_clamp_value": (None,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (0,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "linear_attention_freq": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "mrope_section": (None,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None, 0),
    "openai_gelu": (False,),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (None, 1),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "use_mup": (False,),
    "window_size": (None, [-1, -1]),
}


def not_stock(a: Architecture) -> str | None:
    """Why a model cannot be Megatron-Core's own GPTModel; None for one that can."""
    pre = norm_scheme("pre").plan(0, a.num_layers)
    if a.policy.repeat != 1:
        return f"phd_repeat={a.policy.repeat}: that model knows no copies of a token"
    if isinstance(a.rope, Yarn) and a.rotary_percent != 1:
        return f"rotary_percent={a.rotary_percent} with YaRN: there that model turns the whole of a head"
    for block in a.blocks:
        plain = (block.attention, block.mlp) == (pre.attention, pre.mlp) and block.heads in ("", "qk")
        if not plain or block.qk_norm_width != "head" or norm_scheme(a.norm_scheme).embed_norm:
            return f"norm_scheme={a.norm_scheme}: that model is the one of pre or pre_qk"
    return None


def words_of(a: Architecture) -> Json:
    """A model with one copy of each token, by our names, which are ``TransformerConfig``'s where it has one."""
    words: Json = {
        "num_layers": a.num_layers,
        "hidden_size": a.hidden_size,
        "ffn_hidden_size": a.ffn_hidden_size,
        "num_attention_heads": a.heads,
        "num_query_groups": a.groups,
        "kv_channels": a.head_dim,
        "normalization": a.normalization,
        "layernorm_epsilon": a.epsilon,
        "gated_linear_unit": a.gated,
        "add_bias_linear": a.linear_bias,
        "add_qkv_bias": a.qkv_bias,
        "qk_layernorm": any("q" in block.heads or "k" in block.heads for block in a.blocks),
        "rotary_base": a.rotary_base,
        "rotary_percent": a.rotary_percent,
        "position_embedding_type": "yarn" if isinstance(a.rope, Yarn) else "rope",
        # Megatron-LM's word, and that of GPTModel and Bridge
        "use_rope_scaling": isinstance(a.rope, Llama3),
        "rope_scaling": isinstance(a.rope, Llama3),
        "untie_embeddings_and_output_weights": not a.tied,
        "num_moe_experts": None,
    }
    if a.moe is not None:
        words |= {
            "num_moe_experts": a.moe.experts,
            "moe_router_topk": a.moe.topk,
            "moe_ffn_hidden_size": a.moe.ffn_hidden_size,
            "moe_layer_freq": [int(has) for has in a.moe.layers],
            "moe_shared_expert_intermediate_size": a.moe.shared_hidden_size or None,
            "moe_shared_expert_gate": a.moe.shared_gate,
            "moe_router_score_function": a.moe.score_function,
            "moe_router_pre_softmax": a.moe.pre_softmax,
            "moe_router_enable_expert_bias": a.moe.expert_bias,
            "moe_router_num_groups": a.moe.groups,
            "moe_router_group_topk": a.moe.group_topk,
            "moe_router_topk_scaling_factor": a.moe.scaling,
        }
    if isinstance(a.rope, Llama3):
        words["rope_scaling_factor"] = a.rope.factor
    elif a.rope is not None:
        words |= {
            "yarn_rotary_scaling_factor": a.rope.factor,
            "yarn_original_max_position_embeddings": a.rope.original,
            "yarn_beta_fast": a.rope.beta_fast,
            "yarn_beta_slow": a.rope.beta_slow,
            "yarn_mscale": a.rope.mscale,
            "yarn_mscale_all_dim": a.rope.mscale_all_dim,
            "yarn_correction_range_round_to_int": a.rope.round_range,
        }
    return words


def args_of(a: Architecture) -> Json:
    """The same by Megatron-LM's names."""
    found: Json = {"group_query_attention": a.groups != a.heads}
    for name, value in words_of(a).items():
        theirs = _OTHER_NAMES.get(name, name)
        found[name if theirs.startswith("not ") else theirs] = value
    return found


def differences(said: Mapping[str, Plain], ours: Architecture) -> Iterator[str]:
    """Where a model that a checkpoint speaks of would not compute what ours does: ``name=theirs, not ours``.

    What is not said is not compared.

    Args:
        said: by either's names.
    """
    expected = {name: (value,) for name, value in words_of(ours).items()}
    expected["activation_func"] = ("silu" if ours.gated else "gelu",)
    for name, accepted in {**_NEUTRAL, **expected}.items():
        value, is_there = _said(said, name)
        if is_there and not any(_same(name, value, one, ours) for one in accepted):
            yield f"{name}={shown(value)}, not {shown(accepted[0])}"


def check_words(said: Mapping[str, Plain], ours: Architecture, where: str) -> None:
    """Refuse a checkpoint of a model that computes something else.

    Raises:
        UserError: naming everything that differs.
    """
    if found := list(differences(said, ours)):
        raise UserError(
            f"{where} is of another model, by what it says of itself: {'; '.join(found)}. Set the options of this run "
            "to those values; where there is no such option, this model cannot be had here"
        )


def _said(said: Mapping[str, Plain], name: str) -> tuple[Plain, bool]:
    if name == "num_query_groups" and said.get("group_query_attention") is False:
        name = "num_attention_heads"  # without groups Megatron-LM's args say 1
    if name in said:
        return said[name], True
    theirs = _OTHER_NAMES.get(name, "")
    bare = theirs.removeprefix("not ")
    return (not said[bare] if bare != theirs else said[bare], True) if bare in said else (None, False)


def _same(name: str, theirs: Plain, ours: Plain, model: Architecture) -> bool:
    if name == "add_qkv_bias" and model.linear_bias:
        return True  # Megatron-Core's layers have it then, whatever this says
    if theirs is None and (name in _IF_NONE or ours is False):
        theirs = _IF_NONE[name](model) if name in _IF_NONE else False
    if name in _READ:
        theirs = _READ[name](theirs, model)
    if isinstance(ours, (int, float)) and not isinstance(ours, bool):
        return _close(theirs, ours)
    return type(theirs) in (bool, int, float, str, list, type(None)) and bool(theirs == ours)


def _close(theirs: Plain, ours: float) -> bool:
    if isinstance(theirs, bool) or not isinstance(theirs, (int, float, str)):
        return False
    try:
        return abs(float(theirs) - ours) <= 1e-9 * abs(ours)  # YAML has 1e-06 for a text
    except (ValueError, OverflowError):
        return False


_IF_NONE: dict[str, Callable[[Architecture], Plain]] = {
    "num_query_groups": lambda model: model.heads,
    "kv_channels": lambda model: model.hidden_size // model.heads,
    "ffn_hidden_size": lambda model: 4 * model.hidden_size,
    "moe_ffn_hidden_size": lambda model: model.ffn_hidden_size,
    "moe_router_topk_scaling_factor": lambda model: 1.0,
    # Without one of the two Megatron-Core takes 1 and 0, whatever the other says.
    "yarn_mscale": lambda model: 1.0,
    "yarn_mscale_all_dim": lambda model: 0.0 if isinstance(model.rope, Yarn) and model.rope.mscale == 1 else None,
}


def _layers(said: Plain, model: Architecture) -> Plain:
    """``moe_layer_freq`` as a list: a frequency, or Megatron-LM's text ``([0]*1+[1]*3)``."""
    if type(said) is int and said > 0:
        return [int(index % said == 0) for index in range(model.num_layers)]
    if isinstance(said, str):
        parts = [re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d{1,4}))?", part) for part in _bare(said).split("+")]
        found = [list(map(int, part[1].split(","))) * int(part[2] or 1) for part in parts if part]
        return [layer for some in found for layer in some] if all(parts) else said
    return list(said) if isinstance(said, tuple) else said


def _bare(text: str) -> str:
    return text.replace(" ", "").removeprefix("(").removesuffix(")")


def _activation(said: Plain, model: Architecture) -> Plain:
    """The name of a function: Bridge writes where it lies, and torch has gelu in several places."""
    path = said.get("_target_") if isinstance(said, dict) else said if isinstance(said, str) else type(said).__name__
    return str(path).rpartition(".")[2]


_READ: dict[str, Callable[[Plain, Architecture], Plain]] = {
    "moe_layer_freq": _layers,
    "activation_func": _activation,
    "moe_shared_expert_intermediate_size": lambda said, model: said or None,
    "no_rope_freq": lambda said, model: None if isinstance(said, list) and not any(said) else said,
    "softmax_scale": lambda said, model: None if _close(said, model.head_dim**-0.5) else said,
    "window_size": lambda said, model: list(said) if isinstance(said, tuple) else said,
}
