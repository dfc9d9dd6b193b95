"""PHD attention as two ordinary attentions, merged by log-sum-exp.

Eq. 2 of PHD-Transformer (arXiv 2504.14992) splits into

- part (a): every copy's query over the originals, causal by position. With the copies folded into the query heads
  this is plain causal attention with ``K`` times the heads and the same keys, so any flash kernel runs it unmasked;
- part (b): hidden queries over hidden keys, which is local: one token (``W = 1``), a chunk, or a sliding window.

Each query row has one softmax over both parts. Its output is the average of the parts weighted by their sums of
exponentials; in the backward each part runs alone with the *merged* output and the *merged* log-sum-exp, which is
exact (as in ring attention): ``p = exp(s - lse)`` and ``ds = p * (dp - rowsum(dout * out))`` need nothing else.

Folded memory order is ``[b, kv_head, s, copy, group, d]``: both parts read it as views, with ``b * kv_head`` as the
batch of a one-KV-head problem. Needs torch alone, since it also ships inside an exported Hugging Face model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy

MIN_BLOCK = 32  # positions; smaller blocks make matrix products too small to be quick
PLAIN_ROWS = 256  # query rows at a time in the plain path, so that its scores stay small


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


# -------------------------------------------------------------------- part (a): causal attention over the originals

Three: TypeAlias = tuple[Tensor, Tensor, Tensor]
Extra: TypeAlias = tuple[Any, ...]  # what an operator wants back in its backward: random state, lengths
Forward: TypeAlias = tuple[Tensor, Tensor, Extra]


_HALF = frozenset({torch.float16, torch.bfloat16})
_FLOATS = _HALF | {torch.float32, torch.float64}


class CausalKernel(NamedTuple):
    """One way to run part (a) on ``q [B, H, s, d]``, ``k, v [B, G, s, d]`` with H a multiple of G.

    ``forward(q, k, v, scale, causal=True) -> out, lse [B, H, >= s], extra``;
    ``backward(grad, q, k, v, out, lse, extra, scale, causal=True) -> dq, dk, dv``. Without ``causal`` every query sees
    every key, and there may be any number of keys. The limits say what may even be tried: outside them cuDNN was seen
    to return NaN (float32) and to crash the process instead of refusing.
    """

    name: str
    forward: Callable[..., Forward]
    backward: Callable[..., Three]
    dtypes: frozenset[torch.dtype] = _FLOATS
    multiple: int = 1  # of the head dimension
    widest: int = 1 << 30  # head dimension


def _aten(name: str) -> Any:
    """A private torch operator, or AttributeError where this torch has none of that name."""
    return getattr(torch.ops.aten, name)


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Forward:
    out, lse = _aten("_scaled_dot_product_flash_attention_for_cpu")(q, k, v, 0.0, causal, scale=scale)
    return out, lse, ()


def _cpu_flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extra: Extra,
    scale: float,
    causal: bool = True,
) -> Three:
    op = _aten("_scaled_dot_product_flash_attention_for_cpu_backward")
    return op(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def _cuda_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Forward:
    out, lse, *extra = _aten("_scaled_dot_product_flash_attention")(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse, tuple(extra[:6])


def _cuda_flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extra: Extra,
    scale: float,
    causal: bool = True,
) -> Three:
    cum_q, cum_k, max_q, max_k, seed, offset = extra
    op = _aten("_scaled_dot_product_flash_attention_backward")
    return op(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Forward:
    op = _aten("_scaled_dot_product_cudnn_attention")
    out, lse, *extra = op(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.view(q.shape[:3]), tuple(extra[:6])


def _cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extra: Extra,
    scale: float,
    causal: bool = True,
) -> Three:
    cum_q, cum_k, max_q, max_k, seed, offset = extra
    op = _aten("_scaled_dot_product_cudnn_attention_backward")
    lse = lse.unsqueeze(-1)
    return op(grad, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal, scale=scale)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Forward:
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))  # this operator has no grouped queries
    op = _aten("_scaled_dot_product_efficient_attention")
    out, lse, seed, offset = op(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse, (seed, offset)


def _efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extra: Extra,
    scale: float,
    causal: bool = True,
) -> Three:
    ratio = q.size(1) // k.size(1)
    wide_k, wide_v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    op = _aten("_scaled_dot_product_efficient_attention_backward")
    wanted = [True, True, True, False]
    dq, dk, dv, _ = op(grad, q, wide_k, wide_v, None, out, lse, *extra, 0.0, wanted, causal, scale=scale)
    return dq, dk.unflatten(1, (-1, ratio)).sum(2), dv.unflatten(1, (-1, ratio)).sum(2)


def _plain_scores(q: Tensor, k: Tensor, rows: slice, scale: float, causal: bool) -> Tensor:
    """Scores ``[B, G, r, rows, keys]`` of some query rows; causal ones end at the last row, later keys -inf."""
    if not causal:
        return q[..., rows, :] @ k[:, :, None].mT * scale
    scores = q[..., rows, :] @ k[:, :, None, : rows.stop].mT * scale
    position = torch.arange(rows.stop, device=q.device)
    return scores.masked_fill_(position > position[rows, None], -math.inf)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Forward:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    length, groups = q.size(2), k.size(1)
    grouped, k, v = q.unflatten(1, (groups, -1)).to(accumulate), k.to(accumulate), v.to(accumulate)
    out, lse = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:-1])
    for start in range(0, length, PLAIN_ROWS):
        rows = slice(start, min(start + PLAIN_ROWS, length))
        keys = rows.stop if causal else k.size(2)
        scores = _plain_scores(grouped, k, rows, scale, causal)
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = scores.softmax(-1) @ v[:, :, None, :keys]
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2), ()


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extra: Extra,
    scale: float,
    causal: bool = True,
) -> Three:
    dtype, length, groups = q.dtype, q.size(2), k.size(1)
    accumulate = torch.promote_types(dtype, torch.float32)
    grad, q, out = (x.unflatten(1, (groups, -1)).to(accumulate) for x in (grad, q, out))
    k, v, lse = k.to(accumulate), v.to(accumulate), lse.unflatten(1, (groups, -1))
    delta = (grad * out).sum(-1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, length, PLAIN_ROWS):
        rows = slice(start, min(start + PLAIN_ROWS, length))
        keys = rows.stop if causal else k.size(2)
        weights = _plain_scores(q, k, rows, scale, causal).sub_(lse[..., rows, None]).exp_()
        gradient = grad[..., rows, :]
        dv[:, :, :keys] += (weights.mT @ gradient).sum(2)
        slope = (gradient @ v[:, :, None, :keys].mT).sub_(delta[..., rows, None]).mul_(weights).mul_(scale)
        dq[..., rows, :] = slope @ k[:, :, None, :keys]
        dk[:, :, :keys] += (slope.mT @ q[..., rows, :]).sum(2)
    return dq.flatten(1, 2).to(dtype), dk.to(dtype), dv.to(dtype)


def _single_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Forward:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    ratio = q.size(1) // k.size(1)
    lse = (q.to(accumulate) * k.repeat_interleave(ratio, 1).to(accumulate)).sum(-1) * scale
    return v.repeat_interleave(ratio, 1), lse, ()


def _single_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, extra: Extra, scale: float
) -> Three:
    dtype, ratio = q.dtype, q.size(1) // k.size(1)
    accumulate = torch.promote_types(dtype, torch.float32)
    grad, q, out = (x.to(accumulate) for x in (grad, q, out))
    wide_k, wide_v = (x.repeat_interleave(ratio, 1).to(accumulate) for x in (k, v))
    weights = ((q * wide_k).sum(-1) * scale - lse).exp()[..., None]
    # One sum for both terms: with a single key they cancel to exactly 0, where a flash kernel leaves rounding noise.
    slope = weights * (grad * (wide_v - out)).sum(-1, keepdim=True) * scale
    grads = (slope * q, weights * grad)
    dk, dv = (x.unflatten(1, (-1, ratio)).sum(2).to(dtype) for x in grads)
    return (slope * wide_k).to(dtype), dk, dv


PLAIN = CausalKernel("plain", _plain_forward, _plain_backward)
SINGLE = CausalKernel("single", _single_forward, _single_backward)
CPU_FLASH = CausalKernel("cpu flash", _cpu_flash_forward, _cpu_flash_backward)
CUDA_FLASH = CausalKernel("cuda flash", _cuda_flash_forward, _cuda_flash_backward, _HALF, 8, 256)
CUDNN = CausalKernel("cudnn", _cudnn_forward, _cudnn_backward, _HALF, 8, 128)
EFFICIENT = CausalKernel("cuda efficient", _efficient_forward, _efficient_backward, _HALF | {torch.float32}, 8)

_PREFERRED = {"cpu": (CPU_FLASH,), "cuda": (CUDNN, CUDA_FLASH, EFFICIENT)}


def causal_kernel(
    device: torch.device, dtype: torch.dtype, width: int, causal: bool = True
) -> tuple[CausalKernel, str]:
    """The quickest operator that computes part (a) right here, and why it was taken. ``width`` is the head dim.

    Without ``causal`` it is the one for blocks in which every query sees every key (context parallelism).
    """
    return _causal_kernel(device.type, device.index, dtype, width, causal)


@lru_cache(maxsize=64)
def _causal_kernel(
    kind: str, index: int | None, dtype: torch.dtype, width: int, causal: bool
) -> tuple[CausalKernel, str]:
    reasons: list[str] = []
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    for kernel in _PREFERRED.get(kind, ()):
        problem = _probe(kernel, device, dtype, width, causal)
        if problem is None:
            return kernel, "; ".join([f"{kernel.name} operator checked here", *reasons])
        reasons.append(f"{kernel.name} not used: {problem}")
    return PLAIN, "; ".join(["plain matrix products", *(reasons or [f"no fused operator is known for {kind}"])])


def _probe(
    kernel: CausalKernel, device: torch.device, dtype: torch.dtype, width: int, causal: bool = True
) -> str | None:
    """Run a private operator once, both ways with grouped queries, against the plain path: it may change or go."""
    if dtype not in kernel.dtypes or width % kernel.multiple or width > kernel.widest:
        return f"not for {str(dtype).removeprefix('torch.')} with head dimension {width}"
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)
    scale = width**-0.5
    step = torch.arange(2 * 4 * 5 * width * 2, dtype=torch.float64, device="cpu")
    wave = (step * step * 0.37).sin().to(device, dtype)  # scattered values that leave every random state alone
    q, grad = wave.view(2, 2, 4, 5, width)
    k, v = wave.flip(0)[: 2 * 2 * 2 * 5 * width].view(2, 2, 2, 5, width)
    if not causal:
        k, v = (torch.cat([x, x.flip(2)[:, :, :3]], 2) for x in (k, v))  # 8 keys for 5 queries
    try:
        out, lse, extra = kernel.forward(q, k, v, scale, causal)
        got = (out, lse[..., :5], *kernel.backward(grad, q, k, v, out, lse, extra, scale, causal))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    want_out, want_lse, _ = _plain_forward(q, k, v, scale, causal)
    want = (want_out, want_lse, *_plain_backward(grad, q, k, v, want_out, want_lse, (), scale, causal))
    for found, expected in zip(got, want, strict=True):
        if found.shape != expected.shape:
            return f"it returns shape {tuple(found.shape)} where {tuple(expected.shape)} is right"
        off = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not off <= tolerance:
            return f"its result is off by {off:.1e}"
    return None


# -------------------------------------------------------------------- part (b): hidden queries over hidden keys
# Folded tensors: q, grad [G, s, j, r, d] with the j hidden query copies; k, v [G, s, i, d] with the i = K-1 hidden
# key copies; G = b * kv_heads. Forward gives (unnormalised out, sum of exponentials, row maximum).


class _Blocks(NamedTuple):
    """``number`` blocks of ``size`` positions, whose queries also see the ``back`` positions before the block.

    The first query is at position ``start``; keys begin ``halo`` positions before it (context parallelism).
    """

    policy: KVPolicy
    size: int
    back: int
    number: int
    start: int = 0
    halo: int = 0


def _plan(policy: KVPolicy, length: int, start: int = 0, halo: int = 0) -> _Blocks | None:
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
        return _Blocks(policy, length, halo, 1, start, halo)
    return _Blocks(policy, size, back, -(-length // size), start, halo)


def _block_mask(plan: _Blocks, query_copies: int, device: torch.device) -> Tensor:
    """True where a key is *not* seen: ``[blocks or 1, size, j, 1, keys * i]``, one for all blocks where they agree."""
    number = plan.number if plan.back else 1
    policy, repeat = plan.policy, plan.policy.repeat
    start = torch.arange(number, device=device).view(-1, 1, 1, 1, 1, 1) * plan.size + plan.start
    query = start + torch.arange(plan.size, device=device).view(-1, 1, 1, 1, 1)
    key = start + torch.arange(-plan.back, plan.size, device=device).view(-1, 1)
    query_copy = torch.arange(repeat - query_copies + 1, repeat + 1, device=device).view(-1, 1, 1, 1)
    key_copy = torch.arange(2, repeat + 1, device=device)
    return ~(policy.hidden_visible(query, query_copy, key, key_copy) & (key >= plan.start - plan.halo)).flatten(-2)


def _query_blocks(x: Tensor, plan: _Blocks) -> Tensor:
    """``[G, s, j, r, ...]`` to ``[G * blocks, size * j * r, ...]``, padded at the end."""
    tail = plan.size * plan.number - x.size(1)
    if tail:
        x = pad(x, [0, 0] * (x.dim() - 2) + [0, tail])
    return x.reshape(x.size(0) * plan.number, -1, *x.shape[4:])


def _unblock_queries(x: Tensor, like: Tensor, plan: _Blocks) -> Tensor:
    """Back to ``[G, s, j, r, ...]``, padding cut."""
    whole = x.reshape(like.size(0), plan.size * plan.number, *like.shape[2:4], *x.shape[2:])
    return whole[:, : like.size(1)]


def _key_blocks(x: Tensor, plan: _Blocks) -> Tensor:
    """``[G, halo + s, i, d]`` to ``[G * blocks, (back + size) * i, d]``; neighbouring blocks overlap by ``back``."""
    front, tail = plan.back - plan.halo, plan.size * plan.number + plan.halo - x.size(1)
    if front or tail:
        x = pad(x, [0, 0, 0, 0, front, tail])
    if not plan.back:
        return x.reshape(x.size(0) * plan.number, -1, x.size(3))
    blocks = x.unfold(1, plan.back + plan.size, plan.size)  # [G, blocks, i, d, back + size]
    return blocks.permute(0, 1, 4, 2, 3).reshape(x.size(0) * plan.number, -1, x.size(3))


def _unblock_keys(x: Tensor, like: Tensor, plan: _Blocks) -> Tensor:
    """Gradients of overlapping key blocks added up: ``[G, halo + s, i, d]``."""
    blocks = x.view(like.size(0), plan.number, plan.back + plan.size, *like.shape[2:])
    total = blocks[:, :, plan.back :]
    if plan.back:
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


def _block_scores(q: Tensor, k: Tensor, plan: _Blocks, like: Tensor, scale: float) -> Tensor:
    """Masked scores ``[G * blocks, size * j * r, keys * i]``."""
    scores = _product(q, k.mT).mul_(scale)
    mask = _block_mask(plan, like.size(2), q.device)
    scores.view(like.size(0), plan.number, plan.size, *like.shape[2:4], -1).masked_fill_(mask, -math.inf)
    return scores


def _block_forward(q: Tensor, k: Tensor, v: Tensor, plan: _Blocks, scale: float) -> Three:
    keys, values = (_key_blocks(_working(x), plan) for x in (k, v))
    scores = _block_scores(_query_blocks(_working(q), plan), keys, plan, q, scale)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = _product(weights.to(values.dtype), values)
    return _unblock_queries(out, q, plan), _unblock_queries(total, q, plan), _unblock_queries(top, q, plan)


def _block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: _Blocks, scale: float
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


# -------------------------------------------------------------------- both parts as one differentiable function


def _unit_stride(x: Tensor) -> Tensor:
    """The flash operators misread, without an error, tensors whose last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _vanilla(query: Tensor, key: Tensor, value: Tensor) -> Three:
    """``[1, s, b, heads, d]`` as ``[b, heads, s, d]``.

    A CPU reads keys and values once for every block of queries, and sequence-first rows of a batch lie so far apart
    that they push each other out of its cache: a copy there pays for itself about ten times over.
    """
    q, k, v = (x[0].permute(1, 2, 0, 3) for x in (query, key, value))
    if query.device.type == "cpu":
        return _unit_stride(q), k.contiguous(), v.contiguous()
    return _unit_stride(q), _unit_stride(k), _unit_stride(v)


