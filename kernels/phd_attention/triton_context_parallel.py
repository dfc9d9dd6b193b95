"""The fused Triton kernels over a sequence that is spread over context-parallel ranks.

The kernel takes the positions of a rank's two zigzag slices as numbers, so one launch covers all originals, gathered
and put in the order of the sequence, and both hidden windows with their halos; nothing is merged. Originals of other
ranks are fetched a second time for the backward, because keeping them would need the memory of the whole sequence in
every layer. With ``p2p`` the ring is waited for before the kernel starts, so nothing overlaps: ``sdpa`` does that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.phd.kv_policy import Halo, KVPolicy

from .exchange import ContextParallel, HaloGradients, HaloKeys, Originals
from .fetch import in_order, send_home
from .folding import unit_stride
from .triton import Keys, Problem, Rows, launch_backward, launch_forward


def triton_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    context: ContextParallel,
    *,
    scale: float | None = None,
) -> Tensor:
    """This rank's queries over the whole sequence. Shapes and errors as :func:`sdpa_context_parallel`'s."""
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return _TritonRanks.apply(query, key, value, policy, context, scale)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]  # query, own originals, hidden keys with halos, output, log-sum-exp
    problem: Problem
    context: ContextParallel
    halos: Sequence[Halo]


class _TritonRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        policy: KVPolicy,
        context: ContextParallel,
        scale: float,
    ) -> Tensor:
        length = key.size(1) * context.size
        slices = policy.context_parallel_slices(length, context.size, context.rank)
        halos = policy.halos(length, context.size)
        own = torch.stack([key[0], value[0]])  # [2, s_rank, b, g, d]
        originals = Originals(own, context)
        widths: tuple[int, ...] = (0, 0)
        hidden = own[:, None]  # not read with one copy
        if policy.repeat > 1:
            local = torch.stack([key[1:], value[1:]]).transpose(1, 2).contiguous()  # [2, s_rank, K - 1, b, g, d]
            near = HaloKeys(local.unsqueeze(1), halos, context).wait()
            hidden, widths = _with_halos(local, [x.squeeze(1) for x in near])
        query = unit_stride(query)
        rows = Rows(len(slices[0]), tuple(part.start for part in slices), widths)
        problem = Problem.of(query, key.size(3), policy, rows, scale)
        keys = _keys(in_order(originals.everything()), hidden)
        out, lse = launch_forward(query, keys, problem)
        ctx.save_for_backward(query, own, hidden, out, lse)
        ctx.problem, ctx.context, ctx.halos = problem, context, halos
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, own, hidden, out, lse = ctx.saved_tensors
        problem = ctx.problem
        context, repeat, half = ctx.context, problem.policy.repeat, problem.rows.length
        everything = in_order(Originals(own, context).everything())
        grads = torch.empty_like(everything), torch.empty_like(hidden)
        into = _keys(*grads)
        query_grad = launch_backward(grad, query, _keys(everything, hidden), out, lse, into, problem)
        both = own.new_empty(2, repeat, *own.shape[1:])
        if repeat > 1:
            first, second = problem.rows.halos
            parts = grads[1].split([first, half, second, half], 1)
            found = torch.cat([parts[1], parts[3]], 1).unsqueeze(1)  # [2, 1, s_rank, K - 1, b, g, d]
            HaloGradients([parts[0].unsqueeze(1), parts[2].unsqueeze(1)], ctx.halos, context).add_to(found)
            both[:, 1:] = found.squeeze(1).transpose(1, 2)
        both[:, 0] = send_home(grads[0], context)
        return query_grad, both[0], both[1], None, None, None


def triton_tail(
    query: Tensor, originals: Tensor, hidden: Tensor, policy: KVPolicy, *, scale: float | None = None
) -> Tensor:
    """The last tokens of a document over all of it. Shapes as :func:`.reference_context_parallel.reference_tail`'s."""
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return _TritonTail.apply(query, originals, hidden, policy, scale)


class _TritonTail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved, query: Tensor, originals: Tensor, hidden: Tensor, policy: KVPolicy, scale: float
    ) -> Tensor:
        query, rows = unit_stride(query), query.size(1)
        originals, hidden = originals.contiguous(), hidden.contiguous()
        place = Rows(rows, (originals.size(1) - rows,), (hidden.size(1) - rows,))
        problem = Problem.of(query, originals.size(3), policy, place, scale)
        out, lse = launch_forward(query, _keys_of(originals, hidden), problem)
        ctx.save_for_backward(query, originals, hidden, out, lse)
        ctx.problem = problem
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, originals, hidden, out, lse = ctx.saved_tensors
        grads = torch.empty_like(originals), torch.empty_like(hidden)
        keys, into = _keys_of(originals, hidden), _keys_of(*grads)
        return launch_backward(grad, query, keys, out, lse, into, ctx.problem), *grads, None, None


def _keys_of(originals: Tensor, hidden: Tensor) -> Keys:
    """With one copy the hidden ones are never read, and originals stand for them."""
    return _keys(originals, hidden if hidden.size(2) else originals[:, :, None])


def _keys(originals: Tensor, hidden: Tensor) -> Keys:
    """Originals ``[2, s, b, g, d]`` and hidden ``[2, rows, K - 1, b, g, d]`` as the kernels take them."""
    key, value = originals.unsqueeze(1)
    hidden_key, hidden_value = hidden.transpose(1, 2)
    return Keys(key, value, hidden_key, hidden_value)


def _with_halos(local: Tensor, near: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Hidden rows of both slices, each behind its halo, and the halos' widths."""
    early, late = local.chunk(2, 1)
    return torch.cat([near[0], early, near[1], late], 1), tuple(x.size(1) for x in near)
