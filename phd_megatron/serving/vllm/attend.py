"""PHD attention over paged caches, in torch operations.

Shapes: ``T`` tokens of all requests in a row, ``R`` requests, ``J`` query copies (``K``, or the last one alone), ``G``
KV heads with ``r`` query heads each, ``d`` head dimension, ``S`` positions that a window spans. A cache is
``[blocks, heads, block, 2 d]``, keys before values, and a block table ``[R, blocks of a request]`` says where a
request's positions lie. What a query sees comes from :class:`~phd_megatron.phd.kv_policy.KVPolicy` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phd_megatron.phd.kv_policy import KVPolicy

#: query rows at a time where scores are made, and bytes of gathered hidden entries
ROWS = 256
BYTES = 1 << 28


@dataclass
class Batch:
    """Where the tokens of one forward pass are, as one cache's blocks hold them.

    Attributes:
        starts: [R + 1] first token of each request, and the end.
        lengths: [R] positions of each request once this pass is in.
        blocks: [R, blocks] of the cache.
        slots: [T] where new entries go, -1 for padding.
        longest_query, longest: bounds over the requests.
    """

    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    slots: Tensor
    longest_query: int
    longest: int

    def rows(self) -> tuple[Tensor, Tensor]:
        """Request and position of each token, both [T]; the shapes do not depend on values.

        Not kept for the next layer: a graph that is recorded later would read what stood here before.
        """
        token = torch.arange(self.slots.size(0), device=self.slots.device)
        request = torch.bucketize(token, self.starts[1:], right=True).clamp(max=self.lengths.size(0) - 1)
        position = self.lengths[request] - self.starts[request + 1] + token
        return request, position


def write(cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Put ``key`` and ``value`` [T, heads, d] into their slots; padding goes to block 0, which is nobody's."""
    size, slots = cache.size(2), slots.clamp(min=0)
    entries = torch.cat([key, value], dim=-1)[: slots.size(0)]
    cache[slots // size, :, slots % size] = entries.to(cache.dtype)


def attend_originals(query: Tensor, cache: Tensor, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """Part (a): every query over the originals up to its own token.

    Args:
        query: [T, G, J r, d].

    Returns:
        Output of the query's shape in float32, and the log-sum-exp [T, G, J r] of its scores.
    """
    out = query.new_zeros(query.shape, dtype=torch.float32)
    lse = out.new_zeros(query.shape[:-1])
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    for request, length in enumerate(lengths):
        first, end = starts[request], starts[request + 1]
        blocks = batch.blocks[request, : -(-length // cache.size(2))].long()
        entries = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()  # [G, length, 2 d]
        keys, values = entries.chunk(2, dim=-1)
        for row in range(first, end, ROWS):
            rows = slice(row, min(row + ROWS, end))
            seen = length - (end - rows.stop)  # positions that the last row sees
            scores = torch.einsum("tgjd,gld->tgjl", query[rows].float(), keys[:, :seen]) * scale
            own = torch.arange(seen - (rows.stop - row), seen, device=query.device)
            later = torch.arange(seen, device=query.device) > own[:, None]  # [rows, seen]
            scores = scores.masked_fill(later[:, None, None], float("-inf"))
            lse[rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("tgjl,gld->tgjd", scores.softmax(-1), values[:, :seen])
    return out, lse


def add_hidden(
    out: Tensor, lse: Tensor, query: Tensor, cache: Tensor, batch: Batch, policy: KVPolicy, scale: float
) -> Tensor:
    """Part (b): merge what hidden queries see of hidden copies into part (a)'s rows.

    No shape depends on a value, and nothing waits for the host.

    Args:
        out, lse: of part (a), [T, G, J, r, d] and [T, G, J, r].
        query: [T, G, J, r, d]; the last ``J`` of ``K`` copies.
        cache: of hidden entries, heads ``[K - 1, G]``.

    Returns:
        [T, G, J, r, d] in float32.
    """
    tokens, groups, copies = query.shape[:3]
    hidden = policy.repeat - 1
    request, position = batch.rows()
    span = torch.arange(policy.span - 1, -1, -1, device=query.device)
    copy = torch.arange(policy.repeat - copies + 1, policy.repeat + 1, device=query.device)
    key_copy = torch.arange(2, policy.repeat + 1, device=query.device)
    row_bytes = policy.span * cache.size(1) * cache.size(3) * 4
    step = max(1, BYTES // row_bytes)
    parts = []
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        where = position[rows, None] - span  # [t, S]
        place = where.clamp(min=0)
        blocks = batch.blocks[request[rows, None], place // cache.size(2)].long()
        entries = cache[blocks, :, place % cache.size(2)].float()  # [t, S, (K-1) G, 2 d]
        seen = (
            policy.hidden_visible(
                position[rows, None, None, None], copy[None, :, None, None], where[:, None, :, None], key_copy
            )
            & (where >= 0)[:, None, :, None]
        )  # [t, J, S, K-1]
        # Where no query of a token looks there may be anything, NaN too, and 0 times it would stay.
        looked = seen.any(1)[..., None, None]
        keys, values = entries.unflatten(2, (hidden, groups)).masked_fill(~looked, 0).chunk(2, dim=-1)
        scores = torch.einsum("tgjrd,tsigd->tgjrsi", query[rows].float(), keys) * scale
        scores = scores.masked_fill(~seen[:, None, :, None], float("-inf")).flatten(-2)  # [t, G, J, r, S (K-1)]
        top = torch.logaddexp(lse[rows], scores.logsumexp(-1))[..., None]
        weights = (scores - top).exp()
        parts.append(
            out[rows] * (lse[rows][..., None] - top).exp()
            + torch.einsum("tgjrx,txgd->tgjrd", weights, values.flatten(1, 2))
        )
    return torch.cat(parts)
