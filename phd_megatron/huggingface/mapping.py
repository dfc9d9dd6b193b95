"""Which Megatron-Core tensor is which Hugging Face tensor: small rules, each usable in both directions.

A rule names one tensor of the checkpoint and the tensors it becomes. :func:`model_rules` lists the rules of a whole
model, so "every tensor was read and written" is a comparison of two lists of names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from phd_megatron.config.moe import MoE
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.family import DEFAULT_NAMES, Family, TensorNames
from phd_megatron.norm.schemes import BlockNorm, norm_scheme


@dataclass(frozen=True)
class Rule:
    """One tensor, the same in both formats (norm weights, output projections).

    Attributes:
        mcore: key in the checkpoint.
        hf: keys in the Hugging Face model.
        shape: shape in the checkpoint.
    """

    mcore: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]

    def dtype(self, asked: torch.dtype) -> torch.dtype:
        """Type of the exported tensor where the model's is ``asked``."""
        return asked

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a checkpoint tensor of another shape."""
        if shape != self.shape:
            raise UserError(
                f"{self.mcore} has shape {shape} in the checkpoint, but its run_config.yaml describes {self.shape}; "
                "the two do not belong together"
            )

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        """Checkpoint tensor to Hugging Face tensors, views where possible."""
        return {self.hf[0]: tensor}

    def to_mcore(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`to_hf`."""
        return parts[self.hf[0]]


