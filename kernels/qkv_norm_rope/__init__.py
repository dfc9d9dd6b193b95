"""Fused QKV projection output to normed and turned query, key and value: RMSNorm per head, then RoPE.

One Triton kernel each way reads the projection's output once. Any subset of q, k and v is normed (HybridNorm's schemes
differ in it); v is never turned. :func:`qkv_norm_rope_reference` is the definition, in ordinary operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.errors import UserError
from phd_megatron.kernels.phd_attention import BACKENDS
from phd_megatron.kernels.qkv_rope import Three, rope_reference, split_qkv_reference
from phd_megatron.kernels.triton_support import covering, triton_problem

WIDEST = 512  # head dimension; a program holds a tile of rows of this width in registers
PROGRAMS = 2048  # of the backward, about: each leaves one partial gradient of a norm's weight
COLUMNS, SUMMED_ROWS = 16, 256  # of a tile of those partial gradients when they are added up


def qkv_norm_rope_problem(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot run here, or None where it can."""
    return width_problem(head_dim) or triton_problem(device, dtype)


def width_problem(head_dim: int) -> str | None:
    """Why the kernel cannot hold such a head, or None where it can."""
    return None if head_dim <= WIDEST else f"its tiles hold head dimensions up to {WIDEST}, not {head_dim}"


def is_chosen(attention_backend: str, problem: str | None) -> bool:
    """Whether a model uses the kernel: where the backend of attention says so, and by itself on a GPU that can run it.

    Args:
        attention_backend: ``phd_attention_backend``.
        problem: why it cannot run on the GPU, or that there is none; None where it can.
    """
    if attention_backend == "auto":
        return problem is None
    backend = BACKENDS.get(attention_backend)
    return backend is not None and backend.fused_norms


@cache
def gpu_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """:func:`qkv_norm_rope_problem`, and also that there is no GPU."""
    return qkv_norm_rope_problem(device, dtype, head_dim) if device.type == "cuda" else "there is no CUDA device"


def qkv_norm_rope(
    mixed: Tensor, heads_per_group: int, table: Tensor | None, weights: Mapping[str, Tensor], eps: float
) -> Three:
    """Split ``[rows, b, groups, (heads_per_group + 2) * d]``, norm, and turn query and key.

    Args:
        mixed: per KV group its query heads, key and value, as Megatron-Core's ``linear_qkv`` gives them.
        heads_per_group: query heads of a group.
        table: ``[2, rows, 1 or b, 1, r/2]`` of :func:`~phd_megatron.kernels.qkv_rope.rope_table`, or None to turn
            nothing. With b each sequence has positions of its own.
        weights: the norms' weights ``[d]`` by name, a subset of ``q``, ``k``, ``v``; what is missing is not normed.
        eps: added to the mean square.

    Returns:
        Query ``[rows, b, groups * heads_per_group, d]``, key and value ``[rows, b, groups, d]``. A value that is not
        normed shares memory with ``mixed``.

    Raises:
        ValueError: if shapes or names do not fit.
        UserError: where Triton cannot run.
    """
    width, rest = divmod(mixed.size(-1), heads_per_group + 2)
    if mixed.dim() != 4 or rest:
        raise ValueError(f"mixed {tuple(mixed.shape)}: [rows, b, groups, ({heads_per_group} + 2) * d] is needed")
    if not set(weights) <= {"q", "k", "v"} or any(w.shape != (width,) for w in weights.values()):
        found = {name: tuple(w.shape) for name, w in weights.items()}
        raise ValueError(f"weights {found}: norms of q, k and v have one weight of size {width}")
    rows, batch = mixed.shape[:2]
    lines = [(2, rows, samples, 1) for samples in (1, batch)]
    if table is not None and (table.shape[:-1] not in lines or 2 * table.size(-1) > width):
        raise ValueError(
            f"table {tuple(table.shape)} does not fit {rows} rows of {batch} sequences and head dimension {width}"
        )
    problem = qkv_norm_rope_problem(mixed.device, mixed.dtype, width)
    if problem is not None:
        raise UserError(f"the fused norm and RoPE cannot run here: {problem}")
    q, k, v = (weights.get(name) for name in "qkv")
    return _NormRope.apply(mixed, heads_per_group, table, q, k, v, eps)


