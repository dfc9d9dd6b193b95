"""Rotary position embedding (arXiv 2104.09864), halves layout, as one differentiable function.

Composed of separate operations the rotation makes four intermediate tensors and its backward as many again; here the
result is written once and the backward is the rotation the other way. :func:`rope_reference` is the definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_table(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """``[2, ..., r/2]``: cosine and sine of angles ``[..., r]`` whose two halves are equal."""
    half = angles[..., : angles.size(-1) // 2]
    return torch.stack([half.cos(), half.sin()]).to(dtype)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn ``x`` ``[rows, b, heads, d]`` by a table ``[2, rows, 1, 1, r/2]``; dimensions beyond ``r`` stay as they are."""
    return _Rope.apply(x, table)


def rope_reference(x: Tensor, table: Tensor) -> Tensor:
    """The same through ordinary operations."""
    cos, sin = table
    half = cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _turn(x, table[0], table[1], forward=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _turn(grad, table[0], table[1], forward=False), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, forward: bool) -> Tensor:
    half = cos.size(-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    # Product and sum are rounded one after the other, so that the result is Megatron-Core's bit for bit.
    part = second * sin
    target = torch.mul(first, cos, out=out[..., :half])
    target.sub_(part) if forward else target.add_(part)
    torch.mul(first, sin, out=part)
    target = torch.mul(second, cos, out=out[..., half : 2 * half])
    target.add_(part) if forward else target.sub_(part)
    if 2 * half < x.size(-1):
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
