"""Triton kernel: zeros for the matrices of groups without rows."""

from __future__ import annotations

import triton
import triton.language as tl

CLEARED = 8192  # elements of a program


@triton.jit
def clear_empty_groups_kernel(matrices, ends, size, BLOCK: tl.constexpr):
    """One program: ``BLOCK`` of the ``size`` elements of one matrix, if its group is empty."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    if tl.load(ends + group) == start:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], dtype=matrices.dtype.element_ty)
        tl.store(matrices + group * size + at, zeros, mask=at < size)
