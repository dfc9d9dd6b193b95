"""Triton kernels: rows gathered by index, alone or summed; each is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def gather_kernel(rows, source, out, columns, BLOCK: tl.constexpr):
    """One program: ``BLOCK`` columns of ``out[r] = rows[source[r]]``; both ``[..., columns]``, dense."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    taken = tl.load(source + row)
    tl.store(out + row * columns + column, tl.load(rows + taken * columns + column, mask=mask), mask=mask)


@triton.jit
def gather_sum_kernel(rows, places, out, columns, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: ``BLOCK`` columns of ``out[t] = sum_j rows[places[t, j]]``, ``places`` ``[T, COUNT]``."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(COUNT):
        taken = tl.load(places + token * COUNT + j)
        total += tl.load(rows + taken * columns + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=mask)
