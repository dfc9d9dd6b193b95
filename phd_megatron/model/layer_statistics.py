"""What every decoder layer does to one micro-batch, seen by hooks that only look.

The analyses are those of HybridNorm (arXiv 2503.04598, Figures 7 and 8). All speak of the *last* copy of each token,
the one that the loss sees: it is there in every layer, in a pruned last one too, and with K = 1 it is the token itself.
With K > 1 also: how far its residual stream still agrees with the original's, and which kinds of keys it attends to.

A hook keeps this rank's share, in float64; :meth:`LayerRecorder.activations` adds up the shares. Nothing is drawn at
random: the same tokens and queries are looked at in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from phd_megatron.model.attention import PHDCoreAttention
from phd_megatron.phd.copies import split_copies
from phd_megatron.phd.kv_policy import KVPolicy

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from phd_megatron.model.transformer_config import PHDTransformerConfig

SAMPLED_QUERIES = 128
#: shares of the attention weights, with K > 1; in this order in :func:`key_kinds`
ATTENDED = ("attention_on_originals", "attention_on_own", "attention_on_window")


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


def cosine_sum(rows: Tensor, others: Tensor) -> Tensor:
    """Sum of the cosines of the rows ``[tokens, b, h]`` with those of the same place, ``[]`` in float64."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return F.cosine_similarity(rows.to(wide), others.to(wide), dim=-1).sum(dtype=torch.float64)


def key_kinds(query_position: Tensor, key_position: Tensor, key_copy: Tensor) -> Tensor:
    """``[3, n, keys]``: whether a key is an original, or hidden and of the query's own token, or of another token.

    Every key that a query sees is of one kind; hidden ones of other tokens are those of the window.
    """
    original, own = key_copy == 1, key_position == query_position
    return torch.stack([original.expand_as(own), ~original & own, ~original & ~own])


def attention_moments(query: Tensor, key: Tensor, visible: Tensor, kinds: Tensor, scale: float) -> Tensor:
    """Log-sum-exp of the scores that each query sees, and means under its attention weights: of scores and of kinds.

    Args:
        query: ``[n, b, heads, d]``.
        key: ``[keys, b, groups, d]``; head ``h`` uses group ``h // (heads / groups)``.
        visible: ``[n, keys]``, or of each sequence ``[b, n, keys]``.
        kinds: ``[kinds, n, keys]``, whether a key is of a kind; its mean is the weights' share on that kind.
        scale: factor on the scores.

    Returns:
        ``[2 + kinds, b, heads, n]`` in float64; ``-inf`` and zeros for a query that sees none of these keys. The
        entropy of the weights is the difference of the first two.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(2, (key.size(2), -1))  # [n, b, g, r, d]
    moments = []
    visible = visible.expand(key.size(1), -1, -1)
    for sequence, group in product(range(key.size(1)), range(key.size(2))):  # the scores of all would be large
        scores = torch.einsum("qrd,kd->rqk", grouped[:, sequence, group], key[:, sequence, group].to(wide)) * scale
        unseen = ~visible[sequence]
        top = scores.masked_fill(unseen, float("-inf")).amax(-1, keepdim=True)
        below = (scores - top.clamp_min(torch.finfo(wide).min)).masked_fill(unseen, 0.0)
        weights = below.exp().masked_fill(unseen, 0.0)
        total = weights.sum(-1, dtype=torch.float64)
        mean = (weights * below).sum(-1, dtype=torch.float64) / total.clamp_min(1.0)  # 0 or at least 1
        top = top.squeeze(-1).double()
        shares = [(weights * kind).sum(-1, dtype=torch.float64) / total.clamp_min(1.0) for kind in kinds]
        moments.append(
            torch.stack([total.log() + top, torch.where(visible[sequence].any(-1), mean + top, 0.0), *shares])
        )
    return torch.stack(moments, 1).unflatten(1, (key.size(1), -1)).flatten(2, 3)  # [2 + kinds, b, g*r, n]


def union_moments(moments: Tensor, group: dist.ProcessGroup) -> Tensor:
    """:func:`attention_moments` of the keys of all ranks of ``group``, from each rank's."""
    if group.size() == 1:
        return moments
    log_sum, means = moments[0], moments[1:]
    top = log_sum.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    weight = (log_sum - top).exp()
    sums = torch.cat([weight[None], weight * means])
    dist.all_reduce(sums, group=group)
    return torch.cat([(sums[0].log() + top)[None], sums[1:] / sums[0]])


# ---------------------------------------------------------------- hooks


