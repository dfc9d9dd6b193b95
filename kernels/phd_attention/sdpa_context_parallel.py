"""PHD attention over a sequence that is spread over context-parallel ranks.

A rank holds two zigzag slices of the sequence (:meth:`KVPolicy.context_parallel_slices`), one early and one late, so
that causal work is balanced. Only originals' keys and values go to every rank; hidden ones stay, except a halo of at
most ``W - 1`` positions for the slice that follows. Every query row is then the log-sum-exp merge of

- causal attention over the originals of its own rank: the two slices in a row, since the late one sees the early one;
- attention without a mask over blocks of other ranks' originals (:meth:`KVPolicy.original_block`): zigzag order leaves
  no partly masked block between two ranks, and so no need for more than the kernels that a single rank uses;
- hidden queries over hidden keys, slice by slice, with the halo before the slice.

The backward runs each part with the merged output and the merged log-sum-exp, as in ring attention. Originals of other
ranks are fetched a second time then, because keeping them would need the memory of the whole sequence in every layer.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from phd_megatron.phd.kv_policy import KVPolicy

from .causal import Block
from .exchange import ContextParallel, HaloGradients, HaloKeys, OriginalGradients, Originals
from .folding import as_heads, as_rows, fold_keys, fold_queries, unfold_keys, unfold_queries
from .local import Blocks, local_backward, local_forward, local_plan


def sdpa_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    context: ContextParallel,
    *,
    scale: float | None = None,
) -> Tensor:
    """PHD attention of this rank's queries over the whole sequence, with gradients for every rank's keys.

    Args:
        query: ``[Kq, s_rank, b, heads, d]``, the last ``Kq`` of the ``K`` copies; the two slices one after the other.
        key, value: ``[K, s_rank, b, groups, d]``, originals first.
        policy: repeat ``K``, window and chunk.
        context: the ranks that share the sequence and how they exchange.
        scale: factor on the scores, default ``d ** -0.5``.

    Returns:
        ``[Kq, s_rank, b, heads, d]``, contiguous.

    Raises:
        ValueError: if ``policy`` cannot be exact on slices of this length.
    """
    return attend_over_ranks(query, key, value, policy, context, scale, TorchWindow)


class SliceWindow(Protocol):
    """Part (b) of one slice: hidden queries over hidden keys, with ``halo`` positions of keys before the slice.

    Tensors are folded: queries ``[G, rows, J, r, d]``, keys ``[G, halo + rows, K - 1, d]``.
    """

    def __init__(self, policy: KVPolicy, scale: float, start: int, halo: int) -> None: ...

    def merge(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
        """Make ``out`` and ``lse [G, rows, J, r]`` those of the union with the hidden keys, in place."""

    def gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, query_grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dk and dv of the hidden keys; dq is added to ``query_grad``."""


class TorchWindow(NamedTuple):
    """:class:`SliceWindow` in plain torch."""

    policy: KVPolicy
    scale: float
    start: int
    halo: int

    def _plan(self, query: Tensor) -> Blocks | None:
        return local_plan(self.policy, query.size(1), self.start, self.halo)

    def merge(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor) -> None:
        found, total, top = local_forward(query, key, value, self._plan(query), self.scale)
        merge(out, lse, found / total, (total.log() + top).squeeze(-1))

    def gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, query_grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.promote_types(query.dtype, torch.float32)
        delta = (grad.to(accumulate) * out.to(accumulate)).sum(-1, keepdim=True)
        more, key_grad, value_grad = local_backward(
            grad, query, key, value, lse.unsqueeze(-1), delta, self._plan(query), self.scale
        )
        query_grad += more
        return key_grad, value_grad


def attend_over_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    context: ContextParallel,
    scale: float | None,
    window: type[SliceWindow],
) -> Tensor:
    """:func:`sdpa_context_parallel` with part (b) by ``window``."""
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return _ContextParallelAttention.apply(query, key, value, policy, context, scale, window)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]  # queries, own originals, output, log-sum-exp; hidden keys and halos, if any
    shape: _Shape
    blocks: list[Block]
    context: ContextParallel
    scale: float
    window: type[SliceWindow]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...  # None may be among them


