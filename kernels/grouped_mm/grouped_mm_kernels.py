"""Triton kernels over matrices of groups: zeros where a group has no rows, and sums where it has."""

from __future__ import annotations

import triton
import triton.language as tl

CLEARED = 8192  # elements of a program
ADDED = 4096


@triton.jit
def _has_rows(ends, group):
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    return tl.load(ends + group) != start


@triton.jit
def clear_empty_groups_kernel(matrices, ends, size, BLOCK: tl.constexpr):
    """One program: ``BLOCK`` of the ``size`` elements of one matrix, if its group is empty."""
    group = tl.program_id(0).to(tl.int64)
    if not _has_rows(ends, group):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], dtype=matrices.dtype.element_ty)
        tl.store(matrices + group * size + at, zeros, mask=at < size)


@triton.jit
def add_groups_kernel(totals, matrices, ends, size, BLOCK: tl.constexpr):
    """One program: ``BLOCK`` of the ``size`` elements of one matrix added to the total's, unless its group is empty."""
    group = tl.program_id(0).to(tl.int64)
    if _has_rows(ends, group):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        place = group * size + at
        more = tl.load(matrices + place, mask=inside).to(tl.float32)
        total = tl.load(totals + place, mask=inside).to(tl.float32)
        tl.store(totals + place, (total + more).to(totals.dtype.element_ty), mask=inside)
