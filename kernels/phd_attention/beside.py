"""PHD attention as the vendor's causal kernel, once for each copy, and Triton kernels for the hidden window.

As in :mod:`.sdpa` part (a) is causal attention over originals and part (b) the window, merged by log-sum-exp. Here the
vendor's kernel reads each copy's queries where they lie. With one sequence the copies are the batch of one call whose
sequences share their keys (stride 0): a longer launch fills the GPU better than ``K`` short ones. With more there is a
call for each copy, exactly as quick as a vanilla model's. One launch each way then adds the window, in place where the
vendor's layout is the model's. Nothing is folded, padded or kept twice.
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


def _together(x: Tensor) -> Tensor:
    """``[K, s, 1, heads, d]`` as a batch of copies, ``[K, heads, s, d]``."""
    return dense(x.squeeze(2).transpose(1, 2))


def _copies(x: Tensor) -> Tensor:
    """The way back, a view."""
    return x.transpose(1, 2).unsqueeze(2)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> Tensor:
        copies, length, batch, _, width = query.shape
        groups = key.size(3)
        kernel = SINGLE if length == 1 else causal_kernel(query.device, query.dtype, width)[0]
        k, v = _bhsd(key[0]), _bhsd(value[0])
        first = max(0, copies - policy.repeat + 1)  # copies before it see originals alone: one, or none if pruned
        parts: Any
        extras: Any
        if together := kernel.shares_keys and batch == 1:
            found, lse, extras = kernel.forward(_together(query), *_expanded(copies, k, v), scale)
            parts, lse = _copies(found), lse.unsqueeze(1)  # [K, s, 1, heads, d], [K, 1, heads, >= s]
            out = parts if parts.is_contiguous() else torch.empty_like(query, memory_format=torch.contiguous_format)
        else:
            calls = [kernel.forward(_bhsd(x), k, v, scale) for x in query]
            parts, extras = [x.permute(2, 0, 1, 3) for x, _, _ in calls], [extra for *_, extra in calls]
            lse = torch.stack([x for _, x, _ in calls])  # [K, b, heads, >= s]
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if first and out is not parts:
            out[0].copy_(parts[0])
        lse[first:, ..., length:] = float("inf")  # rows a vendor pads with must weigh nothing in its backward
        rows = _lse_rows(lse[first:], groups, length)
        Window(policy, scale).forward(
            _grouped(query[first:], groups),
            key[1:],
            value[1:],
            [x.unflatten(2, (groups, -1)) for x in parts[first:]],
            list(rows),
            _grouped(out[first:], groups),
            rows,
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.kernel, ctx.together, ctx.extras, ctx.policy, ctx.scale = kernel, together, extras, policy, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        copies, length, groups = query.size(0), query.size(1), key.size(3)
        first = max(0, copies - ctx.policy.repeat + 1)
        grad = dense(grad)
        k, v = _bhsd(key[0]), _bhsd(value[0])
        parts: Any
        key_parts: Any
        if ctx.together:
            given = (_together(grad), _together(query), *_expanded(copies, k, v), _together(out), lse.squeeze(1))
            parts, *key_parts = (_copies(x) for x in ctx.kernel.backward(*given, ctx.extras, ctx.scale))
        else:
            calls = [
                ctx.kernel.backward(*(_bhsd(x) for x in (g, q)), k, v, _bhsd(o), row_lse, extra, ctx.scale)
                for g, q, o, row_lse, extra in zip(grad, query, out, lse, ctx.extras, strict=True)
            ]
            parts, *key_parts = ([x.permute(2, 0, 1, 3) for x in found] for found in zip(*calls, strict=True))
        in_place = ctx.together and parts.is_contiguous()
        query_grad = parts if in_place else torch.empty_like(query, memory_format=torch.contiguous_format)
        key_grad, value_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
        if first and not in_place:
            query_grad[0].copy_(parts[0])
        for target, found in zip((key_grad, value_grad), key_parts, strict=True):
            _add_up(found, target[0])
        Window(ctx.policy, ctx.scale).backward(
            _grouped(grad[first:], groups),
            _grouped(query[first:], groups),
            key[1:],
            value[1:],
            _grouped(out[first:], groups),
            _lse_rows(lse[first:], groups, length),
            [x.unflatten(2, (groups, -1)) for x in parts[first:]],
            _grouped(query_grad[first:], groups),
            key_grad[1:],
            value_grad[1:],
        )
        return query_grad, key_grad, value_grad, None, None


def _expanded(copies: int, *tensors: Tensor) -> list[Tensor]:
    """``[1, groups, s, d]`` for all copies, in the same memory."""
    return [x.expand(copies, -1, -1, -1) for x in tensors]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``[J, s, b, heads, d]`` as ``[J, s, b, groups, ratio, d]``."""
    return x.unflatten(3, (groups, -1))


def _lse_rows(lse: Tensor, groups: int, length: int) -> Tensor:
    """``[J, b, heads, >= s]`` as ``[J, s, b, groups, ratio]``."""
    return lse[..., :length].unflatten(2, (groups, -1)).movedim(4, 1)


def _add_up(found: Tensor | list[Tensor], target: Tensor) -> None:
    """Sum over copies into ``target``, rounded once."""
    if len(found) == 2:
        torch.add(found[0], found[1], out=target)
    else:
        torch.sum(torch.stack(found) if isinstance(found, list) else found, 0, out=target)
