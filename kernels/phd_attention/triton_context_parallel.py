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

from .exchange import ContextParallel, HaloGradients, HaloKeys, OriginalGradients, Originals
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
        keys = _keys(_in_order(originals.everything()), hidden)
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
        everything = _in_order(Originals(own, context).everything())
        grads = torch.empty_like(everything), torch.empty_like(hidden)
        into = _keys(*grads)
        query_grad = launch_backward(grad, query, _keys(everything, hidden), out, lse, into, problem)
        by_rank, homeward = _by_rank(grads[0], context.size), OriginalGradients(context)
        both = own.new_empty(2, repeat, *own.shape[1:])
        if repeat > 1:
            first, second = problem.rows.halos
            parts = grads[1].split([first, half, second, half], 1)
            found = torch.cat([parts[1], parts[3]], 1).unsqueeze(1)  # [2, 1, s_rank, K - 1, b, g, d]
            HaloGradients([parts[0].unsqueeze(1), parts[2].unsqueeze(1)], ctx.halos, context).add_to(found)
            both[:, 1:] = found.squeeze(1).transpose(1, 2)
        for step in range(1, context.size):  # the order of a ring
            source = (context.rank - step) % context.size
            homeward.add(range(source, source + 1), by_rank[source : source + 1])
        both[:, 0] = homeward.total(by_rank[context.rank].contiguous())
        return query_grad, both[0], both[1], None, None, None


def _keys(originals: Tensor, hidden: Tensor) -> Keys:
    """Originals ``[2, s, b, g, d]`` and hidden ``[2, rows, K - 1, b, g, d]`` as the kernels take them."""
    key, value = originals.unsqueeze(1)
    hidden_key, hidden_value = hidden.transpose(1, 2)
    return Keys(key, value, hidden_key, hidden_value)


def _with_halos(local: Tensor, near: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Hidden rows of both slices, each behind its halo, and the halos' widths."""
    early, late = local.chunk(2, 1)
    return torch.cat([near[0], early, near[1], late], 1), tuple(x.size(1) for x in near)


def _in_order(by_rank: Tensor) -> Tensor:
    """``[size, 2, s_rank, ...]`` of ranks that hold zigzag slices to ``[2, s, ...]`` in the order of the sequence."""
    early, late = by_rank.chunk(2, 2)
    return torch.cat([early, late.flip(0)]).transpose(0, 1).flatten(1, 2)


def _by_rank(in_order: Tensor, size: int) -> Tensor:
    """Inverse of :func:`_in_order`."""
    slices = in_order.unflatten(1, (2 * size, -1)).transpose(0, 1)  # [2 * size, 2, s_rank / 2, ...]
    return torch.cat([slices[:size], slices[size:].flip(0)], 2)
