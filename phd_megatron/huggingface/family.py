"""What a family of models is: one row for each, in a file of :mod:`.families`.

A row says which class of transformers computes the model and when it is exact, what the class calls its tensors, and
what its words in ``config.json`` mean. Nothing else branches on a class's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from phd_megatron.config.rope import Yarn
from phd_megatron.config.schema import ModelConfig
from phd_megatron.huggingface.json_values import JSON, Fields

if TYPE_CHECKING:
    from phd_megatron.config.moe import MoE
    from phd_megatron.huggingface.architecture import Architecture

#: puts a field's value into the model's configuration; raises ValueError(reason) for one that cannot be represented
Apply: TypeAlias = Callable[[ModelConfig, JSON], None]


@dataclass(frozen=True)
class TensorNames:
    """What files of a family call the parts of a block whose names differ between families.

    Attributes:
        experts: the FFN of a layer with experts.
        gate, up, down: projections of one expert.
    """

    attention_output_norm: str = "attention_output_layernorm"
    mlp_output_norm: str = "mlp_output_layernorm"
    experts: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


DEFAULT_NAMES = TensorNames()


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_class: class of transformers, or of the code that travels with the export.
        model_type: what ``config.json`` calls it.
        norm_scheme: row of the norm-scheme table; ``None`` for any, which ``config.json`` then says.
        has_experts: whether its models have experts; ``None`` for both.
        accepts: whether the class computes a model of that scheme exactly. At most one family of transformers' own
            accepts a model.
        readers: what its own words in ``config.json`` do, beside or instead of :data:`.config_json.READERS`.
        write: its own words in ``config.json``, beside those of every family.
        names: what its files call their tensors.
        is_bundled: whether its code travels with the export, and transformers has no class for it.
    """

    model_class: str
    model_type: str
    norm_scheme: str | None
    has_experts: bool | None
    accepts: Callable[[Architecture], bool]
    readers: Mapping[str, Apply]
    write: Callable[[Architecture], Fields] = lambda architecture: {}
    names: TensorNames = DEFAULT_NAMES
    is_bundled: bool = False

    def computes(self, architecture: Architecture) -> bool:
        """Whether the class computes this model exactly."""
        return (
            self.norm_scheme in (None, architecture.norm_scheme)
            and self.has_experts in (None, architecture.moe is not None)
            and self.accepts(architecture)
        )


# ---------------------------------------------------------------- what several rows accept


def is_plain(a: Architecture) -> bool:
    """Whether it is a Llama but for norms and experts: no copies, RMSNorm, SwiGLU, no biases, RoPE on whole heads."""
    return (
        a.policy.repeat == 1
        and a.normalization == "RMSNorm"
        and a.gated
        and not a.qkv_bias
        and not a.linear_bias
        and a.rotary_percent == 1.0
        and a.hidden_size % a.heads == 0
        and _stretched_alike(a)
    )


def _stretched_alike(a: Architecture) -> bool:
    """Whether releases 4 and 5 of transformers read the same: where 5 has YaRN's factor, 4 divides the two lengths."""
    return not isinstance(a.rope, Yarn) or a.rope.factor * a.rope.original == a.max_position_embeddings


def softmax_experts(a: Architecture) -> MoE | None:
    """The experts of a plain model, if a softmax alone weighs them and none is shared; else None."""
    moe = a.moe
    if moe is None or not is_plain(a) or moe.shared_hidden_size or moe.router_dtype not in (None, "fp32"):
        return None
    return moe if moe.score_function == "softmax" and moe.groups is None and moe.scaling == 1.0 else None


# ---------------------------------------------------------------- what a word of config.json does


def to(name: str) -> Apply:
    """The value of a :class:`ModelConfig` field."""
    return lambda model, value: setattr(model, name, value)


def extra(name: str) -> Apply:
    """The value of a ``TransformerConfig`` field; null leaves it out."""

    def apply(model: ModelConfig, value: JSON) -> None:
        if value is not None:
            model.transformer[name] = value

    return apply


def must(*values: JSON, reason: str) -> Apply:
    """Refuse everything but these values."""

    def apply(model: ModelConfig, value: JSON) -> None:
        if not any(value is one or (value == one and type(value) is type(one)) for one in values):
            raise ValueError(f"{reason}; only {' or '.join(map(str, values))} can be imported")

    return apply


def ignored(model: ModelConfig, value: JSON) -> None:
    """It does not change what the model computes."""


def all_full(model: ModelConfig, value: JSON) -> None:
    """Each layer's kind of attention, which must be full."""
    if value is not None and (not isinstance(value, list) or set(value) != {"full_attention"}):
        raise ValueError("layers with a sliding window are not available; only full_attention can be imported")


def expert_width(model: ModelConfig, value: JSON) -> None:
    """``intermediate_size`` of a family whose layers all have experts: the width of one."""
    to("ffn_hidden_size")(model, value)
    model.transformer["moe_ffn_hidden_size"] = value


def norm_topk_prob(model: ModelConfig, value: JSON) -> None:
    """Whether the weights of the chosen experts are made to add up to 1."""
    model.transformer["moe_router_pre_softmax"] = not value


def dense_layers(model: ModelConfig, value: JSON) -> None:
    """``mlp_only_layers``: numbers of the layers without experts."""
    if not value:
        return
    if not isinstance(value, list):
        raise ValueError("it must be a list of the numbers of layers")
    assert model.num_layers is not None
    model.transformer["moe_layer_freq"] = [int(index not in value) for index in range(model.num_layers)]


NO_WINDOW = must(None, reason="attention with a sliding window is not available")
NO_WINDOW_SWITCHED = must(False, reason="attention with a sliding window is not available")
#: words of every family with experts
EXPERTS: dict[str, Apply] = {
    "num_experts_per_tok": extra("moe_router_topk"),
    # A choice of training that transformers itself reads only when asked for router logits.
    **dict.fromkeys(("output_router_logits", "router_aux_loss_coef"), ignored),
}


# ---------------------------------------------------------------- what config.json says of experts


def experts_of(a: Architecture) -> MoE:
    """The experts of a model that has them."""
    assert a.moe is not None
    return a.moe


def router_words(moe: MoE) -> Fields:
    """How many experts there are and compute a row, and whether their weights add up to 1."""
    return {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.topk,
        "norm_topk_prob": not moe.pre_softmax,
    }


def layer_words(moe: MoE) -> Fields:
    """The width of an expert, and which layers have none."""
    return {
        "moe_intermediate_size": moe.ffn_hidden_size,
        "mlp_only_layers": [index for index, has_experts in enumerate(moe.layers) if not has_experts],
    }
