"""Part (a) of PHD attention: attention over originals, by whatever fused operator this machine has.

Plain causal attention, or no mask at all where context parallelism looks at other ranks' keys. Every kernel also gives
the log-sum-exp of its rows, and its backward takes a log-sum-exp from outside, so that parts can be merged. Private
operators of torch are tried once against the plain path before they are trusted. Needs torch alone, since it also ships
inside an exported Hugging Face model.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

PLAIN_ROWS = 256  # query rows at a time in the plain path, so that its scores stay small

Three: TypeAlias = tuple[Tensor, Tensor, Tensor]
Extra: TypeAlias = tuple[Tensor | int | None, ...]  # what an operator wants back in its backward: lengths, random state
Forward: TypeAlias = tuple[Tensor, Tensor, Extra]

_HALF = frozenset({torch.float16, torch.bfloat16})
_FLOATS = _HALF | {torch.float32, torch.float64}


class Call(NamedTuple):
    """One forward of an operator as its backward takes it: what went in and what came out.

    ``out`` and ``lse`` may be those of further keys too; the gradients are then what these keys have of them.
    """

    q: Tensor  # [B, H, s, d]
    k: Tensor  # [B, G, keys, d]
    v: Tensor
    out: Tensor  # [B, H, s, d]
    lse: Tensor  # [B, H, >= s]
    extra: Extra
    scale: float
    causal: bool = True


class CausalKernel(NamedTuple):
    """One way to run part (a) on ``q [B, H, s, d]``, ``k, v [B, G, s, d]`` with H a multiple of G.

    ``forward(q, k, v, scale, causal) -> out, lse [B, H, >= s], extra``;
    ``backward(grad, call) -> dq, dk, dv``. Without ``causal`` every query sees every key, and there may be any number
    of keys. The limits say what may even be tried: outside them cuDNN was seen to return NaN (float32) and to crash the
    process instead of refusing. ``shares_keys``: ``k`` and ``v`` may be one sequence's expanded over ``B``, which is
    then no loss, so that the copies of PHD's queries can be the batch of one call; dk and dv still come for each.
    """

    name: str
    forward: Callable[..., Forward]
    backward: Callable[[Tensor, Call], Three]
    dtypes: frozenset[torch.dtype] = _FLOATS
    multiple: int = 1  # of the head dimension
    widest: int = 1 << 30  # head dimension
    shares_keys: bool = False


def _aten(name: str) -> Any:
    """A private torch operator, or AttributeError where this torch has none of that name."""
    return getattr(torch.ops.aten, name)


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    out, lse = _aten("_scaled_dot_product_flash_attention_for_cpu")(q, k, v, 0.0, causal, scale=scale)
    return out, lse, ()


def _cpu_flash_backward(grad: Tensor, call: Call) -> Three:
    op = _aten("_scaled_dot_product_flash_attention_for_cpu_backward")
    return op(grad, call.q, call.k, call.v, call.out, call.lse, 0.0, call.causal, scale=call.scale)


def _cuda_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    out, lse, *extra = _aten("_scaled_dot_product_flash_attention")(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse, tuple(extra[:6])


def _cuda_flash_backward(grad: Tensor, call: Call) -> Three:
    *lengths, seed, offset = call.extra  # lengths: where sequences of queries and of keys begin, the longest of both
    op = _aten("_scaled_dot_product_flash_attention_backward")
    tensors = (grad, call.q, call.k, call.v, call.out, call.lse)
    return op(*tensors, *lengths, 0.0, call.causal, seed, offset, scale=call.scale)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    op = _aten("_scaled_dot_product_cudnn_attention")
    out, lse, *extra = op(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.view(q.shape[:3]), tuple(extra[:6])


def _cudnn_backward(grad: Tensor, call: Call) -> Three:
    *lengths, seed, offset = call.extra
    op = _aten("_scaled_dot_product_cudnn_attention_backward")
    tensors = (grad, call.q, call.k, call.v, call.out, call.lse.unsqueeze(-1))
    return op(*tensors, seed, offset, None, *lengths, 0.0, call.causal, scale=call.scale)


# The flash-attn packages, 2 (2.7 or later), 3 and 4: tensors [b, s, heads, d], log-sum-exp [b, heads, s].


def _package(name: str) -> ModuleType:
    return importlib.import_module(name)


def _package_2_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    out, lse, _, state = _package("flash_attn.flash_attn_interface")._flash_attn_forward(
        *(x.transpose(1, 2) for x in (q, k, v)),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out.transpose(1, 2), lse, (state,)


def _package_2_backward(grad: Tensor, call: Call) -> Three:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, call.q, call.k, call.v, call.out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _package("flash_attn.flash_attn_interface")._flash_attn_backward(
        *(grad, q, k, v, out, call.lse.contiguous(), dq, dk, dv),
        dropout_p=0.0,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rng_state=call.extra[0],
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _package_3_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    inputs = (x.transpose(1, 2) for x in (q, k, v))
    found = _package("flash_attn_interface")._flash_attn_forward(*inputs, softmax_scale=scale, causal=causal)
    return found[0].transpose(1, 2), found[1], ()


def _package_3_backward(grad: Tensor, call: Call) -> Three:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, call.q, call.k, call.v, call.out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _package("flash_attn_interface")._flash_attn_backward(
        *(grad, q, k, v, out, call.lse.contiguous()),
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=call.scale,
        is_causal=call.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _package_4_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    inputs = (x.transpose(1, 2) for x in (q, k, v))
    attend = _package("flash_attn.cute.interface")._flash_attn_fwd
    found = attend(*inputs, softmax_scale=scale, causal=causal, return_lse=True)
    return found[0].transpose(1, 2), found[1], ()


def _package_4_backward(grad: Tensor, call: Call) -> Three:
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, call.q, call.k, call.v, call.out))
    dq, dk, dv = _package("flash_attn.cute.interface")._flash_attn_bwd(
        *(q, k, v, out, grad, call.lse.contiguous()),
        softmax_scale=call.scale,
        causal=call.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))  # this operator has no grouped queries
    op = _aten("_scaled_dot_product_efficient_attention")
    out, lse, seed, offset = op(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse, (seed, offset)


def _efficient_backward(grad: Tensor, call: Call) -> Three:
    ratio = call.q.size(1) // call.k.size(1)
    k, v = (x.repeat_interleave(ratio, 1) for x in (call.k, call.v))
    op = _aten("_scaled_dot_product_efficient_attention_backward")
    tensors, wanted = (grad, call.q, k, v, None, call.out, call.lse), [True, True, True, False]
    dq, dk, dv, _ = op(*tensors, *call.extra, 0.0, wanted, call.causal, scale=call.scale)
    return dq, dk.unflatten(1, (-1, ratio)).sum(2), dv.unflatten(1, (-1, ratio)).sum(2)


def _plain_scores(q: Tensor, k: Tensor, rows: slice, scale: float, causal: bool) -> Tensor:
    """Scores ``[B, G, r, rows, keys]`` of some query rows; causal ones end at the last row, later keys -inf."""
    if not causal:
        return q[..., rows, :] @ k[:, :, None].mT * scale
    scores = q[..., rows, :] @ k[:, :, None, : rows.stop].mT * scale
    position = torch.arange(rows.stop, device=q.device)
    return scores.masked_fill_(position > position[rows, None], -math.inf)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
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


def _plain_backward(grad: Tensor, call: Call) -> Three:
    dtype, length, groups, scale, causal = call.q.dtype, call.q.size(2), call.k.size(1), call.scale, call.causal
    accumulate = torch.promote_types(dtype, torch.float32)
    grad, q, out = (x.unflatten(1, (groups, -1)).to(accumulate) for x in (grad, call.q, call.out))
    k, v, lse = call.k.to(accumulate), call.v.to(accumulate), call.lse.unflatten(1, (groups, -1))
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


def _single_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Forward:
    # One query and one key, which it sees in any case.
    accumulate = torch.promote_types(q.dtype, torch.float32)
    ratio = q.size(1) // k.size(1)
    lse = (q.to(accumulate) * k.repeat_interleave(ratio, 1).to(accumulate)).sum(-1) * scale
    return v.repeat_interleave(ratio, 1), lse, ()


def _single_backward(grad: Tensor, call: Call) -> Three:
    dtype, ratio = call.q.dtype, call.q.size(1) // call.k.size(1)
    accumulate = torch.promote_types(dtype, torch.float32)
    grad, q, out = (x.to(accumulate) for x in (grad, call.q, call.out))
    wide_k, wide_v = (x.repeat_interleave(ratio, 1).to(accumulate) for x in (call.k, call.v))
    weights = ((q * wide_k).sum(-1) * call.scale - call.lse).exp()[..., None]
    # One sum for both terms: with a single key they cancel to exactly 0, where a flash kernel leaves rounding noise.
    slope = weights * (grad * (wide_v - out)).sum(-1, keepdim=True) * call.scale
    grads = (slope * q, weights * grad)
    dk, dv = (x.unflatten(1, (-1, ratio)).sum(2).to(dtype) for x in grads)
    return (slope * wide_k).to(dtype), dk, dv


PLAIN = CausalKernel("plain", _plain_forward, _plain_backward, shares_keys=True)
SINGLE = CausalKernel("single", _single_forward, _single_backward)
CPU_FLASH = CausalKernel("cpu flash", _cpu_flash_forward, _cpu_flash_backward, shares_keys=True)
CUDA_FLASH = CausalKernel("cuda flash", _cuda_flash_forward, _cuda_flash_backward, _HALF, 8, 256)
CUDNN = CausalKernel("cudnn", _cudnn_forward, _cudnn_backward, _HALF, 8, 128, shares_keys=True)
EFFICIENT = CausalKernel("cuda efficient", _efficient_forward, _efficient_backward, _HALF | {torch.float32}, 8)
PACKAGE_2 = CausalKernel("flash-attn 2", _package_2_forward, _package_2_backward, _HALF, 8, 256)
PACKAGE_3 = CausalKernel("flash-attn 3", _package_3_forward, _package_3_backward, _HALF, 8, 256)
PACKAGE_4 = CausalKernel("flash-attn 4", _package_4_forward, _package_4_backward, _HALF, 8, 128, shares_keys=True)

# On a GPU flash-attn 4 was measured to be quicker than cuDNN's, and that the quickest of torch's (docs/benchmarks.md).
# The other packages have not been measured, and come next where they are installed.
_PREFERRED = {"cpu": (CPU_FLASH,), "cuda": (PACKAGE_4, CUDNN, PACKAGE_3, PACKAGE_2, CUDA_FLASH, EFFICIENT)}
_BY_NAME = {kernel.name: kernel for kernel in (PLAIN, *(k for kernels in _PREFERRED.values() for k in kernels))}
FORCED = "PHD_CAUSAL_KERNEL"  # environment variable: the name of the only one of these to try


def causal_kernel(
    device: torch.device, dtype: torch.dtype, width: int, causal: bool = True
) -> tuple[CausalKernel, str]:
    """The quickest operator that computes part (a) right here, and why it was taken. ``width`` is the head dim.

    Without ``causal`` it is the one for blocks in which every query sees every key (context parallelism).
    """
    place = (device.type, device.index, dtype, width, causal)
    if torch.compiler.is_compiling():
        return _BY_NAME[_name(*place)], "chosen while the model was compiled"
    return _causal_kernel(*place, os.environ.get(FORCED))


@torch.compiler.assume_constant_result
def _name(kind: str, index: int | None, dtype: torch.dtype, width: int, causal: bool) -> str:
    """The choice as a constant of a compiled graph: trying operators is no part of the graph."""
    return _causal_kernel(kind, index, dtype, width, causal, os.environ.get(FORCED))[0].name


@lru_cache(maxsize=64)
def _causal_kernel(
    kind: str, index: int | None, dtype: torch.dtype, width: int, causal: bool, forced: str | None
) -> tuple[CausalKernel, str]:
    reasons: list[str] = []
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    preferred = _PREFERRED.get(kind, ())
    if forced:
        if problem := _unknown(forced, kind):
            raise ValueError(f"{FORCED}={forced} {problem}; unset it")
        preferred = (_BY_NAME[forced],)
    for kernel in preferred:
        problem = _probe(kernel, device, dtype, width, causal)
        if problem is None:
            if kernel.shares_keys and (problem := _probe(kernel, device, dtype, width, causal, shared=True)):
                kernel = kernel._replace(shares_keys=False)
                reasons.append(f"called for each copy: with shared keys {problem}")
            return kernel, "; ".join([f"{kernel.name} operator checked here", *reasons])
        if forced:
            raise ValueError(f"{FORCED}={forced} cannot be used here: {problem}; unset it")
        reasons.append(f"{kernel.name} not used: {problem}")
    return PLAIN, "; ".join(["plain matrix products", *(reasons or [f"no fused operator is known for {kind}"])])


def operator_problem(
    name: str, device: torch.device, dtype: torch.dtype, width: int, causal: bool = True
) -> str | None:
    """Why the operator of that name cannot compute part (a) here, or None."""
    if problem := _unknown(name, device.type):
        return problem
    problem = _probe(_BY_NAME[name], device, dtype, width, causal)
    return problem and f"cannot be used here: {problem}"


def _unknown(name: str, kind: str) -> str | None:
    known = [kernel.name for kernel in _PREFERRED.get(kind, ())]
    return None if name in known else f"is no operator for {kind}; use one of {', '.join(known)}"


class Block(NamedTuple):
    """How a block of keys was computed that is merged with others: with the tensors, what its backward needs."""

    kernel: CausalKernel
    causal: bool
    extra: Extra
    padding: int  # rows by which the kernel's log-sum-exp is longer than the queries

    @classmethod
    def run(cls, q: Tensor, kv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Block]:
        """Output and log-sum-exp of ``q [G, H, rows, d]`` over ``kv [2, G, 1, keys, d]``."""
        kernel, _ = causal_kernel(q.device, q.dtype, q.size(-1), causal)
        out, lse, extra = kernel.forward(q, kv[0], kv[1], scale, causal)
        rows = q.size(2)
        return out, lse[..., :rows].contiguous(), cls(kernel, causal, extra, lse.size(-1) - rows)

    def backward(self, grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Three:
        """dq, dk and dv; ``out`` and ``lse`` are those of all keys, not of these alone."""
        lse = pad(lse, [0, self.padding], value=float("inf")) if self.padding else lse.contiguous()
        return self.kernel.backward(grad, Call(q, kv[0], kv[1], out, lse, self.extra, scale, self.causal))


def _probe(
    kernel: CausalKernel,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    causal: bool = True,
    shared: bool = False,
) -> str | None:
    """Run a private operator once, both ways with grouped queries, against the plain path: it may change or go.

    ``shared`` keys are one sequence's, expanded.
    """
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
    if shared:
        k, v = (x[:1].expand(x.shape) for x in (k, v))
    try:
        out, lse, extra = kernel.forward(q, k, v, scale, causal)
        grads = kernel.backward(grad, Call(q, k, v, out, lse, extra, scale, causal))
        got = (out, lse[..., :5], *grads)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever kind: packages that compile have kinds of their own
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    want_out, want_lse, _ = _plain_forward(q, k, v, scale, causal)
    plain = Call(q, k, v, want_out, want_lse, (), scale, causal)
    want = (want_out, want_lse, *_plain_backward(grad, plain))
    for found, expected in zip(got, want, strict=True):
        if found.shape != expected.shape:
            return f"it returns shape {tuple(found.shape)} where {tuple(expected.shape)} is right"
        off = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not off <= tolerance:
            return f"its result is off by {off:.1e}"
    return None
