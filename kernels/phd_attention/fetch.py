"""What a context-parallel rank needs of the others, as one differentiable step of autograd.

For forms of attention that compute with plain autograd, or by pieces: they fetch everything first. What stays on the
tape is what they keep, so whoever needs little of the other ranks' originals copies that little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.phd.kv_policy import Halo

from .exchange import ContextParallel, HaloGradients, HaloKeys, OriginalGradients, Originals


class Fetched(NamedTuple):
    """Keys and values, in this order in the first dimension.

    Attributes:
        key, value: this rank's ``[K, s_rank, b, g, d]``, as given.
        originals: of the whole sequence and in its order, ``[2, s, b, g, d]``.
        near: hidden ones before this rank's two slices, ``[2, width, K - 1, b, g, d]`` each.
    """

    key: Tensor
    value: Tensor
    originals: Tensor
    near: tuple[Tensor, Tensor]


def fetch(key: Tensor, value: Tensor, halos: Sequence[Halo], context: ContextParallel) -> Fetched:
    """Fetch for ``key`` and ``value [K, s_rank, b, g, d]``; collective, also in the backward.

    One step, whose first results every rank goes on with: its backward runs on all of them and sends in one order,
    whatever each of them saw.
    """
    first, second, originals, *near = _Fetch.apply(key, value, halos, context)
    return Fetched(first, second, originals, (near[0], near[1]))


class _Saved(FunctionCtx):
    halos: Sequence[Halo]
    context: ContextParallel


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved, key: Tensor, value: Tensor, halos: Sequence[Halo], context: ContextParallel
    ) -> tuple[Tensor, ...]:
        ctx.halos, ctx.context = halos, context
        coming = Originals(torch.stack([key[0], value[0]]), context)
        hidden = torch.stack([key[1:], value[1:]]).transpose(1, 2)  # [2, s_rank, K - 1, b, g, d]
        near = [x.squeeze(1).clone() for x in HaloKeys(hidden.unsqueeze(1), halos, context).wait()]
        return key.view_as(key), value.view_as(value), in_order(coming.everything()), *near

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        context, (key, value, originals, *near) = ctx.context, grads
        both = torch.stack([key, value])  # [2, K, s_rank, b, g, d]
        hidden = both[:, 1:].transpose(1, 2).contiguous().unsqueeze(1)
        HaloGradients([x.unsqueeze(1) for x in near], ctx.halos, context).add_to(hidden)
        both[:, 1:] = hidden.squeeze(1).transpose(1, 2)
        both[:, 0] += send_home(originals, context)
        return both[0], both[1], None, None


def send_home(gradients: Tensor, context: ContextParallel) -> Tensor:
    """Of the originals of this rank ``[2, s_rank, ...]``, added up; ``gradients [2, s, ...]`` are its own of all."""
    shares, homeward = _by_rank(gradients, context.size), OriginalGradients(context)
    for step in range(1, context.size):  # the order of a ring
        source = (context.rank - step) % context.size
        homeward.add(range(source, source + 1), shares[source : source + 1])
    return homeward.total(shares[context.rank].contiguous())


def in_order(by_rank: Tensor) -> Tensor:
    """``[size, 2, s_rank, ...]`` of ranks that hold zigzag slices to ``[2, s, ...]`` in the order of the sequence."""
    early, late = by_rank.chunk(2, 2)
    return torch.cat([early, late.flip(0)]).transpose(0, 1).flatten(1, 2)


def _by_rank(in_order: Tensor, size: int) -> Tensor:
    """Inverse of :func:`in_order`."""
    slices = in_order.unflatten(1, (2 * size, -1)).transpose(0, 1)  # [2 * size, 2, s_rank / 2, ...]
    return torch.cat([slices[:size], slices[size:].flip(0)], 2)
