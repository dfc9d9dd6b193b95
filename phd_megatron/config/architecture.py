"""What a model is: one record of a configuration, and the defaults that follow from other fields.

The record is made from the configuration wherever it is asked for and kept nowhere: that takes microseconds, and a
configuration may still change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phd_megatron.config.moe import MoE
from phd_megatron.config.rope import Scaling, scaling_of
from phd_megatron.config.schema import ModelConfig
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import ALIASES, NORM_SCHEMES, BlockNorm, NormScheme, norm_plan, norm_scheme

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy

NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
"""Sizes that follow from no other field."""


def complete(model: ModelConfig) -> list[str]:
    """Write down all that a model leaves to be derived from :data:`NEEDED`; a second call changes nothing.

    Returns:
        What is worth telling, one line each.

    Raises:
        UserError: for PHD's numbers.
    """
    notes, scheme = _fill_in_sizes(model), norm_scheme(model.norm_scheme)
    if model.norm_scheme in ALIASES:
        alias, model.norm_scheme = model.norm_scheme, ALIASES[model.norm_scheme]
        notes.append(f"norm_scheme={model.norm_scheme}: another name of {alias}")
    notes += _like_another_scheme(model, scheme)
    if model.init == "auto":
        model.init = scheme.default_init
        notes.append(f"init={model.init}: the default of norm_scheme={model.norm_scheme}")
    has_experts = model.transformer.get("num_moe_experts") is not None
    if has_experts and model.transformer.get("moe_ffn_hidden_size") is None:
        model.transformer["moe_ffn_hidden_size"] = model.ffn_hidden_size
        notes.append(f"moe_ffn_hidden_size={model.ffn_hidden_size}: ffn_hidden_size")
    policy, note = _kv_policy(model)
    if model.phd_repeat > 1:
        model.phd_window, model.phd_chunk = policy.window, policy.chunk
    return notes if note is None else [*notes, note]


def _fill_in_sizes(model: ModelConfig) -> list[str]:
    assert model.hidden_size is not None and model.num_attention_heads is not None
    notes = []
    if model.ffn_hidden_size is None:
        model.ffn_hidden_size = 4 * model.hidden_size
        notes.append(f"ffn_hidden_size={model.ffn_hidden_size}: 4 * hidden_size")
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    model.kv_channels = head_dim(model)
    if model.max_position_embeddings is None:
        model.max_position_embeddings = model.seq_length
    if model.init_method_std is None:
        model.init_method_std = 1 / math.sqrt(2.5 * model.hidden_size)
        notes.append(f"init_method_std={model.init_method_std:.6g}: 1/sqrt(2.5 * hidden_size)")
    return notes


def is_resolved(model: ModelConfig) -> bool:
    """Whether the model says all its sizes, none left to be derived."""
    sizes = (*NEEDED, "ffn_hidden_size", "num_query_groups", "kv_channels")
    return all(getattr(model, name) for name in sizes)


def _like_another_scheme(model: ModelConfig, scheme: NormScheme) -> list[str]:
    """Schemes that treat some layers otherwise have none of those in a shallow model."""
    assert model.num_layers is not None
    pre, layers = NORM_SCHEMES["pre"], range(model.num_layers)
    if model.norm_scheme == "pre" or scheme.embed_norm:
        return []
    if any(scheme.plan(i, model.num_layers) != pre.plan(i, model.num_layers) for i in layers):
        return []
    return [f"norm_scheme={model.norm_scheme}: with num_layers={model.num_layers} every block is that of pre"]


def head_dim(model: ModelConfig) -> int | None:
    """Width of one head; None while the model does not say enough."""
    if model.kv_channels is None and model.hidden_size and model.num_attention_heads:
        return model.hidden_size // model.num_attention_heads
    return model.kv_channels


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """The vocabulary rounded up to a multiple: a property of the model alone, so no TP size enters."""
    return -(-vocab_size // divisible_by) * divisible_by


def kv_policy(model: ModelConfig) -> KVPolicy:
    """Which keys a query of this model sees."""
    return _kv_policy(model)[0]


def _kv_policy(model: ModelConfig) -> tuple[KVPolicy, str | None]:
    """The same, and in words what was defaulted, if anything was.

    Raises:
        UserError: for a number below 1.
    """
    from phd_megatron.phd.kv_policy import KVPolicy  # imports torch

    try:
        return KVPolicy.from_options(model.phd_repeat, model.phd_window, model.phd_chunk)
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder, whatever computes it. Sizes in elements."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    groups: int
    head_dim: int
    max_position_embeddings: int
    rotary_base: float
    rotary_percent: float
    normalization: str
    epsilon: float
    gated: bool
    qkv_bias: bool
    linear_bias: bool
    tied: bool
    init_std: float
    norm_scheme: str
    policy: KVPolicy
    copy_positions: str = "token"
    copy_embedding: str = "none"
    moe: MoE | None = None
    rope: Scaling | None = None  #: how the frequencies are changed for a longer context

    @property
    def blocks(self) -> tuple[BlockNorm, ...]:
        """Norm record of every layer."""
        return norm_plan(self.norm_scheme, self.num_layers)


def architecture_of(model: ModelConfig) -> Architecture:
    """The record of a model that says all of :data:`NEEDED`, resolved or not."""
    full = replace(model)
    _fill_in_sizes(full)
    assert full.num_layers and full.hidden_size and full.num_attention_heads
    assert full.ffn_hidden_size and full.num_query_groups and full.kv_channels  # filled in
    assert full.max_position_embeddings and full.init_method_std
    policy = kv_policy(full)
    return Architecture(
        num_layers=full.num_layers,
        hidden_size=full.hidden_size,
        ffn_hidden_size=full.ffn_hidden_size,
        heads=full.num_attention_heads,
        groups=full.num_query_groups,
        head_dim=full.kv_channels,
        max_position_embeddings=full.max_position_embeddings,
        rotary_base=full.rotary_base,
        rotary_percent=full.rotary_percent,
        normalization=full.normalization,
        epsilon=full.layernorm_epsilon,
        gated=full.gated_linear_unit,
        qkv_bias=full.add_qkv_bias or full.add_bias_linear,
        linear_bias=full.add_bias_linear,
        tied=not full.untie_embeddings_and_output_weights,
        init_std=full.init_method_std,
        norm_scheme=full.norm_scheme,
        policy=policy,
        copy_positions=full.phd_copy_positions if policy.repeat > 1 else "token",
        copy_embedding=full.phd_copy_embedding if policy.repeat > 1 else "none",
        moe=MoE.from_model(full),
        rope=scaling_of(full),
    )
