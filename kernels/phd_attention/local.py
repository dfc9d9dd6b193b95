"""Part (b) of PHD attention: hidden queries over hidden keys, which lie in a chunk, a sliding window, or one token.

Folded tensors: q and grad ``[G, s, j, r, d]`` with the ``j`` hidden query copies; k and v ``[G, s, i, d]`` with the
``i = K - 1`` hidden key copies; ``G = b * kv_heads``. Needs torch alone, since it also ships inside an exported Hugging
Face model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy

MIN_BLOCK = 32  # positions; smaller blocks make matrix products too small to be quick

Three: TypeAlias = tuple[Tensor, Tensor, Tensor]
_HALF = (torch.float16, torch.bfloat16)


def local_forward(q: Tensor, k: Tensor, v: Tensor, plan: Blocks | None, scale: float) -> Three:
    """Unnormalised output ``[G, s, j, r, d]``, sum of exponentials and row maximum ``[G, s, j, r, 1]``."""
    return _token_forward(q, k, v, scale) if plan is None else _block_forward(q, k, v, plan, scale)


def local_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    plan: Blocks | None,
    scale: float,
) -> Three:
    """dq, dk and dv, given the *merged* log-sum-exp and ``delta = rowsum(grad * out)``, both ``[G, s, j, r, 1]``."""
    if plan is None:
        return _token_backward(grad, q, k, v, lse, delta, scale)
    return _block_backward(grad, q, k, v, lse, delta, plan, scale)


class Blocks(NamedTuple):
    """``number`` blocks of ``size`` positions, whose queries also see the ``back`` positions before the block.

    The first query is at position ``start``; keys begin ``halo`` positions before it (context parallelism).
    """

    policy: KVPolicy
    size: int
    back: int
    number: int
    start: int = 0
    halo: int = 0


def local_plan(policy: KVPolicy, length: int, start: int = 0, halo: int = 0) -> Blocks | None:
    """How part (b) is cut up; None when a token sees nothing but its own copies."""
    span = min(policy.span, length + halo)
    if span == 1:
        return None
    size = max(MIN_BLOCK, span - 1)
    back = span - 1
    if policy.chunk is not None and start % policy.chunk == 0:
        whole = policy.chunk * -(-MIN_BLOCK // policy.chunk)  # whole chunks only: nothing before the block is seen
        if whole <= size + back:
            size, back = whole, 0
    if size >= length:
        return Blocks(policy, length, halo, 1, start, halo)
    return Blocks(policy, size, back, -(-length // size), start, halo)


def _block_mask(plan: Blocks, query_copies: int, device: torch.device) -> Tensor:
    """True where a key is *not* seen: ``[blocks or 1, size, j, 1, keys * i]``, one for all blocks where they agree."""
    number = plan.number if plan.back else 1
    policy, repeat = plan.policy, plan.policy.repeat
    start = torch.arange(number, device=device).view(-1, 1, 1, 1, 1, 1) * plan.size + plan.start
    query = start + torch.arange(plan.size, device=device).view(-1, 1, 1, 1, 1)
    key = start + torch.arange(-plan.back, plan.size, device=device).view(-1, 1)
    query_copy = torch.arange(repeat - query_copies + 1, repeat + 1, device=device).view(-1, 1, 1, 1)
    key_copy = torch.arange(2, repeat + 1, device=device)
    return ~(policy.hidden_visible(query, query_copy, key, key_copy) & (key >= plan.start - plan.halo)).flatten(-2)


def _query_blocks(x: Tensor, plan: Blocks) -> Tensor:
    """``[G, s, j, r, ...]`` to ``[G * blocks, size * j * r, ...]``, padded at the end."""
    tail = plan.size * plan.number - x.size(1)
    if tail:
        x = pad(x, [0, 0] * (x.dim() - 2) + [0, tail])
    return x.reshape(x.size(0) * plan.number, -1, *x.shape[4:])


def _unblock_queries(x: Tensor, like: Tensor, plan: Blocks) -> Tensor:
    """Back to ``[G, s, j, r, ...]``, padding cut."""
    whole = x.reshape(like.size(0), plan.size * plan.number, *like.shape[2:4], *x.shape[2:])
    return whole[:, : like.size(1)]


def _key_blocks(x: Tensor, plan: Blocks) -> Tensor:
    """``[G, halo + s, i, d]`` to ``[G * blocks, (back + size) * i, d]``; neighbouring blocks overlap by ``back``."""
    front, tail = plan.back - plan.halo, plan.size * plan.number + plan.halo - x.size(1)
    if front or tail:
        x = pad(x, [0, 0, 0, 0, front, tail])
    if not plan.back:
        return x.reshape(x.size(0) * plan.number, -1, x.size(3))
    blocks = x.unfold(1, plan.back + plan.size, plan.size)  # [G, blocks, i, d, back + size]
    return blocks.permute(0, 1, 4, 2, 3).reshape(x.size(0) * plan.number, -1, x.size(3))


def _unblock_keys(x: Tensor, like: Tensor, plan: Blocks) -> Tensor:
    """Gradients of overlapping key blocks added up: ``[G, halo + s, i, d]``."""
    blocks = x.view(like.size(0), plan.number, plan.back + plan.size, *like.shape[2:])
    total = blocks[:, :, plan.back :]
    if plan.back and plan.number > 1:  # then a block is no shorter than what the next one looks back
        total = total.contiguous()
        total[:, :-1, plan.size - plan.back :] += blocks[:, 1:, : plan.back]
    total = total.flatten(1, 2)[:, : like.size(1) - plan.halo]
    return torch.cat([blocks[:, 0, plan.back - plan.halo : plan.back], total], 1) if plan.halo else total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with float32 (or float64) accumulation *and* result."""
    if a.dtype in _HALF:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


