"""From the fused QKV projection to query, key and value, turned by position (RoPE, arXiv 2104.09864, halves).

Composed of separate operations, splitting and rotating copy the query twice and its gradient three times. Here the
forward writes each result once and the backward writes all three gradients into one tensor. :func:`split_qkv_reference`
and :func:`rope_reference` are the definitions.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

Three: TypeAlias = tuple[Tensor, Tensor, Tensor]


def rope_table(angles: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """``[2, ..., r/2]``: cosine and sine, times ``factor``, of angles ``[..., r]`` whose two halves are equal.

    With another factor than 1 the rotation also scales, and its backward does the same, which is its transpose.
    """
    half = angles[..., : angles.size(-1) // 2]
    return (torch.stack([half.cos(), half.sin()]) * factor).to(dtype)


def split_qkv_rope(mixed: Tensor, heads_per_group: int, table: Tensor | None) -> Three:
    """Split ``[rows, b, groups, (heads_per_group + 2) * d]`` and turn query and key.

    Args:
        mixed: per KV group its query heads, key and value, as Megatron-Core's ``linear_qkv`` gives them.
        heads_per_group: query heads of a group.
        table: ``[2, rows, 1, 1, r/2]`` of :func:`rope_table`; dimensions beyond ``r`` stay. ``None`` only splits.

    Returns:
        Query ``[rows, b, groups * heads_per_group, d]``, key and value ``[rows, b, groups, d]``; the last dimension of
        each is dense. What is not turned may share memory with ``mixed``: do not write into it.
    """
    return _SplitRope.apply(mixed, heads_per_group, table)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn ``x`` ``[rows, b, heads, d]`` by a table ``[2, rows, 1, 1, r/2]``; dimensions beyond ``r`` stay."""
    return _Rope.apply(x, table)


def split_qkv_reference(mixed: Tensor, heads_per_group: int) -> Three:
    """The split through ordinary operations."""
    split = mixed.unflatten(-1, (heads_per_group + 2, -1))  # [rows, b, groups, heads_per_group + 2, d]
    return split[..., :-2, :].flatten(2, 3), split[..., -2, :], split[..., -1, :]


def rope_reference(x: Tensor, table: Tensor) -> Tensor:
    """The rotation through ordinary operations."""
    cos, sin = table
    half = cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor]  # the table
    heads_per_group: int

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...  # None may be among them


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table, torch.empty(x.shape, dtype=x.dtype, device=x.device), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _turn(grad, table, torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), -1), None


class _SplitRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, mixed: Tensor, heads_per_group: int, table: Tensor | None) -> Three:
        ctx.save_for_backward(table)
        ctx.heads_per_group = heads_per_group
        split = mixed.unflatten(-1, (heads_per_group + 2, -1))  # [rows, b, groups, heads_per_group + 2, d]
        # The query is copied before it is turned: over five dimensions with gaps the rotation is several times slower.
        query, key, value = split[..., :-2, :].flatten(2, 3), split[..., -2, :], split[..., -1, :]
        if table is not None:
            query, key = (
                _turn(x, table, torch.empty(x.shape, dtype=x.dtype, device=x.device), 1) for x in (query, key)
            )
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, *grads: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        query, key, value = grads
        groups, width = key.size(2), key.size(3)
        out = torch.empty((*key.shape[:3], ctx.heads_per_group + 2, width), dtype=key.dtype, device=key.device)
        if table is None:
            out[..., -2, :] = key
        else:
            query = _turn(query, table, torch.empty(query.shape, dtype=query.dtype, device=query.device), -1)
            _turn(key, table, out[..., -2, :], -1)
        out[..., :-2, :] = query.unflatten(2, (groups, -1))
        out[..., -1, :] = value
        return out.flatten(3), None, None


def _turn(x: Tensor, table: Tensor, out: Tensor, sign: int) -> Tensor:
    """Write ``x``, turned forwards (1) or back (-1), into ``out``."""
    cos, sin = table
    half = cos.size(-1)
    first, second = x[..., :half], x[..., half : 2 * half]
    # Product and sum are rounded one after the other, so that the result is Megatron-Core's bit for bit.
    part = second * sin
    torch.mul(first, cos, out=out[..., :half]).sub_(part, alpha=sign)
    torch.mul(first, sin, out=part)
    torch.mul(second, cos, out=out[..., half : 2 * half]).add_(part, alpha=sign)
    if 2 * half < x.size(-1):
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
