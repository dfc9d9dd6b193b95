"""Triton kernels: SwiGLU forward and backward, each tensor read and written once."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def swiglu_forward_kernel(gate_and_up, out, columns, rows_stride, BLOCK: tl.constexpr):
    """One program: ``BLOCK`` columns of one row of ``[rows, 2 * columns]``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    gate = tl.load(gate_and_up + row * rows_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + row * rows_stride + columns + column, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(g, gate, up):
    """Of gate and up, where ``g`` is that of ``silu(gate) * up``."""
    share = tl.sigmoid(gate)
    return g * up * share * (1.0 + gate * (1.0 - share)), g * gate * share


@triton.jit
def swiglu_backward_kernel(grad, gate_and_up, out, columns, rows_stride, BLOCK: tl.constexpr):
    """The same for the gradient of ``gate_and_up``, dense; ``grad`` is ``[rows, columns]``, dense."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = tl.load(grad + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_and_up + row * rows_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + row * rows_stride + columns + column, mask=mask, other=0.0).to(tl.float32)
    gate_grad, up_grad = _gradients(g, gate, up)
    target = out + row * 2 * columns + column
    tl.store(target, gate_grad.to(out.dtype.element_ty), mask=mask)
    tl.store(target + columns, up_grad.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weighted_swiglu_forward_kernel(gate_and_up, weights, out, columns, BLOCK: tl.constexpr):
    """One program: ``BLOCK`` columns of one row of ``[rows, 2 * columns]``, dense, times the row's weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    start = gate_and_up + row * 2 * columns + column
    gate = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up * tl.load(weights + row).to(tl.float32)
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weighted_swiglu_backward_kernel(grad, gate_and_up, weights, out, weights_grad, columns, BLOCK: tl.constexpr):
    """One program: the gradients of one row of ``gate_and_up`` and of its weight; all dense."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < columns
        g = tl.load(grad + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        start = row * 2 * columns + column
        gate = tl.load(gate_and_up + start, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_and_up + start + columns, mask=mask, other=0.0).to(tl.float32)
        gate_grad, up_grad = _gradients(g, gate, up)
        total += up_grad * up
        tl.store(out + start, (weight * gate_grad).to(out.dtype.element_ty), mask=mask)
        tl.store(out + start + columns, (weight * up_grad).to(out.dtype.element_ty), mask=mask)
    tl.store(weights_grad + row, tl.sum(total).to(weights_grad.dtype.element_ty))
