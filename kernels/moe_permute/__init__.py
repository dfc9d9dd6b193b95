"""Sort rows by the expert that computes them, and add up what the experts of a row give back.

Where every row goes to as many experts, the number of sorted rows is known beforehand. So nothing here waits for the
host: the order follows from sums over the routing map, and rows are gathered in both directions, forward and backward,
without atomic additions. :func:`permute_reference` and :func:`unpermute_reference` are the definitions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.kernels.triton_support import runs_on_gpu


class Order(NamedTuple):
    """Where rows go: R = T * k sorted rows of T tokens with k experts each.

    Attributes:
        source: ``[R]`` int64, the token of each sorted row. Within an expert tokens keep their order.
        places: ``[T, k]`` int64, the sorted rows of each token, by ascending expert.
        experts: ``[T, k]`` int64, their experts.
        counts: ``[E]`` int64, the rows of each expert.
    """

    source: Tensor
    places: Tensor
    experts: Tensor
    counts: Tensor


def order_by_expert(routing_map: Tensor, topk: int) -> Order:
    """The order of ``[T, E]``, boolean, with exactly ``topk`` entries set in each row."""
    tokens, experts = routing_map.shape
    total = tokens * topk
    by_expert = routing_map.T.reshape(-1)  # [E*T]
    rows = by_expert.cumsum(0)  # 1-based, where set
    # What is not set goes to a row (a column) that is cut off.
    token = torch.arange(tokens, device=routing_map.device).expand(experts, tokens).reshape(-1)
    source = token.new_zeros(total + 1).scatter_(0, torch.where(by_expert, rows - 1, total), token)[:total]
    rank = torch.where(routing_map, routing_map.cumsum(1) - 1, topk)  # [T, E]
    places = rows.new_zeros(tokens, topk + 1).scatter_(1, rank, rows.view(experts, tokens).T - 1)[:, :topk]
    expert = torch.arange(experts, device=routing_map.device).expand(tokens, experts)
    chosen = expert.new_zeros(tokens, topk + 1).scatter_(1, rank, expert)[:, :topk]
    return Order(source, places.contiguous(), chosen.contiguous(), routing_map.sum(0))


def permute(rows: Tensor, order: Order) -> Tensor:
    """``[T, h]`` to ``[R, h]``: every token once for each of its experts, sorted by expert."""
    return _Move.apply(rows, order.source, order.places, False)


def permute_weights(weights: Tensor, order: Order) -> Tensor:
    """``[T, E]`` to ``[R]``: the weight of each sorted row."""
    return _PermuteWeights.apply(weights, order.experts, order.places)


def unpermute(rows: Tensor, order: Order) -> Tensor:
    """``[R, h]`` to ``[T, h]``: the sum of the rows of each token, in float32, rounded once."""
    return _Move.apply(rows, order.source, order.places, True)


def permute_reference(rows: Tensor, routing_map: Tensor) -> Tensor:
    """:func:`permute` through ordinary operations; the host reads how many rows there are."""
    return rows[routing_map.T.nonzero()[:, 1]]


def unpermute_reference(rows: Tensor, routing_map: Tensor) -> Tensor:
    """:func:`unpermute` through ordinary operations."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(len(routing_map), rows.size(1), dtype=wide, device=rows.device)
    return out.index_add(0, routing_map.T.nonzero()[:, 1], rows.to(wide)).to(rows.dtype)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    shape: torch.Size
    back: bool


class _Move(torch.autograd.Function):
    """Tokens to sorted rows, or ``back``: each is the gradient of the other."""

    @staticmethod
    def forward(ctx: _Saved, rows: Tensor, source: Tensor, places: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(source, places)
        ctx.back = back
        return _gather_sum(rows, places) if back else _gather(rows, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, None, None, None]:
        source, places = ctx.saved_tensors
        return _gather(grad, source) if ctx.back else _gather_sum(grad, places), None, None, None


class _PermuteWeights(torch.autograd.Function):
    """Every element is read and written once, so both ways are plain gathers and scatters."""

    @staticmethod
    def forward(ctx: _Saved, weights: Tensor, experts: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(experts, places)
        ctx.shape = weights.shape
        chosen = weights.gather(1, experts).view(-1)  # [T*k]
        return torch.empty_like(chosen).scatter_(0, places.view(-1), chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor, None, None]:
        experts, places = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_(1, experts, grad[places]), None, None


def _gather(rows: Tensor, source: Tensor) -> Tensor:
    """``out[r] = rows[source[r]]``."""
    if runs_on_gpu(rows.device, rows.dtype):
        return gather_triton(rows, source)
    return rows.index_select(0, source)


def _gather_sum(rows: Tensor, places: Tensor) -> Tensor:
    """``out[t] = sum_j rows[places[t, j]]``."""
    if runs_on_gpu(rows.device, rows.dtype):
        return gather_sum_triton(rows, places)
    parts = rows.index_select(0, places.view(-1)).view(*places.shape, rows.size(1))
    return parts.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


def gather_triton(rows: Tensor, source: Tensor) -> Tensor:
    """``out[r] = rows[source[r]]`` in Triton."""
    from .permute_kernels import BLOCK, gather_kernel

    rows = rows.contiguous()
    out = rows.new_empty(len(source), rows.size(1))
    if out.numel():
        gather_kernel[(len(source), -(-rows.size(1) // BLOCK))](rows, source, out, rows.size(1), BLOCK=BLOCK)
    return out


def gather_sum_triton(rows: Tensor, places: Tensor) -> Tensor:
    """``out[t] = sum_j rows[places[t, j]]`` in Triton, added up in float32."""
    from .permute_kernels import BLOCK, gather_sum_kernel

    rows = rows.contiguous()
    out = rows.new_empty(len(places), rows.size(1))
    if out.numel():
        grid = (len(places), -(-rows.size(1) // BLOCK))
        gather_sum_kernel[grid](rows, places, out, rows.size(1), COUNT=places.size(1), BLOCK=BLOCK)
    return out
