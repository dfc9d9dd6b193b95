"""PHD attention in one Triton kernel (backend ``triton``).

The kernels are in :mod:`.triton_forward` and :mod:`.triton_backward`; here they get their tensors and autograd.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.kernels.triton_support import block_of, precision
from phd_megatron.phd.kv_policy import KVPolicy

from .folding import unit_stride
from .triton_backward import delta_kernel, key_gradient_kernel, query_gradient_kernel
from .triton_forward import forward_kernel

DELTA_ROWS = 64  # packed rows of one program of the delta kernel

Numbers: TypeAlias = tuple[int, ...]


class Rows(NamedTuple):
    """Where the tokens of a call are: one slice of the sequence, or a context-parallel rank's two."""

    length: int  # tokens of each slice
    starts: tuple[int, ...] = (0,)  # position of its first token
    halos: tuple[int, ...] = (0,)  # hidden positions before the slice that lie before it in the hidden tensors

    @property
    def hidden_starts(self) -> tuple[int, ...]:
        """Position of each slice's first hidden row."""
        return tuple(start - halo for start, halo in zip(self.starts, self.halos, strict=True))

    @property
    def hidden_bases(self) -> tuple[int, ...]:
        """Index of each slice's first hidden row: slices lie one after the other, each behind its halo."""
        return tuple(sum(self.halos[:i]) + i * self.length for i in range(len(self.halos)))


class Keys(NamedTuple):
    """Keys and values, or their gradients: originals ``[1, keys, b, g, d]``, hidden ``[K - 1, rows, b, g, d]``."""

    key: Tensor
    value: Tensor
    hidden_key: Tensor
    hidden_value: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor) -> Keys:
        """Views of ``[K, s, b, g, d]``; with one copy the hidden ones are never read and stand for themselves."""
        hidden = slice(1 if key.size(0) > 1 else 0, None)
        return cls(key[:1], value[:1], key[hidden], value[hidden])

    def strides(self) -> tuple[Numbers, ...]:
        """Of copies, rows, batch and groups."""
        return tuple(x.stride()[:4] for x in self)


