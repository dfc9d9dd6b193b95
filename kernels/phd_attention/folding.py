"""Layouts of attention's tensors: copies folded into heads, so that both parts read one memory as views.

Folded memory order is ``[b, kv_head, s, copy, group, d]``, with ``b * kv_head`` as the batch of a problem with one KV
head. Needs torch alone, since it also ships inside an exported Hugging Face model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit_stride(x: Tensor) -> Tensor:
    """The flash operators misread, without an error, tensors whose last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy where a vendor's kernel could not read it: dense rows that start at multiples of 16 bytes."""
    step = max(1, 16 // x.element_size())
    aligned = all(size == 1 or stride % step == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    # A tensor of a compiled graph has no address yet; attention's are all results of operations, which begin a block.
    aligned = aligned and (torch.compiler.is_compiling() or x.data_ptr() % 16 == 0)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def fold_queries(x: Tensor, groups: int) -> Tensor:
    """Queries ``[Kq, s, b, heads, d]`` to ``[b * groups, s, Kq, r, d]``."""
    x = x.unflatten(3, (groups, x.size(3) // groups)).permute(2, 3, 1, 0, 4, 5)  # [b, g, s, Kq, r, d]
    return dense(x.reshape(-1, *x.shape[2:]))


def unfold_queries(x: Tensor, batch: int) -> Tensor:
    """Inverse of :func:`fold_queries`: ``[b * groups, s, Kq, r, d]`` to a contiguous ``[Kq, s, b, heads, d]``."""
    x = x.unflatten(0, (batch, x.size(0) // batch)).permute(3, 2, 0, 1, 4, 5)
    return x.reshape(*x.shape[:3], -1, x.size(-1))


def fold_keys(x: Tensor) -> Tensor:
    """Keys or values ``[copies, s, b, groups, d]`` to ``[b * groups, s, copies, d]``."""
    x = x.permute(2, 3, 1, 0, 4)
    return dense(x.reshape(-1, *x.shape[2:]))


def unfold_keys(x: Tensor, batch: int) -> Tensor:
    """Inverse of :func:`fold_keys`, a view."""
    return x.unflatten(0, (batch, x.size(0) // batch)).permute(3, 2, 0, 1, 4)


def as_heads(x: Tensor) -> Tensor:
    """Folded ``[G, s, Kq, r, d]`` as part (a) takes it, ``[G, Kq * r, s, d]``."""
    return dense(x.flatten(2, 3).transpose(1, 2))


def as_rows(x: Tensor, copies: int) -> Tensor:
    """What part (a) gave, ``[G, Kq * r, s, ...]``, as ``[G, s, Kq, r, ...]``: a view, so that it can be merged into."""
    return x.transpose(1, 2).unflatten(2, (copies, x.size(1) // copies))