@dataclass(frozen=True)
class QKV(Rule):
    """``linear_qkv``, per KV group its query heads, key and value, to q, k and v projections. Weights and biases."""

    groups: int
    heads_per_group: int
    head_dim: int

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        split = tensor.unflatten(0, (self.groups, self.heads_per_group + 2, self.head_dim))
        query, key, value = split.split([self.heads_per_group, 1, 1], dim=1)
        return {name: part.flatten(0, 2) for name, part in zip(self.hf, (query, key, value), strict=True)}

    def to_mcore(self, parts: Mapping[str, Tensor]) -> Tensor:
        split = [parts[name].unflatten(0, (self.groups, -1, self.head_dim)) for name in self.hf]
        return torch.cat(split, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class GatedMLP(Rule):
    """``linear_fc1``, gate rows then up rows, to two projections."""

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.hf, tensor.chunk(2, dim=0), strict=True))

    def to_mcore(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([parts[name] for name in self.hf])


@dataclass(frozen=True)
class Experts(Rule):
    """A tensor of every expert, stacked, to the tensors of each: ``[experts, ...]`` by one rule an expert."""

    each: tuple[Rule, ...]

    @classmethod
    def of(cls, mcore: str, each: Iterable[Rule]) -> Experts:
        """All experts' rules of one kind."""
        rules = tuple(each)
        return cls(mcore, tuple(name for rule in rules for name in rule.hf), (len(rules), *rules[0].shape), rules)

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for rule, part in zip(self.each, tensor, strict=True):
            found |= rule.to_hf(part)
        return found

    def to_mcore(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([rule.to_mcore(parts) for rule in self.each])


@dataclass(frozen=True)
class ExpertBias(Rule):
    """What is added to the scores when experts are chosen. In half precision it would choose others."""

    def dtype(self, asked: torch.dtype) -> torch.dtype:
        return torch.float32


@dataclass(frozen=True)
class VocabRows(Rule):
    """Embedding or head, whose padding rows exist in the checkpoint only. ``shape`` has the true vocabulary."""

    padded: int | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or shape[0] < self.shape[0] or shape[1:] != self.shape[1:]:
            raise UserError(
                f"{self.mcore} has shape {shape} in the checkpoint, but a vocabulary of {self.shape[0]} and "
                f"hidden_size={self.shape[1]} need at least {self.shape}; the tokenizer does not fit this checkpoint"
            )

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        return {self.hf[0]: tensor[: self.shape[0]]}

    def to_mcore(self, parts: Mapping[str, Tensor]) -> Tensor:
        rows = parts[self.hf[0]]
        missing = (self.padded or rows.size(0)) - rows.size(0)
        return torch.cat([rows, rows.new_zeros(missing, rows.size(1))]) if missing else rows


def some_names(names: list[str]) -> str:
    """The first of many names of tensors, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def model_rules(architecture: Architecture, family: Family) -> list[Rule]:
    """Every tensor of a model, in the order of the forward pass, with the names of ``family``."""
    return list(_rules(architecture, family.names))


def _rules(a: Architecture, names: TensorNames) -> Iterator[Rule]:
    hidden, vocabulary = a.hidden_size, (a.vocab_size, a.hidden_size)
    yield VocabRows("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary)
    if norm_scheme(a.norm_scheme).embed_norm:
        yield from _norm(a, "embed_norm", "model.embed_norm", hidden)
    if a.copy_embedding == "vector":
        yield Rule("copy_embedding.weight", ("model.copy_embedding.weight",), (a.policy.repeat - 1, hidden))
    for index, block in enumerate(a.blocks):
        mcore, hf = f"decoder.layers.{index}", f"model.layers.{index}"
        if block.attention.input_norm:
            yield from _norm(a, f"{mcore}.input_layernorm", f"{hf}.input_layernorm", hidden)
        yield from _attention(a, f"{mcore}.self_attention", f"{hf}.self_attn", block)
        if block.attention.output_norm:
            yield from _norm(a, f"{mcore}.attention_output_layernorm", f"{hf}.{names.attention_output_norm}", hidden)
        if block.mlp.input_norm:
            yield from _norm(a, f"{mcore}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", hidden)
        if a.moe is not None and a.moe.layers[index]:
            yield from _experts(a, a.moe, f"{mcore}.mlp", f"{hf}.{names.experts}", names)
        else:
            yield from _mlp(a, f"{mcore}.mlp", f"{hf}.mlp", a.ffn_hidden_size)
        if block.mlp.output_norm:
            yield from _norm(a, f"{mcore}.mlp_output_layernorm", f"{hf}.{names.mlp_output_norm}", hidden)
    yield from _norm(a, "decoder.final_layernorm", "model.norm", hidden)
    if not a.tied:
        yield VocabRows("output_layer.weight", ("lm_head.weight",), vocabulary)


def _norm(a: Architecture, mcore: str, hf: str, size: int) -> Iterator[Rule]:
    for kind in ("weight", "bias") if a.normalization == "LayerNorm" else ("weight",):
        yield Rule(f"{mcore}.{kind}", (f"{hf}.{kind}",), (size,))


def _linear(mcore: str, hf: str, rows: int, columns: int, bias: bool) -> Iterator[Rule]:
    yield Rule(f"{mcore}.weight", (f"{hf}.weight",), (rows, columns))
    if bias:
        yield Rule(f"{mcore}.bias", (f"{hf}.bias",), (rows,))


def _attention(a: Architecture, mcore: str, hf: str, block: BlockNorm) -> Iterator[Rule]:
    rows = (a.heads + 2 * a.groups) * a.head_dim
    for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
        names = tuple(f"{hf}.{part}_proj.{kind}" for part in "qkv")
        shape = (rows, a.hidden_size) if kind == "weight" else (rows,)
        yield QKV(f"{mcore}.linear_qkv.{kind}", names, shape, a.groups, a.heads // a.groups, a.head_dim)
    full = {"q": a.heads, "k": a.groups} if block.qk_norm_width == "full" else {}
    for part in block.heads:
        yield from _norm(a, f"{mcore}.{part}_layernorm", f"{hf}.{part}_norm", full.get(part, 1) * a.head_dim)
    yield from _linear(f"{mcore}.linear_proj", f"{hf}.o_proj", a.hidden_size, a.heads * a.head_dim, a.linear_bias)


def _mlp(a: Architecture, mcore: str, hf: str, width: int, names: TensorNames = DEFAULT_NAMES) -> Iterator[Rule]:
    if a.gated:
        for kind in ("weight", "bias") if a.linear_bias else ("weight",):
            parts = (f"{hf}.{names.gate}.{kind}", f"{hf}.{names.up}.{kind}")
            shape = (2 * width, a.hidden_size)[: 2 if kind == "weight" else 1]
            yield GatedMLP(f"{mcore}.linear_fc1.{kind}", parts, shape)
    else:
        yield from _linear(f"{mcore}.linear_fc1", f"{hf}.{names.up}", width, a.hidden_size, a.linear_bias)
    yield from _linear(f"{mcore}.linear_fc2", f"{hf}.{names.down}", a.hidden_size, width, a.linear_bias)


def _experts(a: Architecture, moe: MoE, mcore: str, hf: str, names: TensorNames) -> Iterator[Rule]:
    yield Rule(f"{mcore}.router.weight", (f"{hf}.gate.weight",), (moe.experts, a.hidden_size))
    if moe.expert_bias:
        yield ExpertBias(f"{mcore}.router.expert_bias", (f"{hf}.gate.e_score_correction_bias",), (moe.experts,))
    stacked = f"{mcore}.experts.experts"
    each = [list(_mlp(a, stacked, f"{hf}.experts.{e}", moe.ffn_hidden_size, names)) for e in range(moe.experts)]
    for rules in zip(*each, strict=True):
        yield Experts.of(rules[0].mcore, rules)
    if moe.shared_hidden_size:
        shared = f"{mcore}.shared_experts"
        yield from _mlp(a, shared, f"{hf}.shared_experts", moe.shared_hidden_size)
        if moe.shared_gate:
            yield Rule(f"{shared}.gate_weight", (f"{hf}.shared_expert_gate.weight",), (1, a.hidden_size))
