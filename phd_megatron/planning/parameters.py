"""How many parameters a model has: by formula, without building it. Tests compare it with built models."""

from __future__ import annotations

from dataclasses import dataclass

from phd_megatron.config.architecture import Architecture, architecture_of, is_resolved
from phd_megatron.config.schema import ModelConfig
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import BlockNorm, norm_scheme


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one decoder layer, by how parallelism divides them."""

    dense: int  #: attention, dense FFN, shared experts: over TP
    experts: int  #: routed experts: over EP and the experts' TP
    active_experts: int  #: those of ``experts`` that compute one row
    whole: int  #: norms, router: on every rank


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model. ``embedding`` and ``head`` count the padded vocabulary; a tied head is 0."""

    layers: tuple[LayerParameters, ...]
    embedding: int
    head: int
    final_norm: int
    embed_norm: int = 0
    copy_embedding: int = 0  #: a vector for each hidden copy

    @property
    def total(self) -> int:
        """All parameters."""
        inside = sum(layer.dense + layer.experts + layer.whole for layer in self.layers)
        return inside + self.embedding + self.head + self.final_norm + self.embed_norm + self.copy_embedding

    @property
    def active(self) -> int:
        """Parameters that compute a token: all but the experts that were not chosen."""
        return self.total - sum(layer.experts - layer.active_experts for layer in self.layers)

    @property
    def non_embedding(self) -> int:
        """Active parameters without the vocabulary's matrices: the N of scaling laws."""
        return self.active - self.embedding - self.head


def count_parameters(model: ModelConfig, padded_vocab_size: int) -> Parameters:
    """Count a resolved model.

    Raises:
        UserError: when sizes are still missing.
    """
    if not is_resolved(model):
        raise UserError("parameters need a resolved model configuration: sizes are still missing")
    a = architecture_of(model)
    hidden = a.hidden_size
    norm = hidden * _per_unit(a)
    return Parameters(
        layers=tuple(_layer(a, index, block) for index, block in enumerate(a.blocks)),
        embedding=padded_vocab_size * hidden,
        head=0 if a.tied else padded_vocab_size * hidden,
        final_norm=norm,
        embed_norm=norm if norm_scheme(a.norm_scheme).embed_norm else 0,
        copy_embedding=(a.policy.repeat - 1) * hidden if a.copy_embedding == "vector" else 0,
    )


def _per_unit(a: Architecture) -> int:
    """Parameters of a norm for each of its dimensions."""
    return 2 if a.normalization == "LayerNorm" else 1


def _layer(a: Architecture, index: int, block: BlockNorm) -> LayerParameters:
    hidden, heads, groups, head_dim = a.hidden_size, a.heads, a.groups, a.head_dim
    qkv_width = head_dim * (heads + 2 * groups)
    attention = hidden * qkv_width + heads * head_dim * hidden
    if a.linear_bias:
        attention += hidden  # of the output projection
    if a.qkv_bias:
        attention += qkv_width
    norms = hidden * sum(bool(x) for s in (block.attention, block.mlp) for x in (s.input_norm, s.output_norm))
    widths = {"q": heads, "k": groups} if block.qk_norm_width == "full" else {}
    norms += head_dim * sum(widths.get(name, 1) for name in block.heads)
    whole = norms * _per_unit(a)

    branches = 2 if a.gated else 1
    moe = a.moe
    if moe is None or not moe.layers[index]:
        bias = branches * a.ffn_hidden_size + hidden if a.linear_bias else 0
        return LayerParameters(attention + _ffn(hidden, a.ffn_hidden_size, branches) + bias, 0, 0, whole)
    one = _ffn(hidden, moe.ffn_hidden_size, branches)
    shared = _ffn(hidden, moe.shared_hidden_size, branches)
    router = hidden * (moe.experts + moe.shared_gate)
    return LayerParameters(attention + shared, moe.experts * one, moe.topk * one, whole + router)


def _ffn(hidden: int, width: int, branches: int) -> int:
    return (branches + 1) * hidden * width
