"""The definition of PHD attention over context-parallel ranks: one dense mask over global positions, plain autograd.

What travels is what :mod:`.sdpa_context_parallel` sends; it is put together here before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.phd.kv_policy import Halo, KVPolicy

from .exchange import ContextParallel, HaloGradients, HaloKeys, OriginalGradients, Originals


def reference_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    context: ContextParallel,
    *,
    scale: float | None = None,
) -> Tensor:
    """As :func:`sdpa_context_parallel`, with one dense mask over global positions and plain autograd."""
    copies, rows, _, heads, width = query.shape
    repeat, groups, size = policy.repeat, key.size(3), context.size
    scale = width**-0.5 if scale is None else scale
    length = rows * size
    slices = [policy.context_parallel_slices(length, size, rank) for rank in range(size)]
    mine = [n for part in slices[context.rank] for n in part]
    everyone = [n for parts in slices for part in parts for n in part]
    originals = torch.stack([key[0], value[0]]).transpose(1, 2)  # [2, b, s_rank, g, d]
    gathered = _GatherOriginals.apply(originals.contiguous(), context)  # [size, 2, b, s_rank, g, d]
    keys = [gathered.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)]  # [2, b, s, g, d]
    position, copy = [everyone], [[1] * length]
    if repeat > 1:
        halos = policy.halos(length, size)
        hidden = torch.stack([key[1:], value[1:]]).permute(0, 3, 2, 1, 4, 5)  # [2, b, s_rank, i, g, d]
        hidden, *near = _FetchHalos.apply(hidden.contiguous(), halos, context)
        held = [(hidden, mine)]
        for halo in halos:
            if halo.receiver == context.rank != halo.sender:
                held.append((near[0 if halo.slice == context.rank else 1], list(halo.positions)))
        for tensor, places in held:
            keys.append(tensor.flatten(2, 3))
            position.append([n for n in places for _ in range(repeat - 1)])
            copy.append(list(range(2, repeat + 1)) * len(places))
    device = query.device
    key_position, key_copy = (torch.tensor([*chain(*lists)], device=device) for lists in (position, copy))
    query_position = torch.tensor(mine, device=device).repeat(copies)[:, None]
    query_copy = torch.arange(repeat - copies + 1, repeat + 1, device=device).repeat_interleave(rows)[:, None]
    mask = policy.visible(query_position, query_copy, key_position, key_copy)  # [Kq*s_rank, keys]
    all_keys, all_values = torch.cat(keys, 2)  # [b, keys, g, d]
    q = query.flatten(0, 1).unflatten(2, (groups, heads // groups))  # [Kq*s_rank, b, g, r, d]
    scores = torch.einsum("qbgrd,bkgd->bgrqk", q, all_keys) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bgrqk,bkgd->qbgrd", weights, all_values).reshape(query.shape)


class _Saved(FunctionCtx):
    context: ContextParallel
    halos: Sequence[Halo]


class _GatherOriginals(torch.autograd.Function):
    """``[2, ...]`` of every rank, by rank; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: _Saved, own: Tensor, context: ContextParallel) -> Tensor:
        ctx.context = context
        return Originals(own, context).everything()

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        context, homeward = ctx.context, OriginalGradients(ctx.context)
        for step in range(1, context.size):  # the order of a ring
            source = (context.rank - step) % context.size
            homeward.add(range(source, source + 1), grad[source : source + 1])
        return homeward.total(grad[context.rank].contiguous()), None


class _FetchHalos(torch.autograd.Function):
    """``hidden`` itself and what :class:`HaloKeys` brings for both slices.

    Gradients go back to where the positions are held. ``hidden`` passes through, so that the backward of a rank that
    sees no halo runs all the same and receives what others found.
    """

    @staticmethod
    def forward(ctx: _Saved, hidden: Tensor, halos: Sequence[Halo], context: ContextParallel) -> tuple[Tensor, ...]:
        ctx.halos, ctx.context = halos, context
        return hidden.clone(), *(x.clone() for x in HaloKeys(hidden, halos, context).wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, own: Tensor, *near: Tensor) -> tuple[Tensor | None, ...]:
        gradient = own.clone(memory_format=torch.contiguous_format)
        HaloGradients(near, ctx.halos, ctx.context).add_to(gradient)
        return gradient, None, None