def _fold(x: Tensor, groups: int) -> Tensor:
    """Queries ``[Kq, s, b, heads, d]`` to ``[b * groups, s, Kq, r, d]``."""
    x = x.unflatten(3, (groups, x.size(3) // groups)).permute(2, 3, 1, 0, 4, 5)  # [b, g, s, Kq, r, d]
    return _unit_stride(x.reshape(-1, *x.shape[2:]))


def _unfold(x: Tensor, batch: int) -> Tensor:
    """Inverse of :func:`_fold`: ``[b * groups, s, Kq, r, d]`` to a contiguous ``[Kq, s, b, heads, d]``."""
    x = x.unflatten(0, (batch, x.size(0) // batch)).permute(3, 2, 0, 1, 4, 5)
    return x.reshape(*x.shape[:3], -1, x.size(-1))


def _fold_keys(x: Tensor) -> Tensor:
    """Keys or values ``[copies, s, b, groups, d]`` to ``[b * groups, s, copies, d]``."""
    x = x.permute(2, 3, 1, 0, 4)
    return _unit_stride(x.reshape(-1, *x.shape[2:]))


def _unfold_keys(x: Tensor, batch: int) -> Tensor:
    """Inverse of :func:`_fold_keys`, a view."""
    return x.unflatten(0, (batch, x.size(0) // batch)).permute(3, 2, 0, 1, 4)


def _heads(x: Tensor) -> Tensor:
    """Folded ``[G, s, Kq, r, d]`` as part (a) takes it, ``[G, Kq * r, s, d]``."""
    return _unit_stride(x.flatten(2, 3).transpose(1, 2))


def _rows(x: Tensor, copies: int) -> Tensor:
    """What part (a) gave, ``[G, Kq * r, s, ...]``, as ``[G, s, Kq, r, ...]``: a view, so that it can be merged into."""
    return x.transpose(1, 2).unflatten(2, (copies, x.size(1) // copies))


class _PHDAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> Tensor:
        copies, length, batch, _, width = query.shape
        kernel = SINGLE if length == 1 else causal_kernel(query.device, query.dtype, width)[0]
        if policy.repeat == 1:  # vanilla: views in, a view out
            q, key, value = _vanilla(query, key, value)
            out, lse, extra = kernel.forward(q, key, value, scale)
            result = out.permute(2, 0, 1, 3).unsqueeze(0)
        else:
            q_rows = _fold(query, key.size(3))
            k, v = (_fold_keys(x[:1]).transpose(1, 2) for x in (key, value))
            q = _heads(q_rows)
            out, lse, extra = kernel.forward(q, k, v, scale)
            hidden = slice(max(0, copies - policy.repeat + 1), None)
            if hidden.start < copies:
                _merge(_rows(out, copies), _rows(lse[..., :length], copies), q_rows, key, value, policy, scale)
            result = _unfold(_rows(out, copies), batch)
        ctx.save_for_backward(q, key, value, result, lse)
        ctx.extra, ctx.kernel, ctx.policy, ctx.scale = extra, kernel, policy, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, key, value, result, lse = ctx.saved_tensors
        policy, scale, kernel, extra = ctx.policy, ctx.scale, ctx.kernel, ctx.extra
        if policy.repeat == 1:
            out, gradient = result[0].permute(1, 2, 0, 3), _unit_stride(grad[0].permute(1, 2, 0, 3))
            grads = kernel.backward(gradient, q, key, value, out, lse, extra, scale)
            return *(x.permute(2, 0, 1, 3).unsqueeze(0) for x in grads), None, None
        copies, length, batch, _, _ = result.shape
        groups, hidden = key.size(3), slice(max(0, copies - policy.repeat + 1), None)
        out_rows, grad_rows = _fold(result, groups), _fold(grad, groups)
        k, v = (_fold_keys(x[:1]).transpose(1, 2) for x in (key, value))
        dq, dk, dv = kernel.backward(_heads(grad_rows), q, k, v, _heads(out_rows), lse, extra, scale)
        dq_rows, q_rows = _rows(dq, copies)[:, :, hidden], _rows(q, copies)[:, :, hidden]
        grad_rows, out_rows = grad_rows[:, :, hidden], out_rows[:, :, hidden]
        total = _rows(lse[..., :length], copies)[:, :, hidden].unsqueeze(-1)
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        delta = (grad_rows.to(accumulate) * out_rows.to(accumulate)).sum(-1, keepdim=True)
        plan = _plan(policy, length)
        inputs = (grad_rows, q_rows, _fold_keys(key[1:]), _fold_keys(value[1:]), total, delta)
        if plan is None:
            more, dk_hidden, dv_hidden = _token_backward(*inputs, scale)
        else:
            more, dk_hidden, dv_hidden = _block_backward(*inputs, plan, scale)
        dq_rows += more
        dkey, dvalue = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
        for target, first, rest in ((dkey, dk, dk_hidden), (dvalue, dv, dv_hidden)):
            target[:1] = _unfold_keys(first.transpose(1, 2), batch)
            target[1:] = _unfold_keys(rest, batch)
        return _unfold(_rows(dq, copies), batch), dkey, dvalue, None, None


def _merge(out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> None:
    """Add part (b) to the hidden rows of part (a)'s ``out [G, s, Kq, r, d]`` and ``lse [G, s, Kq, r]``, in place."""
    hidden = slice(max(0, query.size(2) - policy.repeat + 1), None)
    out, lse, q = out[:, :, hidden], lse[:, :, hidden].unsqueeze(-1), query[:, :, hidden]
    k, v = _fold_keys(key[1:]), _fold_keys(value[1:])
    plan = _plan(policy, q.size(1))
    local, local_sum, local_top = (
        _token_forward(q, k, v, scale) if plan is None else _block_forward(q, k, v, plan, scale)
    )
    merged = torch.logaddexp(lse, local_sum.log() + local_top)
    mixed = (local_top - merged).exp() * local
    out.copy_(mixed.addcmul_(out.to(mixed.dtype), (lse - merged).exp()))
    lse.copy_(merged)
