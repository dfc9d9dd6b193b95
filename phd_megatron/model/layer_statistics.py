"""What every decoder layer does to one micro-batch, seen by hooks that only look.

The analyses are those of HybridNorm (arXiv 2503.04598, Figures 7 and 8). All speak of the *last* copy of each token,
the one that the loss sees: it is there in every layer, in a pruned last one too, and with K = 1 it is the token itself.

A hook keeps this rank's share, in float64; :meth:`LayerRecorder.activations` adds up the shares. Nothing is drawn at
random: the same tokens and queries are looked at in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from phd_megatron.model.attention import PHDCoreAttention
from phd_megatron.phd.copies import last_copy, split_copies
from phd_megatron.phd.kv_policy import KVPolicy

SAMPLED_QUERIES = 128


# ---------------------------------------------------------------- formulas


def sampled_positions(length: int) -> Tensor:
    """Token positions of the queries whose attention is looked at: evenly spread, all of them up to 128 tokens."""
    count = min(length, SAMPLED_QUERIES)
    return (2 * torch.arange(count) + 1) * length // (2 * count)


def residual_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[tokens, b, h]`` to the sum of squares ``[]`` and the sum of unit vectors ``[b, h]``, in float64."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.square().sum(dtype=torch.float64), F.normalize(rows, dim=-1).sum(0, dtype=torch.float64)


def mean_cosine(unit_sum: Tensor, tokens: int) -> Tensor:
    """Mean cosine of all pairs of different tokens ``[...]``, from the sum of their unit vectors ``[..., h]``.

    The squared norm of that sum holds every ordered pair once, and each token with itself.
    """
    return (unit_sum.square().sum(-1) - tokens) / max(tokens * (tokens - 1), 1)


def attention_moments(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the scores that each query sees, and their mean under its attention weights.

    Args:
        query: ``[n, b, heads, d]``.
        key: ``[keys, b, groups, d]``; head ``h`` uses group ``h // (heads / groups)``.
        visible: ``[n, keys]``.
        scale: factor on the scores.

    Returns:
        Twice ``[b, heads, n]`` in float64; ``-inf`` and 0 for a query that sees none of these keys. The entropy of the
        weights is the difference of the two.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(2, (key.size(2), -1))  # [n, b, g, r, d]
    moments = []
    for sequence, group in product(range(key.size(1)), range(key.size(2))):  # the scores of all would be large
        scores = torch.einsum("qrd,kd->rqk", grouped[:, sequence, group], key[:, sequence, group].to(wide)) * scale
        top = scores.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True)
        below = (scores - top.clamp_min(torch.finfo(wide).min)).masked_fill(~visible, 0.0)
        weights = below.exp().masked_fill(~visible, 0.0)
        total = weights.sum(-1, dtype=torch.float64)
        mean = (weights * below).sum(-1, dtype=torch.float64) / total.clamp_min(1.0)  # 0 or at least 1
        top = top.squeeze(-1).double()
        moments.append(torch.stack([total.log() + top, torch.where(visible.any(-1), mean + top, 0.0)]))
    log_sum, mean = torch.stack(moments, 1).unflatten(1, (key.size(1), -1)).flatten(2, 3)  # [2, b, g*r, n]
    return log_sum, mean


def union_entropy(log_sum: Tensor, mean: Tensor, group: Any) -> Tensor:
    """Entropy of the weights over the keys of all ranks of ``group``, from each rank's :func:`attention_moments`."""
    if group.size() == 1:
        return log_sum - mean
    top = log_sum.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    weight = (log_sum - top).exp()
    both = torch.stack([weight, weight * mean])
    dist.all_reduce(both, group=group)
    return both[0].log() + top - both[1] / both[0]


# ---------------------------------------------------------------- hooks