class LayerRecorder:
    """Watches the layers of this rank while :meth:`watching`; the first micro-batch that passes a layer counts.

    Recomputation passes a layer again in the backward: that is not the first time.

    Args:
        models: the model chunks of this rank.
        groups: of the run.
        length: original tokens of a whole sequence.
    """

    def __init__(self, models: Sequence[nn.Module], groups: ProcessGroupCollection, length: int) -> None:
        self.groups, self.length = groups, length
        modules = [module for model in models for module in model.modules()]
        self.layers = [module for module in modules if isinstance(module, TransformerLayer)]
        self._cores = [module for module in modules if isinstance(module, PHDCoreAttention)]
        self._squares: dict[int, Tensor] = {}
        self._units: dict[int, Tensor] = {}
        self._copy_cosines: dict[int, Tensor] = {}
        self._attention: dict[int, Tensor] = {}
        self._tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._starts: Tensor | None = None  # [b, n]: where the document of each sampled query begins

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
    def _see_layer(
        self, layer: TransformerLayer, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
    ) -> None:
        number, config = layer.layer_number, layer.config
        if number in self._squares:
            return
        dropped = number == config.num_layers and config.last_layer_drops_copies
        copies = split_copies(output[0].detach(), 1 if dropped else config.kv_policy.repeat)
        self._squares[number], self._units[number] = residual_sums(copies[-1])
        if len(copies) > 1:
            self._copy_cosines[number] = cosine_sum(copies[0], copies[-1])

    @torch.no_grad()
    def _see_attention(self, core: PHDCoreAttention, args: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        if core.layer_number in self._attention:
            return
        query, key, policy = args[0].detach(), args[1].detach(), core.policy
        query = split_copies(query, policy.repeat, core.ranks)[-1]  # [s_rank, b, np, hn]
        key = split_copies(key, policy.repeat, core.ranks).flatten(0, 1)  # [K*s_rank, b, ng, hn]
        if self._tables is None:
            self._tables = self._lookup(policy, query.device, args[3])
        held, rows, visible, kinds = self._tables
        # Each sampled query is on one rank; the others add zeros. In float32, since not every backend adds halves.
        sampled = query[rows].to(torch.promote_types(query.dtype, torch.float32))
        if self.groups.cp.size() > 1:
            sampled = sampled.masked_fill(~held[:, None, None, None], 0.0)
            dist.all_reduce(sampled, group=self.groups.cp)
        scale = query.size(-1) ** -0.5 if core.scale is None else core.scale
        self._attention[core.layer_number] = attention_moments(sampled, key, visible, kinds, scale)

    def _lookup(
        self, policy: KVPolicy, device: torch.device, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whether this rank has each sampled query, in which row, which of this rank's keys it sees, their kinds.

        ``starts [b, s_rank]`` are where the documents of this rank's tokens begin, if they are kept apart.
        """
        slices = policy.context_parallel_slices(self.length, self.groups.cp.size(), self.groups.cp.rank())
        positions = torch.cat([torch.arange(part.start, part.stop) for part in slices])
        queries = sampled_positions(self.length)
        match = queries[:, None] == positions
        held, rows = match.any(1), match.int().argmax(1)
        first = torch.zeros(1, len(positions), dtype=torch.long) if starts is None else starts
        query_first = first[:, rows] * held  # [b, n]
        if starts is not None and self.groups.cp.size() > 1:
            query_first = query_first.to(device)
            dist.all_reduce(query_first, group=self.groups.cp)
            query_first = query_first.cpu()
        self._starts = query_first
        key_copy = torch.arange(1, policy.repeat + 1).repeat_interleave(len(positions))  # copy-major
        key_position, key_first = positions.repeat(policy.repeat), first.repeat(1, policy.repeat)[:, None]
        kinds = key_kinds(queries[:, None], key_position, key_copy)
        places = (queries - query_first)[..., None], torch.tensor(policy.repeat), key_position - key_first, key_copy
        visible = policy.visible(*places) & (query_first[..., None] == key_first)  # [b or 1, n, K*s_rank]
        kinds = kinds if policy.repeat > 1 else kinds[:0]
        return held.to(device), rows.to(device), visible.to(device), kinds.to(device)

    # ------------------------------------------------------------ sums over ranks

    @torch.no_grad()
    def activations(self) -> dict[int, dict[str, Tensor]]:
        """This rank's share of each statistic by layer number: the sum over all ranks of the world is the value.

        Collective among the ranks that watched; empty elsewhere.
        """
        found: dict[int, dict[str, Tensor]] = {number: {} for number in self._squares}
        if not found:
            return found
        groups, config = self.groups, self.layers[0].config
        squares, units, cosines = map(self._sum_over_rows, (self._squares, self._units, self._copy_cosines))
        attention = self._attention_means(config)
        for number in found:
            if groups.tp_cp.rank() == 0:
                sequences, channels = units[number].shape
                tokens = self.length * sequences
                found[number]["residual_rms"] = (squares[number] / (tokens * channels)).sqrt()
                found[number]["cosine_similarity"] = mean_cosine(units[number], self.length).mean()
                if number in cosines:
                    found[number]["copy_cosine"] = cosines[number] / tokens
            if groups.cp.rank() == 0:
                found[number] |= {name: values[number] for name, values in attention.items()}
        return found

    def _sum_over_rows(self, shares: dict[int, Tensor]) -> dict[int, Tensor]:
        """By layer, from this rank's share, the sum over the rows of all ranks."""
        if not shares:
            return {}
        sums = torch.stack([*shares.values()])
        if not self.layers[0].config.sequence_parallel and self.groups.tp.rank() > 0:
            sums = torch.zeros_like(sums)  # the same rows as on the first rank
        dist.all_reduce(sums, group=self.groups.tp_cp)
        return dict(zip(shares, sums, strict=True))

    def _attention_means(self, config: PHDTransformerConfig) -> dict[str, dict[int, Tensor]]:
        """By name and layer: means over sequences and queries, summed over this rank's heads over the heads of all."""
        moments = torch.stack([*self._attention.values()], 1)  # [2 + kinds, layers, b, np, n]
        log_sum, mean, *shares = union_moments(moments, self.groups.cp)
        entropy = log_sum - mean
        assert self._starts is not None
        originals, hidden = config.kv_policy.pairs_at(sampled_positions(self.length) - self._starts, 1)
        most = (originals + hidden).double().log().to(entropy.device).expand(entropy.size(1), -1)[:, None]  # [b, 1, n]
        several = most > 0  # a query with a single key has no choice
        share = torch.where(several, entropy / most, 0.0) * (several.numel() / several.sum(dtype=torch.float64))
        tables = {"attention_entropy": entropy, "attention_entropy_share": share}
        tables |= zip(ATTENDED, shares, strict=False)  # none with K = 1
        return {
            name: dict(zip(self._attention, values.mean((1, 3)).sum(-1) / config.num_attention_heads, strict=True))
            for name, values in tables.items()
        }
