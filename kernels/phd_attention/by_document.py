"""Attention over documents that lie in one sequence and are kept apart: each as a sequence of its own.

Exact by construction, for every backend: no document is computed with another. Needs torch alone, since it also ships
inside an exported Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy


def attend_documents(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    lengths: Sequence[Sequence[int]],
    scale: float | None = None,
) -> Tensor:
    """``[Kq, s, b, heads, d]`` of ``query [Kq, s, b, heads, d]``, ``key`` and ``value [K, s, b, groups, d]``.

    Args:
        attend: a backend, over whole sequences.
        lengths: of the documents of each sample, in their order; they fill it.
    """
    if all(sample == lengths[0] for sample in lengths):
        return _one_by_one(attend, query, key, value, policy, lengths[0], scale)
    samples = zip(*(x.split(1, 2) for x in (query, key, value)), lengths, strict=True)
    return torch.cat([_one_by_one(attend, q, k, v, policy, mine, scale) for q, k, v, mine in samples], 2)


def _one_by_one(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    lengths: Sequence[int],
    scale: float | None,
) -> Tensor:
    """The same of samples whose documents have these lengths."""
    if len(lengths) == 1:
        return attend(query, key, value, policy, scale=scale)
    # Split, not sliced: the gradients of parts are then put together once, and not each into a tensor of zeros.
    parts = zip(*(x.split(list(lengths), 1) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part, policy, scale=scale) for part in parts], 1)