class LayerRecorder:
    """Watches the layers of this rank while :meth:`watching`; the first micro-batch that passes a layer counts.

    Recomputation passes a layer again in the backward: that is not the first time.

    Args:
        models: the model chunks of this rank.
        groups: of the run.
        length: original tokens of a whole sequence.
    """

    def __init__(self, models: Sequence[nn.Module], groups: Any, length: int) -> None:
        self.groups, self.length = groups, length
        modules = [module for model in models for module in model.modules()]
        self.layers = [module for module in modules if isinstance(module, TransformerLayer)]
        self._cores = [module for module in modules if isinstance(module, PHDCoreAttention)]
        self._residual: dict[int, tuple[Tensor, Tensor]] = {}
        self._attention: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are there inside. Only the ranks that hold the step's first micro-batch look at anything."""
        handles = []
        if self.groups.dp.rank() == 0:
            handles += [layer.register_forward_hook(self._see_layer) for layer in self.layers]
            handles += [core.register_forward_pre_hook(self._see_attention) for core in self._cores]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _see_layer(self, layer: Any, args: Any, output: tuple[Tensor, Any]) -> None:
        number, config = layer.layer_number, layer.config
        if number in self._residual:
            return
        dropped = number == config.num_layers and not config.copies_dropped_at_head
        rows = last_copy(output[0].detach(), 1 if dropped else config.kv_policy.repeat)
        self._residual[number] = residual_sums(rows)

    @torch.no_grad()
    def _see_attention(self, core: PHDCoreAttention, args: tuple[Tensor, ...]) -> None:
        if core.layer_number in self._attention:
            return
        query, key, policy = args[0].detach(), args[1].detach(), core.policy
        query = split_copies(query, policy.repeat, core.ranks)[-1]  # [s_rank, b, np, hn]
        key = split_copies(key, policy.repeat, core.ranks).flatten(0, 1)  # [K*s_rank, b, ng, hn]
        if self._tables is None:
            self._tables = self._lookup(policy, query.device)
        held, rows, visible = self._tables
        # Each sampled query is on one rank; the others add zeros. In float32, since not every backend adds halves.
        sampled = query[rows].to(torch.promote_types(query.dtype, torch.float32))
        if self.groups.cp.size() > 1:
            sampled = sampled.masked_fill(~held[:, None, None, None], 0.0)
            dist.all_reduce(sampled, group=self.groups.cp)
        scale = query.size(-1) ** -0.5 if core.scale is None else core.scale
        self._attention[core.layer_number] = attention_moments(sampled, key, visible, scale)

    def _lookup(self, policy: KVPolicy, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Whether this rank has each sampled query, in which row, and which of this rank's keys it sees."""
        slices = policy.context_parallel_slices(self.length, self.groups.cp.size(), self.groups.cp.rank())
        positions = torch.cat([torch.arange(part.start, part.stop) for part in slices])
        match = sampled_positions(self.length)[:, None] == positions
        visible = self._visible(policy, positions)
        return match.any(1).to(device), match.int().argmax(1).to(device), visible.to(device)

    def _visible(self, policy: KVPolicy, positions: Tensor) -> Tensor:
        """``[n, K*positions]``, keys copy-major: what the sampled queries of the last copy see at these positions."""
        query_position = sampled_positions(self.length)[:, None]
        key_copy = torch.arange(1, policy.repeat + 1).repeat_interleave(len(positions))
        query_copy = torch.tensor(policy.repeat)
        return policy.visible(query_position, query_copy, positions.repeat(policy.repeat), key_copy)

    # ------------------------------------------------------------ sums over ranks

    @torch.no_grad()
    def activations(self) -> dict[int, dict[str, Tensor]]:
        """This rank's share of each statistic by layer number: the sum over all ranks of the world is the value.

        Collective among the ranks that watched; empty elsewhere.
        """
        found: dict[int, dict[str, Tensor]] = {number: {} for number in self._residual}
        if not found:
            return found
        groups, config = self.groups, self.layers[0].config
        squares, units = (torch.stack(parts) for parts in zip(*self._residual.values(), strict=True))
        if not config.sequence_parallel and groups.tp.rank() > 0:  # the same rows as on the first rank
            squares, units = torch.zeros_like(squares), torch.zeros_like(units)
        dist.all_reduce(squares, group=groups.tp_cp)
        dist.all_reduce(units, group=groups.tp_cp)  # [layers, b, h]
        entropies = self._entropies(config)
        for index, number in enumerate(self._residual):
            if groups.tp_cp.rank() == 0:
                found[number]["residual_rms"] = (squares[index] / (self.length * units[index].numel())).sqrt()
                found[number]["cosine_similarity"] = mean_cosine(units[index], self.length).mean()
            if groups.cp.rank() == 0:
                found[number] |= {name: values[number] for name, values in entropies.items()}
        return found

    def _entropies(self, config: Any) -> dict[str, dict[int, Tensor]]:
        """By name and layer: means over sequences and queries, summed over this rank's heads over the heads of all."""
        log_sum, mean = (torch.stack(parts) for parts in zip(*self._attention.values(), strict=True))
        entropy = union_entropy(log_sum, mean, self.groups.cp)  # [layers, b, np, n]
        most = self._visible(config.kv_policy, torch.arange(self.length)).sum(-1).double().log().to(entropy.device)
        several = most > 0  # a query with a single key has no choice
        shares = entropy[..., several] / most[several]
        tables = {"attention_entropy": entropy, "attention_entropy_share": shares}
        return {
            name: dict(zip(self._attention, values.mean((1, 3)).sum(-1) / config.num_attention_heads, strict=True))
            for name, values in tables.items()
        }