class _ContextParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        policy: KVPolicy,
        context: ContextParallel,
        scale: float,
        window: type[SliceWindow],
    ) -> Tensor:
        copies, rows, batch, _, _ = query.shape
        shape = _Shape(policy, context, rows)
        own = torch.stack([fold_keys(x[:1]).squeeze(2) for x in (key, value)])  # [2, G, s_rank, d]
        originals = Originals(own, context)
        hidden = near = None
        if policy.repeat > 1:
            hidden = torch.stack([fold_keys(x[1:]) for x in (key, value)])  # [2, G, s_rank, i, d]
            halo = HaloKeys(hidden, shape.halos, context)
        q_rows = fold_queries(query, key.size(3))  # [G, s_rank, Kq, r, d]
        q = as_heads(q_rows)  # [G, Kq*r, s_rank, d]
        context.note("compute", 0)
        out, lse, block = Block.run(q, own.unsqueeze(2), scale, causal=True)
        blocks = [block]
        out = out.to(torch.promote_types(q.dtype, torch.float32))
        if hidden is not None:
            near = halo.wait()
            out_rows, lse_rows = as_rows(out, copies), as_rows(lse, copies)
            for index, part in enumerate(shape.parts):
                where = shape.hidden_queries(index, copies)
                keys, values = torch.cat([near[index], hidden[:, :, part]], 2)  # [G, halo + s_rank/2, i, d]
                local = window(policy, scale, shape.slices[index].start, near[index].size(2))
                local.merge(q_rows[where], keys, values, out_rows[where], lse_rows[where])
        for step, (sources, kv) in enumerate(originals, start=1):
            context.note("compute", step)
            first, stop = shape.block(sources)
            late, both = q[:, :, first:].contiguous(), _block_keys(kv, stop)
            found, found_lse, block = Block.run(late, both, scale, causal=False)
            blocks.append(block)
            merge(out[:, :, first:], lse[:, :, first:], found, found_lse)
        result = unfold_queries(as_rows(out.to(q.dtype), copies), batch)
        ctx.save_for_backward(q, own, result, lse, hidden, *(near or ()))
        ctx.shape, ctx.blocks, ctx.context, ctx.scale, ctx.window = shape, blocks, context, scale, window
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, own, result, lse, hidden, *near = ctx.saved_tensors
        shape, blocks, context, scale = ctx.shape, ctx.blocks, ctx.context, ctx.scale
        copies, _, batch, _, _ = result.shape
        groups = own.size(1) // batch
        originals, homeward = Originals(own, context), OriginalGradients(context)
        out_rows, grad_rows = fold_queries(result, groups), fold_queries(grad, groups)
        out, gradient = as_heads(out_rows), as_heads(grad_rows)
        context.note("compute", 0)
        dq, dk, dv = blocks[0].backward(gradient, q, own.unsqueeze(2), out, lse, scale)
        accumulate = torch.promote_types(q.dtype, torch.float32)
        dq = dq.to(accumulate)
        if hidden is not None:
            dhidden, dnear = [], []
            for index, part in enumerate(shape.parts):
                where = shape.hidden_queries(index, copies)
                keys, values = torch.cat([near[index], hidden[:, :, part]], 2)
                halo = near[index].size(2)
                local = ctx.window(shape.policy, scale, shape.slices[index].start, halo)
                near_grads = local.gradients(
                    *(grad_rows[where], as_rows(q, copies)[where], keys, values, out_rows[where]),
                    *(as_rows(lse, copies)[where], as_rows(dq, copies)[where]),
                )
                both = torch.stack([x.to(q.dtype) for x in near_grads])  # [2, G, halo + s_rank/2, i, d]
                dnear.append(both[:, :, :halo])
                dhidden.append(both[:, :, halo:])
            returning = HaloGradients(dnear, shape.halos, context)
        for step, ((sources, kv), block) in enumerate(zip(originals, blocks[1:], strict=True), start=1):
            context.note("compute", step)
            first, stop = shape.block(sources)
            q_part, out_part, grad_part, lse_part = (x[:, :, first:].contiguous() for x in (q, out, gradient, lse))
            more, *rest = block.backward(grad_part, q_part, _block_keys(kv, stop), out_part, lse_part, scale)
            dq[:, :, first:] += more
            homeward.add(sources, _block_gradients(rest, kv, stop))
        doriginals = homeward.total(torch.stack([dk, dv]).squeeze(2)).unsqueeze(3)  # [2, G, s_rank, 1, d]
        both = doriginals
        if hidden is not None:
            gathered = torch.cat(dhidden, 2)
            returning.add_to(gathered)
            both = torch.cat([doriginals, gathered], 3)  # [2, G, s_rank, K, d]
        dkey, dvalue = (unfold_keys(x, batch) for x in both)
        dquery = unfold_queries(as_rows(dq.to(q.dtype), copies), batch)
        return dquery, dkey, dvalue, None, None, None, None


class _Shape:
    """How this rank's rows lie in the sequence."""

    def __init__(self, policy: KVPolicy, context: ContextParallel, rows: int) -> None:
        length = rows * context.size
        self.policy, self.rank, self.half = policy, context.rank, rows // 2
        self.slices = policy.context_parallel_slices(length, context.size, context.rank)
        self.halos = policy.halos(length, context.size)
        self.parts = (slice(0, self.half), slice(self.half, rows))  # rows of the two slices

    def hidden_queries(self, index: int, copies: int) -> tuple[slice, slice, slice]:
        """Rows and copies of the hidden queries of one slice in a ``[G, s_rank, Kq, ...]`` tensor."""
        return slice(None), self.parts[index], slice(max(0, copies - self.policy.repeat + 1), None)

    def block(self, sources: range) -> tuple[int, int]:
        """(first query row, key rows of each source) of the block that this rank sees of ``sources``."""
        first, stop = self.policy.original_block(self.rank, sources[0])
        return first * self.half, stop * self.half


def _block_keys(kv: Tensor, stop: int) -> Tensor:
    """``[sources, 2, G, s_rank, d]`` to key and value ``[2, G, 1, sources * stop, d]``."""
    return kv[:, :, :, :stop].permute(1, 2, 0, 3, 4).flatten(2, 3).unsqueeze(2)


def _block_gradients(found: list[Tensor], kv: Tensor, stop: int) -> Tensor:
    """Inverse of :func:`_block_keys` for dk and dv ``[G, 1, sources * stop, d]``; zero for keys that are not seen."""
    both = torch.stack(found).squeeze(2).unflatten(2, (kv.size(0), stop))  # [2, G, sources, stop, d]
    return pad(both.permute(2, 0, 1, 3, 4), [0, 0, 0, kv.size(3) - stop])


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Make ``out [..., d]`` and ``lse [...]`` those of the union with a further set of keys, in place."""
    merged = torch.logaddexp(lse, more_lse)
    out.mul_((lse - merged).exp().unsqueeze(-1)).addcmul_(
        more.to(out.dtype), (more_lse - merged).exp().unsqueeze(-1).to(out.dtype)
    )
    lse.copy_(merged)
