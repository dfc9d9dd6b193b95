"""Triton kernels: cross-entropy over one rank's part of the vocabulary, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096  # columns that a program holds at a time
WARPS = 8


@triton.jit
def cross_entropy_statistics_kernel(
    logits,  # [rows, columns], contiguous
    labels,  # [rows] int64, global token ids
    top,  # [rows] float32, like the next two: maximum
    total,  # sum of exp(logit - maximum); 0 where every logit is -inf
    target,  # the label's logit, 0 where it is another rank's
    first,  # this rank's first token id
    columns,
    BLOCK: tl.constexpr,
):
    """One program: one row, read once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    peaks = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        mask = begin + column < columns
        x = tl.load(logits + row * columns + begin + column, mask=mask, other=float("-inf")).to(tl.float32)
        new = tl.maximum(peaks, x)
        base = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(peaks - base) + tl.exp(x - base)
        peaks = new
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(top + row, peak)
    tl.store(total + row, tl.sum(sums * tl.exp(peaks - base), 0))
    label = tl.load(labels + row) - first
    mine = (label >= 0) & (label < columns)
    tl.store(target + row, tl.load(logits + row * columns + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def cross_entropy_gradient_kernel(
    logits,  # [rows, columns]; overwritten with their gradient
    labels,
    lse,  # [rows] float32, over all ranks
    grad,  # [rows] float32, of the losses
    first,
    columns,
    BLOCK: tl.constexpr,
):
    """One program: ``BLOCK`` columns of one row; ``(softmax - one-hot) * grad``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = logits + row * columns + column, column < columns
    x = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
    label = tl.load(labels + row) - first
    slope = tl.exp(x - tl.load(lse + row)) - tl.where(column == label, 1.0, 0.0)
    tl.store(at, (slope * tl.load(grad + row)).to(logits.dtype.element_ty), mask=mask)