def qkv_norm_rope_reference(
    mixed: Tensor, heads_per_group: int, table: Tensor | None, weights: Mapping[str, Tensor], eps: float
) -> Three:
    """The definition."""
    parts = list(split_qkv_reference(mixed, heads_per_group))
    for index, name in enumerate("qkv"):
        if name in weights:
            x = parts[index]
            scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            parts[index] = x * scale * weights[name]
        if table is not None and name != "v":
            parts[index] = rope_reference(parts[index], table)
    return parts[0], parts[1], parts[2]


def _constants(mixed: Tensor, heads_per_group: int, table: Tensor | None, norms: tuple[bool, ...]) -> dict[str, int]:
    width = mixed.size(-1) // (heads_per_group + 2)
    half = 0 if table is None else table.size(-1)
    return {
        "RATIO": heads_per_group,
        "NORM_Q": norms[0],
        "NORM_K": norms[1],
        "NORM_V": norms[2],
        "EACH": table is not None and table.size(2) > 1,
        "HALF": half,
        "D": width,
        "BLOCK_H": covering(half),
        "BLOCK_C": covering(width - 2 * half),
    }


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # projection, table, weights
    constants: dict[str, int]
    eps: float

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...  # None may be among them


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved,
        mixed: Tensor,
        heads_per_group: int,
        table: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        v_weight: Tensor | None,
        eps: float,
    ) -> Three:
        from .norm_rope_kernels import norm_rope_forward_kernel

        mixed = mixed if mixed.stride(-1) == 1 else mixed.contiguous()
        weights = (q_weight, k_weight, v_weight)
        rows, batch, groups, _ = mixed.shape
        constants = _constants(mixed, heads_per_group, table, tuple(w is not None for w in weights))
        query = mixed.new_empty(rows, batch, groups * heads_per_group, constants["D"])
        key = mixed.new_empty(rows, batch, groups, constants["D"])
        value = mixed[..., -constants["D"] :]  # a view; split_qkv_reference would copy the queries on the way
        if v_weight is not None:
            value = torch.empty_like(key)
        turn = mixed if table is None else table.contiguous()

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return -(-rows * batch // meta["BLOCK_R"]), groups * (heads_per_group + 2)

        norm_rope_forward_kernel[grid](
            *(mixed, turn, *(mixed if w is None else w for w in weights), query, key, value),
            *(mixed.stride()[:3], rows, batch, groups, eps),
            **constants,
        )
        ctx.save_for_backward(mixed, turn, *weights)
        ctx.constants, ctx.eps = constants, eps
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from .norm_rope_kernels import norm_rope_backward_kernel, norm_weight_gradient_kernel

        mixed, turn, *weights = ctx.saved_tensors
        constants, (rows, batch, groups, _) = ctx.constants, mixed.shape
        query, key, value = (x.contiguous() for x in grads)
        mixed_grad = torch.empty(mixed.shape, dtype=mixed.dtype, device=mixed.device)
        heads = constants["RATIO"] + 2
        normed = any(w is not None for w in weights)
        programs = min(-(-PROGRAMS // (groups * heads)), rows * batch)

        def grid(meta: dict[str, int]) -> tuple[int, int]:
            return programs if normed else -(-rows * batch // meta["BLOCK_R"]), groups * heads

        shape = (programs if normed else 0, groups, heads, constants["D"])
        partial = torch.empty(shape, dtype=torch.float32, device=mixed.device)
        norm_rope_backward_kernel[grid](
            *(query, key, value, mixed, turn, *(mixed if w is None else w for w in weights), mixed_grad, partial),
            *(mixed.stride()[:3], rows, batch, groups, ctx.eps),
            **constants,
        )
        found = [None if w is None else torch.empty_like(w) for w in weights]
        if normed:
            norm_weight_gradient_kernel[-(-constants["D"] // COLUMNS), 3](
                *(partial, *(mixed if w is None else w for w in found), programs * groups),
                **{name: constants[name] for name in ("RATIO", "NORM_Q", "NORM_K", "NORM_V", "D")},
                COLUMNS=COLUMNS,
                BLOCK_R=SUMMED_ROWS,
                num_warps=8,
            )
        return mixed_grad, None, None, *found, None
