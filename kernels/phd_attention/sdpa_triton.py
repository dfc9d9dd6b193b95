"""PHD attention as the vendor's causal kernel over all copies, and Triton kernels for the hidden window.

As in :mod:`.sdpa` part (a) is causal attention over originals and part (b) the window, merged by log-sum-exp. Here the
vendor's kernel reads each copy's queries where they lie. The copies are the batch of one call, whose entries share
their keys (stride 0): a longer launch fills the GPU better than ``K`` short ones. Where an operator does not take that,
there is a call for each copy, exactly as quick as a vanilla model's. One launch each way then adds the window, in place
where the vendor's layout is the model's. Nothing is folded, padded or kept twice.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.phd.kv_policy import KVPolicy

from .causal import SINGLE, Call, CausalKernel, Extra, causal_kernel
from .folding import dense
from .sdpa import sdpa_attention
from .window import Window

Copies: TypeAlias = Tensor | list[Tensor]  # what one call returned for all copies, or one call for each


def sdpa_triton_attention(
    query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, *, scale: float | None = None
) -> Tensor:
    """PHD attention, positions ``0..s-1``, with gradients. Shapes as :func:`.sdpa.sdpa_attention`'s."""
    if policy.repeat == 1:
        return sdpa_attention(query, key, value, policy, scale=scale)
    return _SdpaTriton.apply(query, key, value, policy, query.size(-1) ** -0.5 if scale is None else scale)


def _batch(x: Tensor) -> Tensor:
    """``[copies, s, b, heads, d]`` as kernels of vendors take it, copies as a batch: ``[copies, b * heads, s, d]``.

    Sequences lie beside each other in the model's layout, so with their heads they make one dimension of one stride.
    Query heads keep their groups: a group's are neighbours in both.
    """
    return dense(x.flatten(2, 3).transpose(1, 2))


def _model(x: Tensor, batch: int) -> Tensor:
    """The way back, a view."""
    return x.transpose(1, 2).unflatten(2, (batch, -1))


class _Calls(NamedTuple):
    """Part (a): the vendor's kernel over all copies, in one call or in one for each."""

    kernel: CausalKernel
    extras: list[Extra]

    @classmethod
    def forward(
        cls, kernel: CausalKernel, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[_Calls, Copies, Copies]:
        """With it, outputs ``[copies, b * heads, s, d]`` and log-sum-exps ``[copies, b * heads, >= s]``.

        ``k``, ``v`` are those of one batch entry. Where there are several calls, both are lists of such tensors.
        """
        if kernel.shares_keys:
            out, lse, extra = kernel.forward(q, *_expanded(q, k, v), scale, True)
            return cls(kernel, [extra]), out, lse
        found = [kernel.forward(x, k, v, scale, True) for x in q.split(1)]
        return cls(kernel, [extra for *_, extra in found]), [x for x, _, _ in found], [x for _, x, _ in found]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Copies, Copies, Copies]:
        """dq, dk and dv of each copy: tensors, or lists of them."""
        if self.kernel.shares_keys:
            return self.kernel.backward(grad, Call(q, *_expanded(q, k, v), out, lse, self.extras[0], scale))
        parts = zip(grad.split(1), q.split(1), out.split(1), lse.split(1), self.extras, strict=True)
        found = [self.kernel.backward(g, Call(x, k, v, o, rows, extra, scale)) for g, x, o, rows, extra in parts]
        dq, dk, dv = zip(*found, strict=True)
        return list(dq), list(dk), list(dv)


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``[1, b * groups, s, d]`` for all copies, in the same memory."""
    return k.expand(q.size(0), -1, -1, -1), v.expand(q.size(0), -1, -1, -1)


def _each(found: Copies, batch: int) -> list[Tensor]:
    """Per copy ``[s, b, heads, d]``, views."""
    return [x for part in (found if isinstance(found, list) else [found]) for x in _model(part, batch)]


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]  # query, key, value, output, log-sum-exp
    calls: _Calls
    policy: KVPolicy
    scale: float


class _SdpaTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> Tensor:
        copies, length, batch, _, width = query.shape
        kernel = SINGLE if length == 1 else causal_kernel(query.device, query.dtype, width)[0]
        first = max(0, copies - policy.repeat + 1)  # copies before it see originals alone: one, or none if pruned
        q, k, v = (_batch(x) for x in (query, key[:1], value[:1]))
        ctx.calls, found, lse = _Calls.forward(kernel, q, k, v, scale)
        lse = torch.cat(lse) if isinstance(lse, list) else lse
        lse[first:, :, length:] = float("inf")  # rows a vendor pads with must weigh nothing in its backward
        parts, out = _each(found, batch), _in_place(found, query)
        if out is None:
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
            for target, part in zip(out[:first], parts[:first], strict=True):
                target.copy_(part)
        rows = _lse_rows(lse[first:], batch, key.size(3), length)
        Window(policy, scale).forward(
            _grouped(query[first:], key),
            key[1:],
            value[1:],
            [x.unflatten(2, (key.size(3), -1)) for x in parts[first:]],
            list(rows),
            _grouped(out[first:], key),
            rows,
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.policy, ctx.scale = policy, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        copies, length, batch = query.shape[:3]
        first = max(0, copies - ctx.policy.repeat + 1)
        grad = dense(grad)
        g, q, k, v, o = (_batch(x) for x in (grad, query, key[:1], value[:1], out))
        dq, dk, dv = ctx.calls.backward(g, q, k, v, o, lse, ctx.scale)
        parts, query_grad = _each(dq, batch), _in_place(dq, query)
        if query_grad is None:
            query_grad = torch.empty_like(query, memory_format=torch.contiguous_format)
            for target, part in zip(query_grad[:first], parts[:first], strict=True):
                target.copy_(part)
        key_grad, value_grad = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
        for target, found in ((key_grad, dk), (value_grad, dv)):
            _add_up(found, target[0], batch)
        Window(ctx.policy, ctx.scale).backward(
            _grouped(grad[first:], key),
            _grouped(query[first:], key),
            key[1:],
            value[1:],
            _grouped(out[first:], key),
            _lse_rows(lse[first:], batch, key.size(3), length),
            [x.unflatten(2, (key.size(3), -1)) for x in parts[first:]],
            _grouped(query_grad[first:], key),
            key_grad[1:],
            value_grad[1:],
        )
        return query_grad, key_grad, value_grad, None, None


def _in_place(found: Copies, query: Tensor) -> Tensor | None:
    """What one call returned, where that is dense in the model's layout ``[copies, s, b, heads, d]``."""
    if isinstance(found, list):
        return None
    out = _model(found, query.size(2))
    return out if out.is_contiguous() else None


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """``[J, s, b, heads, d]`` as ``[J, s, b, groups, ratio, d]``."""
    return x.unflatten(3, (key.size(3), -1))


def _lse_rows(lse: Tensor, batch: int, groups: int, length: int) -> Tensor:
    """``[J, b * heads, >= s]`` as ``[J, s, b, groups, ratio]``."""
    return lse[..., :length].unflatten(1, (batch, groups, -1)).movedim(4, 1)


def _add_up(found: Copies, target: Tensor, batch: int) -> None:
    """Sum over copies ``[copies, b * groups, s, d]`` into ``target`` ``[s, b, groups, d]``, rounded once."""
    parts = _each(found, batch)
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=target)
    else:
        torch.sum(torch.stack(parts) if isinstance(found, list) else _model(found, batch), 0, out=target)
