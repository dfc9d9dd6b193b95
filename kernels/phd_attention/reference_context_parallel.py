"""The definition of PHD attention over context-parallel ranks: one dense mask over global positions, plain autograd.

What travels is what :mod:`.sdpa_context_parallel` sends; it is put together here before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from phd_megatron.phd.kv_policy import KVPolicy

from .exchange import ContextParallel
from .fetch import fetch


def reference_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    context: ContextParallel,
    *,
    scale: float | None = None,
) -> Tensor:
    """As :func:`sdpa_context_parallel`, with one dense mask over global positions and plain autograd."""
    repeat, size = policy.repeat, context.size
    scale = query.size(-1) ** -0.5 if scale is None else scale
    length = query.size(1) * size
    mine = [n for part in policy.context_parallel_slices(length, size, context.rank) for n in part]
    halos = policy.halos(length, size)
    got = fetch(key, value, halos, context)
    keys = [got.originals.transpose(1, 2)]  # [2, b, s, g, d]
    position, copy = [[*range(length)]], [[1] * length]
    if repeat > 1:
        hidden = torch.stack([got.key[1:], got.value[1:]]).transpose(1, 2)  # [2, s_rank, i, b, g, d]
        held = [(hidden, mine)]
        for halo in halos:
            if halo.receiver == context.rank != halo.sender:
                held.append((got.near[0 if halo.slice == context.rank else 1], [*halo.positions]))
        for tensor, places in held:
            keys.append(tensor.permute(0, 3, 1, 2, 4, 5).flatten(2, 3))  # [2, b, rows * i, g, d]
            position.append([n for n in places for _ in range(repeat - 1)])
            copy.append([*range(2, repeat + 1)] * len(places))
    return _attend(query, torch.cat(keys, 2), mine, [*chain(*position)], [*chain(*copy)], policy, scale)


def reference_tail(
    query: Tensor, originals: Tensor, hidden: Tensor, policy: KVPolicy, *, scale: float | None = None
) -> Tensor:
    """The last ``n`` tokens of a document over all of it, by one dense mask. Plain autograd.

    Args:
        query: ``[Kq, n, b, heads, d]``.
        originals: keys and values of the whole document, ``[2, m + n, b, g, d]``.
        hidden: those of the hidden copies from where the first query sees them, ``[2, halo + n, K - 1, b, g, d]``.
        scale: factor on the scores, default ``d ** -0.5``.
    """
    rows, length, hidden_copies = query.size(1), originals.size(1), policy.repeat - 1
    places = range(length - hidden.size(1), length)
    keys = torch.cat([originals.transpose(1, 2), hidden.permute(0, 3, 1, 2, 4, 5).flatten(2, 3)], 2)
    position = [*range(length), *(n for n in places for _ in range(hidden_copies))]
    copy = [*[1] * length, *[*range(2, policy.repeat + 1)] * len(places)]
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return _attend(query, keys, range(length - rows, length), position, copy, policy, scale)


def _attend(
    query: Tensor,
    keys: Tensor,
    positions: Sequence[int],
    key_positions: Sequence[int],
    key_copies: Sequence[int],
    policy: KVPolicy,
    scale: float,
) -> Tensor:
    """``query [Kq, rows, b, heads, d]`` at ``positions`` over keys and values ``[2, b, keys, g, d]``."""
    (copies, rows, _, heads, _), groups, device = query.shape, keys.size(3), query.device
    key_position, key_copy = (torch.tensor(x, device=device) for x in (key_positions, key_copies))
    query_position = torch.tensor(positions, device=device).repeat(copies)[:, None]
    query_copy = torch.arange(policy.repeat - copies + 1, policy.repeat + 1, device=device)
    query_copy = query_copy.repeat_interleave(rows)[:, None]
    mask = policy.visible(query_position, query_copy, key_position, key_copy)  # [Kq*rows, keys]
    q = query.flatten(0, 1).unflatten(2, (groups, heads // groups))  # [Kq*rows, b, g, r, d]
    scores = torch.einsum("qbgrd,bkgd->bgrqk", q, keys[0]) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bgrqk,bkgd->qbgrd", weights, keys[1]).reshape(query.shape)
