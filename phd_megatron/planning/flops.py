"""Floating-point operations of a training step, by the model's own formula.

Convention: a multiply-add is two operations; backward costs twice the forward; attention counts the visible pairs of
:class:`KVPolicy` only, so causal attention is counted once (halved). Recomputation is not counted. The last layer
counts what pruning leaves. Embedding look-ups, the vectors of copies, norms, RoPE and softmax are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from phd_megatron.config.moe import MoE
from phd_megatron.config.schema import ModelConfig
from phd_megatron.errors import UserError
from phd_megatron.phd.kv_policy import KVPolicy


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
    layers, hidden, ffn = model.num_layers, model.hidden_size, model.ffn_hidden_size
    heads, groups, head_dim = model.num_attention_heads, model.num_query_groups, model.kv_channels
    if not (layers and hidden and ffn and heads and groups and head_dim):
        raise UserError("FLOPs need a resolved model configuration: sizes are still missing")
    policy, _ = KVPolicy.from_options(model.phd_repeat, model.phd_window, model.phd_chunk)
    tokens = model.seq_length
    qkv = 2 * hidden * head_dim * (heads + 2 * groups)
    projection = 2 * heads * head_dim * hidden
    last_copies = 1 if model.phd_last_layer_pruning else policy.repeat
    linear = tokens * (policy.repeat * layers * qkv)
    for layer in range(layers):
        rows = tokens * (policy.repeat if layer < layers - 1 else last_copies)
        linear += rows * (projection + _ffn(model, layer))
    per_pair = 4 * heads * head_dim  # scores and weighted sum
    original, hidden_pairs = policy.pairs(tokens)
    last_original, last_hidden = policy.pairs(tokens, last_copies)
    return ForwardFlops(
        linear=linear,
        attention_original=per_pair * ((layers - 1) * original + last_original),
        attention_hidden=per_pair * ((layers - 1) * hidden_pairs + last_hidden),
        head=2 * tokens * hidden * padded_vocab_size,
    )


def _ffn(model: ModelConfig, layer: int) -> int:
    """Operations of the FFN of the layer with this 0-based index, for one row."""
    assert model.hidden_size and model.ffn_hidden_size
    per_width = 2 * model.hidden_size * (3 if model.gated_linear_unit else 2)
    moe = MoE.from_model(model)
    if moe is None or not moe.layers[layer]:
        return per_width * model.ffn_hidden_size
    router = 2 * model.hidden_size * (moe.experts + moe.shared_gate)
    return router + per_width * (moe.topk * moe.ffn_hidden_size + moe.shared_hidden_size)