def _working(x: Tensor) -> Tensor:
    """Half precision stays so on CUDA, whose products accumulate in float32; elsewhere part (b) runs in float32."""
    return x.float() if x.dtype in _HALF and x.device.type != "cuda" else x


def _block_scores(q: Tensor, k: Tensor, plan: Blocks, like: Tensor, scale: float) -> Tensor:
    """Masked scores ``[G * blocks, size * j * r, keys * i]``."""
    scores = _product(q, k.mT).mul_(scale)
    mask = _block_mask(plan, like.size(2), q.device)
    scores.view(like.size(0), plan.number, plan.size, *like.shape[2:4], -1).masked_fill_(mask, -math.inf)
    return scores


def _block_forward(q: Tensor, k: Tensor, v: Tensor, plan: Blocks, scale: float) -> Three:
    keys, values = (_key_blocks(_working(x), plan) for x in (k, v))
    scores = _block_scores(_query_blocks(_working(q), plan), keys, plan, q, scale)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = _product(weights.to(values.dtype), values)
    return _unblock_queries(out, q, plan), _unblock_queries(total, q, plan), _unblock_queries(top, q, plan)


def _block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: Blocks, scale: float
) -> Three:
    queries, gradient = (_query_blocks(_working(x), plan) for x in (q, grad))
    keys, values = (_key_blocks(_working(x), plan) for x in (k, v))
    weights = _block_scores(queries, keys, plan, q, scale).sub_(_query_blocks(lse, plan)).exp_()
    dv = _product(weights.to(values.dtype).mT, gradient)
    slope = _product(gradient, values.mT).sub_(_query_blocks(delta, plan)).mul_(weights).mul_(scale).to(keys.dtype)
    dq, dk = _product(slope, keys), _product(slope.mT, queries)
    return _unblock_queries(dq, q, plan), _unblock_keys(dk, k, plan), _unblock_keys(dv, v, plan)


def _token_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``[G, s, j, r, i]``: a token's hidden queries over its own hidden keys, later copies -inf (``W = 1``)."""
    queries, keys = q.size(2), k.size(2)
    scores = q.new_full((*q.shape[:-1], keys), -math.inf)
    for i in range(keys):  # at most K - 1 turns; for so few keys a sum of products beats tiny matrix products
        first = max(0, i - (keys - queries))
        scores[:, :, first:, :, i] = (q[:, :, first:] * k[:, :, i, None, None]).sum(-1).mul_(scale)
    return scores


def _token_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Three:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(accumulate) for x in (q, k, v))
    scores = _token_scores(q, k, scale)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    if v.size(2) == 1:
        return v.unsqueeze(3), weights, top
    out = sum(weights[..., i, None] * v[:, :, i, None, None] for i in range(v.size(2)))
    assert isinstance(out, Tensor)
    return out, weights.sum(-1, keepdim=True), top


def _token_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float) -> Three:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    grad, q, k, v = (x.to(accumulate) for x in (grad, q, k, v))
    weights = _token_scores(q, k, scale).sub_(lse).exp_()
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    queries, keys = q.size(2), k.size(2)
    for i in range(keys):
        first = max(0, i - (keys - queries))
        weight, gradient = weights[:, :, first:, :, i, None], grad[:, :, first:]
        dv[:, :, i] = (weight * gradient).sum((2, 3))
        slope = (gradient * v[:, :, i, None, None]).sum(-1, keepdim=True)
        slope.sub_(delta[:, :, first:]).mul_(weight).mul_(scale)
        dq[:, :, first:] += slope * k[:, :, i, None, None]
        dk[:, :, i] = (slope * q[:, :, first:]).sum((2, 3))
    return dq, dk, dv
