"""Attention over documents that lie in one sequence and are kept apart: each as a sequence of its own.

Exact by construction, for every backend: no document is computed with another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phd_megatron.phd.documents import document_lengths
from phd_megatron.phd.kv_policy import KVPolicy


def attend_documents(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    starts: Tensor,
    scale: float | None = None,
) -> Tensor:
    """``[Kq, s, b, heads, d]`` of ``query [Kq, s, b, heads, d]``, ``key`` and ``value [K, s, b, groups, d]``.

    Args:
        attend: a backend, over whole sequences.
        starts: ``[b, s]``, on the host; see :mod:`phd_megatron.phd.documents`.
    """
    lengths = [document_lengths(row) for row in starts]
    if all(row == lengths[0] for row in lengths):
        return _one_by_one(attend, query, key, value, policy, lengths[0], scale)
    rows = zip(*(x.split(1, 2) for x in (query, key, value)), lengths, strict=True)
    return torch.cat([_one_by_one(attend, q, k, v, policy, mine, scale) for q, k, v, mine in rows], 2)


def _one_by_one(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    lengths: list[int],
    scale: float | None,
) -> Tensor:
    """The same of samples whose documents have these lengths."""
    if len(lengths) == 1:
        return attend(query, key, value, policy, scale=scale)
    # Split, not sliced: the gradients of parts are then put together once, and not each into a tensor of zeros.
    parts = zip(*(x.split(lengths, 1) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part, policy, scale=scale) for part in parts], 1)
