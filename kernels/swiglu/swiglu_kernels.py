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
def swiglu_backward_kernel(grad, gate_and_up, out, columns, rows_stride, BLOCK: tl.constexpr):
    """The same for the gradient of ``gate_and_up``, dense; ``grad`` is ``[rows, columns]``, dense."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    g = tl.load(grad + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_and_up + row * rows_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_and_up + row * rows_stride + columns + column, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    gate_grad = g * up * share * (1.0 + gate * (1.0 - share))
    target = out + row * 2 * columns + column
    tl.store(target, gate_grad.to(out.dtype.element_ty), mask=mask)
    tl.store(target + columns, (g * gate * share).to(out.dtype.element_ty), mask=mask)