class Problem(NamedTuple):
    """Constants of one call."""

    policy: KVPolicy
    rows: Rows
    scale: float
    copies: int
    groups: int
    ratio: int
    batch: int
    width: int

    @classmethod
    def of(cls, query: Tensor, groups: int, policy: KVPolicy, rows: Rows, scale: float) -> Problem:
        copies, _, batch, heads, width = query.shape
        return cls(policy, rows, scale, copies, groups, heads // groups, batch, width)

    @property
    def packed(self) -> int:
        """Packed rows of all slices of one sequence and group."""
        return len(self.rows.starts) * self.rows.length * self.copies * self.ratio

    def constants(self, dtype: torch.dtype) -> dict[str, int | str]:
        """What all three kernels are specialised on."""
        return {
            "SLICES": len(self.rows.starts),
            "COPIES": self.copies,
            "RATIO": self.ratio,
            "HIDDEN": self.policy.repeat - 1,
            "WINDOW": self.policy.window,
            "CHUNK": self.policy.chunk or 0,
            "D": self.width,
            "BLOCK_D": block_of(self.width),
            "PRECISION": precision(dtype),
        }

    def places(self) -> tuple[int, Numbers, Numbers, Numbers]:
        """Length of a slice; positions of its first token and first hidden row, and that row's index, by slice."""
        return self.rows.length, self.rows.starts, self.rows.hidden_starts, self.rows.hidden_bases

    def query_grid(self, meta: dict[str, int]) -> tuple[int, int]:
        rows = self.rows.length * self.copies * self.ratio
        return len(self.rows.starts) * -(-rows // meta["BLOCK_M"]), self.batch * self.groups

    def grouped(self, x: Tensor) -> Numbers:
        """Strides of ``[Kq, s, b, heads, d]`` seen as ``[Kq, s, b, groups, ratio, d]``, the last left out."""
        return x.unflatten(3, (self.groups, self.ratio)).stride()[:5]


def launch_forward(query: Tensor, keys: Keys, problem: Problem) -> tuple[Tensor, Tensor]:
    """Output like ``query`` and its packed log-sum-exp."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(problem.batch * problem.groups, problem.packed, dtype=torch.float32, device=query.device)
    forward_kernel[problem.query_grid](
        *(query, *keys, out, lse),
        *(problem.grouped(query), *keys.strides(), problem.grouped(out)),
        *(problem.scale, problem.groups, *problem.places()),
        **problem.constants(query.dtype),
    )
    return out, lse


def launch_backward(
    grad: Tensor,
    query: Tensor,
    keys: Keys,
    out: Tensor,
    lse: Tensor,
    into: Keys,
    problem: Problem,
    *,
    deterministic: bool = True,
) -> Tensor:
    """dq; gradients of keys and values are written into ``into``."""
    grad = unit_stride(grad)
    bundles = problem.batch * problem.groups
    constants = problem.constants(query.dtype)
    delta = torch.empty_like(lse)
    delta_kernel[-(-problem.packed // DELTA_ROWS), bundles](
        *(grad, out, delta, problem.grouped(grad), problem.grouped(out), problem.groups, problem.packed),
        *(problem.copies, problem.ratio, problem.width, constants["BLOCK_D"]),
        BLOCK_M=DELTA_ROWS,
    )
    shared = (grad, lse, delta)
    if deterministic:
        query_grad = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        total = query_grad[:0]  # nothing is added up, and tuning must not clear what was found
        query_gradient_kernel[problem.query_grid](
            *(query, *keys, *shared, query_grad),
            *(problem.grouped(query), *keys.strides(), problem.grouped(grad), problem.grouped(query_grad)),
            *(problem.scale, problem.groups, *problem.places()),
            **constants,
        )
    else:
        query_grad = total = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    length, entries = keys.key.size(1), 0
    if problem.policy.repeat > 1:
        entries = (problem.rows.length + max(problem.rows.halos)) * (problem.policy.repeat - 1)

    def key_grid(meta: dict[str, int]) -> tuple[int, int]:
        hidden = len(problem.rows.starts) * -(-entries // meta["BLOCK_N"])
        return -(-length // meta["BLOCK_N"]) + hidden, bundles

    key_gradient_kernel[key_grid](
        *(query, *keys, *shared, total, *into),
        *(problem.grouped(query), *keys.strides(), problem.grouped(grad), problem.grouped(query_grad)),
        *into.strides(),
        *(problem.scale, problem.groups, length, *problem.places(), entries),
        ATOMIC_DQ=not deterministic,
        **constants,
    )
    return query_grad.to(query.dtype)


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    *,
    scale: float | None = None,
    deterministic: bool = True,
) -> Tensor:
    """PHD attention in one pass, positions ``0..s-1``, with gradients. Shapes as :func:`sdpa_attention`'s.

    Args:
        deterministic: the default, because a run must repeat bit for bit. False adds dq up with float32 atomics in
            the pass over keys, which saves two of seven matrix products of the backward.
    """
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return _TritonAttention.apply(query, key, value, policy, scale, deterministic)


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]  # query, key, value, output, log-sum-exp
    problem: Problem
    deterministic: bool


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved, query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float, deterministic: bool
    ) -> Tensor:
        query, key, value = (unit_stride(x) for x in (query, key, value))
        problem = Problem.of(query, key.size(3), policy, Rows(query.size(1)), scale)
        out, lse = launch_forward(query, Keys.of(key, value), problem)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.problem, ctx.deterministic = problem, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        key_grad, value_grad = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
        keys, into = Keys.of(key, value), Keys.of(key_grad, value_grad)
        query_grad = launch_backward(grad, query, keys, out, lse, into, ctx.problem, deterministic=ctx.deterministic)
        return query_grad, key_grad, value_grad, None, None, None
