"""Floating-point operations of a training step, by the model's own formula.

Convention: a multiply-add is two operations; backward costs twice the forward; attention counts the visible pairs of
:class:`KVPolicy` only, so causal attention is counted once (halved). Recomputation is not counted. The last layer
counts what pruning leaves. Embedding look-ups, the vectors of copies, norms, RoPE and softmax are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phd_megatron.config.architecture import Architecture, architecture_of, is_resolved
from phd_megatron.config.schema import ModelConfig
from phd_megatron.errors import UserError


@dataclass(frozen=True)
class ForwardFlops:
    """Forward operations of one sample, by part."""

    linear: int
    attention_original: int
    attention_hidden: int
    head: int

    @property
    def total(self) -> int:
        """Forward operations of one sample."""
        return self.linear + self.attention_original + self.attention_hidden + self.head

    @property
    def training(self) -> int:
        """Forward and backward of one sample: three times the forward."""
        return 3 * self.total


def forward_flops(model: ModelConfig, padded_vocab_size: int) -> ForwardFlops:
    """Operations of one sample of ``seq_length`` original tokens through a resolved model.

    Layers with experts count the router, the ``moe_router_topk`` experts of each row (whatever a capacity drops) and
    the shared experts. With pruning the QKV projection of the last layer still covers all copies: query, key and value
    are one matrix product (about 0.2 % of the whole).
    """
    if not is_resolved(model):
        raise UserError("FLOPs need a resolved model configuration: sizes are still missing")
    a = architecture_of(model)
    layers, hidden, heads, head_dim, policy = a.num_layers, a.hidden_size, a.heads, a.head_dim, a.policy
    tokens = model.seq_length
    qkv = 2 * hidden * head_dim * (heads + 2 * a.groups)
    projection = 2 * heads * head_dim * hidden
    last_copies = _last_copies(model)
    linear = tokens * (policy.repeat * layers * qkv)
    for layer in range(layers):
        rows = tokens * (policy.repeat if layer < layers - 1 else last_copies)
        linear += rows * (projection + _ffn(a, layer))
    original, hidden_pairs = (int(operations.sum()) for operations in attention_flops_at(model, torch.arange(tokens)))
    return ForwardFlops(
        linear=linear,
        attention_original=original,
        attention_hidden=hidden_pairs,
        head=2 * tokens * hidden * padded_vocab_size,
    )


def attention_flops_at(model: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Forward operations of attention over originals and over hidden keys, at each of ``positions`` (int64, any shape).

    They count from the start of a document, where documents are kept apart, and of all layers and copies.
    """
    a = architecture_of(model)
    last_copies = _last_copies(model)
    per_pair = 4 * a.heads * a.head_dim  # scores and weighted sum
    (original, hidden), (last_original, last_hidden) = (
        a.policy.pairs_at(positions, copies) for copies in (a.policy.repeat, last_copies)
    )
    layers = a.num_layers - 1
    return per_pair * (layers * original + last_original), per_pair * (layers * hidden + last_hidden)


def mean_document_flops(model: ModelConfig, padded_vocab_size: int, mean_length: float) -> float:
    """Expected forward and backward operations of one sample whose documents are kept apart, of this mean length."""
    whole = forward_flops(model, padded_vocab_size)
    tokens = model.seq_length
    attention = sum(operations.double() for operations in attention_flops_at(model, torch.arange(tokens)))
    expected = float((attention * _tokens_at(tokens, mean_length)).sum())
    return 3 * (whole.linear + whole.head + expected)


def _tokens_at(length: int, mean_document_length: float) -> Tensor:
    """Expected tokens of a sample at each position of their documents, float64 ``[length]``.

    A document ends with any token by the same chance, so lengths are geometric; a sample begins with a new one.
    """
    positions = torch.arange(length, dtype=torch.float64)
    ends = 1 / mean_document_length
    goes_on = (1 - ends) ** positions
    # the first document's token there, and those of documents that begin after the first token
    return goes_on * (1 + ends * (length - 1 - positions))


def _last_copies(model: ModelConfig) -> int:
    """Copies of a token that the last layer computes."""
    return 1 if model.phd_last_layer_pruning else model.phd_repeat


def _ffn(a: Architecture, layer: int) -> int:
    """Operations of the FFN of the layer with this 0-based index, for one row."""
    per_width = 2 * a.hidden_size * (3 if a.gated else 2)
    moe = a.moe
    if moe is None or not moe.layers[layer]:
        return per_width * a.ffn_hidden_size
    router = 2 * a.hidden_size * (moe.experts + moe.shared_gate)
    return router + per_width * (moe.topk * moe.ffn_hidden_size + moe.shared_hidden_size)
