"""PHD attention as two ordinary attentions, merged by log-sum-exp.

Eq. 2 of PHD-Transformer (arXiv 2504.14992) splits into

- part (a): every copy's query over the originals, causal by position. With the copies folded into the query heads
  this is plain causal attention with ``K`` times the heads and the same keys, so any flash kernel runs it unmasked;
- part (b): hidden queries over hidden keys, which is local: one token (``W = 1``), a chunk, or a sliding window.

Each query row has one softmax over both parts. Its output is the average of the parts weighted by their sums of
exponentials; in the backward each part runs alone with the *merged* output and the *merged* log-sum-exp, which is
exact (as in ring attention): ``p = exp(s - lse)`` and ``ds = p * (dp - rowsum(dout * out))`` need nothing else.

Needs torch alone, since it also ships inside an exported Hugging Face model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .causal import SINGLE, Call, CausalKernel, Extra, Three, causal_kernel
from .folding import as_heads, as_rows, dense, fold_keys, fold_queries, unfold_keys, unfold_queries
from .local import local_backward, local_forward, local_plan

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, *, scale: float | None = None
) -> Tensor:
    """PHD attention over whole sequences, positions ``0..s-1``, with gradients.

    Args:
        query: ``[Kq, s, b, heads, d]``, the last ``Kq`` of the ``K`` copies (``Kq = K``; 1 in a pruned last layer).
        key, value: ``[K, s, b, groups, d]``, originals first. Head ``h`` uses group ``h // (heads / groups)``.
            All may have any strides: a batch-first caller passes permuted views.
        policy: repeat ``K``, window and chunk. Padded batches are the caller's business: no row is skipped here.
        scale: factor on the scores, default ``d ** -0.5``.

    Returns:
        ``[Kq, s, b, heads, d]``; contiguous when ``K > 1``.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return _PHDAttention.apply(query, key, value, policy, scale)


def _vanilla(query: Tensor, key: Tensor, value: Tensor) -> Three:
    """``[1, s, b, heads, d]`` as ``[b, heads, s, d]``.

    A CPU reads keys and values once for every block of queries, and sequence-first rows of a batch lie so far apart
    that they push each other out of its cache: a copy there pays for itself about ten times over.
    """
    q, k, v = (x[0].permute(1, 2, 0, 3) for x in (query, key, value))
    if query.device.type == "cpu":
        return dense(q), k.contiguous(), v.contiguous()
    return dense(q), dense(k), dense(v)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]  # queries as part (a) takes them, key, value, output, log-sum-exp
    extra: Extra
    kernel: CausalKernel
    policy: KVPolicy
    scale: float


class _PHDAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> Tensor:
        copies, length, batch, _, width = query.shape
        kernel = SINGLE if length == 1 else causal_kernel(query.device, query.dtype, width)[0]
        if policy.repeat == 1:  # vanilla: views in, a view out
            q, key, value = _vanilla(query, key, value)
            out, lse, extra = kernel.forward(q, key, value, scale, True)
            result = out.permute(2, 0, 1, 3).unsqueeze(0)
        else:
            q_rows = fold_queries(query, key.size(3))
            k, v = (fold_keys(x[:1]).transpose(1, 2) for x in (key, value))
            q = as_heads(q_rows)
            out, lse, extra = kernel.forward(q, k, v, scale, True)
            hidden = slice(max(0, copies - policy.repeat + 1), None)
            if hidden.start < copies:
                _merge(as_rows(out, copies), as_rows(lse[..., :length], copies), q_rows, key, value, policy, scale)
            result = unfold_queries(as_rows(out, copies), batch)
        ctx.save_for_backward(q, key, value, result, lse)
        ctx.extra, ctx.kernel, ctx.policy, ctx.scale = extra, kernel, policy, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, key, value, result, lse = ctx.saved_tensors
        policy, scale, kernel, extra = ctx.policy, ctx.scale, ctx.kernel, ctx.extra
        if policy.repeat == 1:
            out, gradient = result[0].permute(1, 2, 0, 3), dense(grad[0].permute(1, 2, 0, 3))
            grads = kernel.backward(gradient, Call(q, key, value, out, lse, extra, scale))
            return *(x.permute(2, 0, 1, 3).unsqueeze(0) for x in grads), None, None
        copies, length, batch, _, _ = result.shape
        groups, hidden = key.size(3), slice(max(0, copies - policy.repeat + 1), None)
        out_rows, grad_rows = fold_queries(result, groups), fold_queries(grad, groups)
        k, v = (fold_keys(x[:1]).transpose(1, 2) for x in (key, value))
        dq, dk, dv = kernel.backward(as_heads(grad_rows), Call(q, k, v, as_heads(out_rows), lse, extra, scale))
        dq_rows, q_rows = as_rows(dq, copies)[:, :, hidden], as_rows(q, copies)[:, :, hidden]
        grad_rows, out_rows = grad_rows[:, :, hidden], out_rows[:, :, hidden]
        total = as_rows(lse[..., :length], copies)[:, :, hidden].unsqueeze(-1)
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        delta = (grad_rows.to(accumulate) * out_rows.to(accumulate)).sum(-1, keepdim=True)
        plan = local_plan(policy, length)
        inputs = (grad_rows, q_rows, fold_keys(key[1:]), fold_keys(value[1:]), total, delta)
        more, dk_hidden, dv_hidden = local_backward(*inputs, plan, scale)
        dq_rows += more
        dkey, dvalue = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
        for target, first, rest in ((dkey, dk, dk_hidden), (dvalue, dv, dv_hidden)):
            target[:1] = unfold_keys(first.transpose(1, 2), batch)
            target[1:] = unfold_keys(rest, batch)
        return unfold_queries(as_rows(dq, copies), batch), dkey, dvalue, None, None


def _merge(out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> None:
    """Add part (b) to the hidden rows of part (a)'s ``out [G, s, Kq, r, d]`` and ``lse [G, s, Kq, r]``, in place."""
    hidden = slice(max(0, query.size(2) - policy.repeat + 1), None)
    out, lse, q = out[:, :, hidden], lse[:, :, hidden].unsqueeze(-1), query[:, :, hidden]
    k, v = fold_keys(key[1:]), fold_keys(value[1:])
    plan = local_plan(policy, q.size(1))
    local, local_sum, local_top = local_forward(q, k, v, plan, scale)
    merged = torch.logaddexp(lse, local_sum.log() + local_top)
    mixed = (local_top - merged).exp() * local
    out.copy_(mixed.addcmul_(out.to(mixed.dtype), (lse - merged).exp()))
    lse.copy_(merged)
