"""What a model is: one record of a configuration, and the defaults that follow from other fields.

The record is made from the configuration wherever it is asked for and kept nowhere: that takes microseconds, and a
configuration may still change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phd_megatron.config.moe import MoE
from phd_megatron.config.schema import ModelConfig
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import BlockNorm, norm_plan

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy

NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
"""Sizes that follow from no other field."""


def fill_in(model: ModelConfig) -> list[str]:
    """Write down the sizes that a model leaves to be derived from :data:`NEEDED`.

    Returns:
        What is worth telling, one line each.
    """
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
    return kv_policy_and_note(model)[0]


def kv_policy_and_note(model: ModelConfig) -> tuple[KVPolicy, str | None]:
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

    @property
    def blocks(self) -> tuple[BlockNorm, ...]:
        """Norm record of every layer."""
        return norm_plan(self.norm_scheme, self.num_layers)


def architecture_of(model: ModelConfig) -> Architecture:
    """The record of a model that says all of :data:`NEEDED`, resolved or not."""
    full = replace(model)
    fill_in(full)
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
    )
