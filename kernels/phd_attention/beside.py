"""PHD attention as the vendor's causal kernel, once for each copy, and Triton kernels for the hidden window.

As in :mod:`.sdpa` part (a) is causal attention over originals and part (b) the window, merged by log-sum-exp. Here the
vendor's kernel reads each copy's queries where they lie and is exactly as quick as in a vanilla model, ``K`` times; one
launch each way then adds the window and writes the model's layout. Nothing is folded, padded or kept twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phd_megatron.phd.kv_policy import KVPolicy

from .causal import SINGLE, causal_kernel
from .folding import dense
from .sdpa import sdpa_attention
from .window import Window


def sdpa_triton_attention(
    query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, *, scale: float | None = None
) -> Tensor:
    """PHD attention, positions ``0..s-1``, with gradients. Shapes as :func:`.sdpa.sdpa_attention`'s."""
    if policy.repeat == 1:
        return sdpa_attention(query, key, value, policy, scale=scale)
    return _Beside.apply(query, key, value, policy, query.size(-1) ** -0.5 if scale is None else scale)


def _bhsd(x: Tensor) -> Tensor:
    """``[s, b, heads, d]`` as kernels of vendors take it, ``[b, heads, s, d]``."""
    return dense(x.permute(1, 2, 0, 3))


def _sbhd(x: Tensor, groups: int) -> Tensor:
    """``[b, heads, s, ...]`` as a view ``[s, b, groups, ratio, ...]``."""
    return x.unflatten(1, (groups, -1)).movedim(3, 0)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> Tensor:
        copies, length, batch, heads, width = query.shape
        groups = key.size(3)
        kernel = SINGLE if length == 1 else causal_kernel(query.device, query.dtype, width)[0]
        k, v = _bhsd(key[0]), _bhsd(value[0])
        outs, lses, extras = zip(*(kernel.forward(_bhsd(x), k, v, scale) for x in query), strict=True)
        first = max(0, copies - policy.repeat + 1)  # copies before it see originals alone: one, or none if pruned
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(copies - first, batch, heads, lses[0].size(2), dtype=torch.float32, device=query.device)
        if first:
            out[0].copy_(outs[0].permute(2, 0, 1, 3))
        if lses[0].size(2) > length:
            lse[..., length:] = float("inf")  # rows a vendor pads with must weigh nothing in its backward
        Window(policy, scale).forward(
            _grouped(query[first:], groups),
            key[1:],
            value[1:],
            [_sbhd(x, groups) for x in outs[first:]],
            [_sbhd(x[:, :, :length], groups) for x in lses[first:]],
            _grouped(out[first:], groups),
            _lse_rows(lse, groups, length),
        )
        ctx.save_for_backward(query, key, value, out, lse, *lses[:first])
        ctx.kernel, ctx.extras, ctx.policy, ctx.scale = kernel, extras, policy, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *lses = ctx.saved_tensors
        groups, first, length = key.size(3), len(lses), query.size(1)
        grad = dense(grad)
        k, v = _bhsd(key[0]), _bhsd(value[0])
        dqs, dks, dvs = zip(
            *(
                ctx.kernel.backward(*(_bhsd(x) for x in (g, q)), k, v, _bhsd(o), row_lse, extra, ctx.scale)
                for g, q, o, row_lse, extra in zip(grad, query, out, [*lses, *lse], ctx.extras, strict=True)
            ),
            strict=True,
        )
        query_grad, key_grad, value_grad = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
        )
        if first:
            query_grad[0].copy_(dqs[0].permute(2, 0, 1, 3))
        for target, found in ((key_grad, dks), (value_grad, dvs)):
            _add_up([x.permute(2, 0, 1, 3) for x in found], target[0])
        Window(ctx.policy, ctx.scale).backward(
            _grouped(grad[first:], groups),
            _grouped(query[first:], groups),
            key[1:],
            value[1:],
            _grouped(out[first:], groups),
            _lse_rows(lse, groups, length),
            [_sbhd(x, groups) for x in dqs[first:]],
            _grouped(query_grad[first:], groups),
            key_grad[1:],
            value_grad[1:],
        )
        return query_grad, key_grad, value_grad, None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``[J, s, b, heads, d]`` as ``[J, s, b, groups, ratio, d]``."""
    return x.unflatten(3, (groups, -1))


def _lse_rows(lse: Tensor, groups: int, length: int) -> Tensor:
    """``[J, b, heads, >= s]`` as ``[J, s, b, groups, ratio]``."""
    return lse[..., :length].unflatten(2, (groups, -1)).movedim(4, 1)


def _add_up(found: list[Tensor], target: Tensor) -> None:
    """Sum over copies into ``target``, rounded once."""
    if len(found) == 2:
        torch.add(*found, out=target)
    else:
        torch.sum(torch.stack(found), 0, out=target)
