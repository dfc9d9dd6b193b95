"""The last tokens of a document over all of it, merged of the parts of :mod:`.sdpa_context_parallel`.

That is what a context-parallel slice has of a document that began in an earlier one: its tokens are plainly causal
among themselves, see all originals before them without a mask, and hidden keys through the window, with a halo.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.phd.kv_policy import KVPolicy

from .causal import Block
from .folding import as_heads, as_rows, fold_queries, unfold_queries
from .sdpa_context_parallel import SliceWindow, TorchWindow, merge


def sdpa_tail(
    query: Tensor, originals: Tensor, hidden: Tensor, policy: KVPolicy, *, scale: float | None = None
) -> Tensor:
    """Shapes as :func:`.reference_context_parallel.reference_tail`'s."""
    return attend_tail(query, originals, hidden, policy, scale, TorchWindow)


def attend_tail(
    query: Tensor,
    originals: Tensor,
    hidden: Tensor,
    policy: KVPolicy,
    scale: float | None,
    window: type[SliceWindow],
) -> Tensor:
    """:func:`sdpa_tail` with part (b) by ``window``."""
    scale = query.size(-1) ** -0.5 if scale is None else scale
    rows = query.size(1)
    part = window(policy, scale, originals.size(1) - rows, hidden.size(1) - rows)
    return _Tail.apply(query, originals, hidden, part, scale)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]  # queries, originals and hidden keys, folded; output, log-sum-exp
    blocks: tuple[Block, Block]
    scale: float
    window: SliceWindow


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved, query: Tensor, originals: Tensor, hidden: Tensor, window: SliceWindow, scale: float
    ) -> Tensor:
        copies, rows, batch, _, _ = query.shape
        keys = originals.permute(0, 2, 3, 1, 4).flatten(1, 2)  # [2, G, m + n, d]
        near = hidden.permute(0, 3, 4, 1, 2, 5).flatten(1, 2).contiguous()  # [2, G, halo + n, K - 1, d]
        q_rows = fold_queries(query, originals.size(3))
        q = as_heads(q_rows)  # [G, Kq*r, n, d]
        earlier, own = _parts(keys, rows)
        out, lse, first = Block.run(q, own, scale, causal=True)
        found, found_lse, second = Block.run(q, earlier, scale, causal=False)
        out = out.to(torch.promote_types(q.dtype, torch.float32))
        merge(out, lse, found, found_lse)
        if near.size(3):
            where, out_rows, lse_rows = _hidden(copies, near), as_rows(out, copies), as_rows(lse, copies)
            window.merge(q_rows[where], near[0], near[1], out_rows[where], lse_rows[where])
        result = unfold_queries(as_rows(out.to(q.dtype), copies), batch)
        ctx.save_for_backward(q, keys, near, result, lse)
        ctx.blocks, ctx.scale, ctx.window = (first, second), scale, window
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, near, result, lse = ctx.saved_tensors
        copies, rows, batch, _, _ = result.shape
        groups = keys.size(1) // batch
        out_rows, grad_rows = fold_queries(result, groups), fold_queries(grad, groups)
        out, gradient = as_heads(out_rows), as_heads(grad_rows)
        earlier, own = _parts(keys, rows)
        first, second = ctx.blocks
        dq, *local = first.backward(gradient, q, own, out, lse, ctx.scale)
        more, *before = second.backward(gradient, q, earlier, out, lse, ctx.scale)
        dq = dq.to(torch.promote_types(q.dtype, torch.float32)) + more
        dhidden = torch.zeros_like(near)
        if near.size(3):
            where = _hidden(copies, near)
            found = ctx.window.gradients(
                *(grad_rows[where], as_rows(q, copies)[where], near[0], near[1], out_rows[where]),
                *(as_rows(lse, copies)[where], as_rows(dq, copies)[where]),
            )
            dhidden = torch.stack([x.to(near.dtype) for x in found])
        both = torch.stack([torch.cat(parts, 2).squeeze(1) for parts in zip(before, local, strict=True)])
        doriginals = both.unflatten(1, (batch, groups)).permute(0, 3, 1, 2, 4)  # [2, m + n, b, g, d]
        dnear = dhidden.unflatten(1, (batch, groups)).permute(0, 3, 4, 1, 2, 5)  # [2, halo + n, K - 1, b, g, d]
        return unfold_queries(as_rows(dq.to(q.dtype), copies), batch), doriginals, dnear, None, None


def _parts(keys: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values before the last ``rows``, and these: ``[2, G, 1, ..., d]``."""
    before = keys.size(2) - rows
    return keys[:, :, :before].unsqueeze(2).contiguous(), keys[:, :, before:].unsqueeze(2).contiguous()


def _hidden(copies: int, near: Tensor) -> tuple[slice, slice, slice]:
    """The hidden queries of ``[G, rows, Kq, ...]``."""
    return slice(None), slice(None), slice(max(0, copies - near.size(3)), None)
