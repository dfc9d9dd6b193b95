"""Products of groups of rows, each with a matrix of its own: the linear layers of all experts in one operation.

Rows are sorted by group; ``ends[e]`` is the row after the last one of group ``e``, on the device, so that nothing waits
for the host and the products can be part of a CUDA graph. :func:`grouped_linear` takes
``torch.nn.functional.grouped_mm`` where that has a kernel, and a product per group elsewhere;
:func:`grouped_linear_reference` is the definition.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from phd_megatron.kernels.triton_support import runs_on_gpu

#: bytes by which the kernels want rows to be aligned
ALIGNMENT = 16


def grouped_mm_problem(dtype: torch.dtype, compute_capability: tuple[int, int] | None) -> str | None:
    """Why torch's grouped product does not run in this type, or None where it does.

    Args:
        compute_capability: of the CUDA device; None is the CPU.
    """
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm; use torch 2.10 or newer"
    if dtype != torch.bfloat16:
        return f"torch's grouped_mm multiplies in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if compute_capability is not None and compute_capability < (8, 0):
        return f"torch's grouped_mm needs compute capability 8.0, and this is {'.'.join(map(str, compute_capability))}"
    return None


@cache
def _has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return grouped_mm_problem(dtype, capability) is None


def width_problem(*widths: int) -> str | None:
    """Why bfloat16 rows of these widths do not do for it, or None where they do."""
    odd = [width for width in widths if width * torch.bfloat16.itemsize % ALIGNMENT]
    if not odd:
        return None
    return f"torch's grouped_mm wants rows aligned to {ALIGNMENT} bytes, and {odd[0]} is not a multiple of 8"


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row times the transposed matrix of its group.

    Args:
        rows: ``[R, in]``, sorted by group.
        weight: ``[E, out, in]``.
        ends: ``[E]`` int32, ascending; the last one is R. Equal neighbours are a group without rows.

    Returns:
        ``[R, out]``. The gradient of a group without rows is zero. Where Megatron-Core's DDP has put a ``main_grad``
        beside the weight, the gradient is added there, and ``grad_added_to_main_grad`` says so, as its own layers do
        under ``gradient_accumulation_fusion``; what autograd hands on is then not to be read.
    """
    grouped = _has_grouped_mm(rows.device, rows.dtype) and width_problem(*weight.shape[1:]) is None
    return _GroupedLinear.apply(rows, weight, ends, grouped)


def grouped_linear_reference(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same through ordinary operations, one product a group; the host reads ``ends``."""
    return torch.cat([part @ matrix.T for part, matrix in zip(_parts(rows, ends), weight, strict=True)])


class _Saved(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    parameter: Any  # the weight, with the attributes of Megatron-Core's DDP where that wraps the model
    needs_input_grad: tuple[bool, ...]
    grouped: bool


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, rows: Tensor, weight: Tensor, ends: Tensor, grouped: bool) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight, ends)
        ctx.parameter, ctx.grouped = weight, grouped and len(rows) > 0
        return _product(rows, weight.transpose(1, 2), ends, ctx.grouped)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Saved, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        rows_grad = _product(grad, weight, ends, ctx.grouped) if ctx.needs_input_grad[0] else None
        weight_grad = _weight_gradient(grad, rows, ends, ctx.grouped) if ctx.needs_input_grad[1] else None
        if weight_grad is not None:
            weight_grad = _accumulated(weight_grad, ctx.parameter, ends)
        return rows_grad, weight_grad, None, None


def _product(rows: Tensor, matrices: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """``[R, a]`` and ``[E, a, b]`` to ``[R, b]``."""
    if grouped:
        return F.grouped_mm(rows, matrices, offs=ends)
    out = rows.new_empty(len(rows), matrices.size(2))
    for part, matrix, target in zip(_parts(rows, ends), matrices, _parts(out, ends), strict=True):
        torch.mm(part, matrix, out=target)
    return out


def _weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """``[R, out]`` and ``[R, in]`` to ``[E, out, in]``."""
    if grouped:
        return F.grouped_mm(grad.T, rows, offs=ends)  # groups without rows: see _accumulated
    parts = zip(_parts(grad, ends), _parts(rows, ends), strict=True)
    return torch.stack([part.T @ inputs for part, inputs in parts])


def _accumulated(gradient: Tensor, parameter: Any, ends: Tensor) -> Tensor:
    """Add it to the parameter's ``main_grad`` where there is one; else only zero what groups without rows have."""
    if not hasattr(parameter, "main_grad") or not hasattr(parameter, "grad_added_to_main_grad"):
        return clear_empty_groups(gradient, ends)
    add_groups(parameter.main_grad, gradient, ends)
    parameter.grad_added_to_main_grad = True
    return gradient  # DDP's hook waits for one, and drops it


def _parts(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return rows.tensor_split(ends[:-1].tolist())


def clear_empty_groups(gradient: Tensor, ends: Tensor) -> Tensor:
    """Zero in ``[E, out, in]``, in place, what groups without rows have.

    On compute capability 10.0 torch's kernel leaves there what was in the memory before (pytorch issue 172439).
    """
    if runs_on_gpu(gradient.device, gradient.dtype):
        return clear_empty_groups_triton(gradient, ends)
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    return gradient.masked_fill_(empty.view(-1, 1, 1), 0)


def clear_empty_groups_triton(gradient: Tensor, ends: Tensor) -> Tensor:
    """The same in Triton, which touches nothing but those groups."""
    from .grouped_mm_kernels import CLEARED, clear_empty_groups_kernel

    size = gradient[0].numel()
    clear_empty_groups_kernel[(gradient.size(0), -(-size // CLEARED))](gradient, ends, size, BLOCK=CLEARED)
    return gradient


def add_groups(total: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    """Add ``[E, out, in]`` to ``total``, of any floating type, in place, but for groups without rows.

    As ``total.add_(clear_empty_groups(gradient, ends))``, bit for bit. Where torch adds a bfloat16 to a float32 tensor,
    three fifths of an H200's bandwidth are used (docs/benchmarks.md).
    """
    if runs_on_gpu(gradient.device, gradient.dtype) and total.is_contiguous() and gradient.is_contiguous():
        return add_groups_triton(total, gradient, ends)
    return total.add_(clear_empty_groups(gradient, ends))


def add_groups_triton(total: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    """The same in Triton. Both are contiguous."""
    from .grouped_mm_kernels import ADDED, add_groups_kernel

    size = gradient[0].numel()
    add_groups_kernel[(gradient.size(0), -(-size // ADDED))](total, gradient, ends, size, BLOCK=ADDED, num_warps=8)
    return total
