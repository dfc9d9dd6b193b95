"""Triton kernels: per-head RMSNorm and RoPE of the fused QKV projection, forward and backward.

A head is held in three pieces: the two halves that RoPE turns against each other, and the columns it leaves alone. Each
is loaded once, densely. Without RoPE the third piece is the whole head; an empty piece takes one column of zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phd_megatron.kernels.triton_support import Tile, tuned

TILES = (
    Tile({"BLOCK_R": 32}, warps=4),
    Tile({"BLOCK_R": 64}, warps=4),
    Tile({"BLOCK_R": 128}, warps=8),
    Tile({"BLOCK_R": 16}, warps=2),
    Tile({"BLOCK_R": 8}, warps=2),
)
KEY = ("RATIO", "NORM_Q", "NORM_K", "NORM_V", "HALF", "D")


@triton.jit
def _piece(pointer, at, inside, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """``[R, BLOCK]`` float32: columns ``FIRST .. FIRST + SIZE`` of rows at offsets ``at``, zero outside."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < SIZE)[None, :]
    return tl.load(pointer + at[:, None] + (FIRST + column)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_piece(pointer, at, tile, inside, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < SIZE)[None, :]
    tl.store(pointer + at[:, None] + (FIRST + column)[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _head(pointer, at, inside, HALF: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    """The three pieces of a head."""
    a = _piece(pointer, at, inside, 0, HALF, BLOCK_H)
    b = _piece(pointer, at, inside, HALF, HALF, BLOCK_H)
    c = _piece(pointer, at, inside, 2 * HALF, D - 2 * HALF, BLOCK_C)
    return a, b, c


@triton.jit
def _store_head(
    pointer, at, a, b, c, inside, HALF: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr
):
    _store_piece(pointer, at, a, inside, 0, HALF, BLOCK_H)
    _store_piece(pointer, at, b, inside, HALF, HALF, BLOCK_H)
    _store_piece(pointer, at, c, inside, 2 * HALF, D - 2 * HALF, BLOCK_C)


@triton.jit
def _weight(pointer, HALF: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    """The three pieces of a norm's weight, each ``[1, BLOCK]``."""
    h, c = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    first = tl.load(pointer + h, mask=h < HALF, other=0.0).to(tl.float32)
    second = tl.load(pointer + HALF + h, mask=h < HALF, other=0.0).to(tl.float32)
    rest = tl.load(pointer + 2 * HALF + c, mask=c < D - 2 * HALF, other=0.0).to(tl.float32)
    return first[None, :], second[None, :], rest[None, :]


@triton.jit
def _inner(a, b, c, x, y, z):
    """Inner products of rows, ``[R, 1]``."""
    return (tl.sum(a * x, 1) + tl.sum(b * y, 1) + tl.sum(c * z, 1))[:, None]


@triton.jit
def _turning(
    table, pair, inside, rows, batch, EACH: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Cosines and sines ``[R, BLOCK_H]`` of (row, sequence) pairs."""
    line, lines = (pair, rows * batch) if EACH else (pair // batch, rows)
    at = line.to(tl.int64) * HALF
    cos = _piece(table, at, inside, 0, HALF, BLOCK_H)
    return cos, _piece(table, at + tl.cast(lines, tl.int64) * HALF, inside, 0, HALF, BLOCK_H)


@triton.jit
def _forward_head(
    source, at, target, to, inside, weight, cos, sin, eps, NORM: tl.constexpr, TURN: tl.constexpr,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Norm and turn one head of a tile of rows."""
    a, b, c = _head(source, at, inside, HALF, D, BLOCK_H, BLOCK_C)
    if NORM:
        scale = tl.rsqrt(_inner(a, b, c, a, b, c) / D + eps)
        wa, wb, wc = _weight(weight, HALF, D, BLOCK_H, BLOCK_C)
        a, b, c = a * scale * wa, b * scale * wb, c * scale * wc
    if TURN:
        a, b = a * cos - b * sin, b * cos + a * sin
    _store_head(target, to, a, b, c, inside, HALF, D, BLOCK_H, BLOCK_C)


@triton.jit
def _backward_head(
    grad, grad_at, source, at, target, to, inside, weight, cos, sin, eps, ta, tb, tc,
    NORM: tl.constexpr, TURN: tl.constexpr,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of one head of a tile of rows; returns the weight's, ``ta, tb, tc``, with this head's added."""
    a, b, c = _head(grad, grad_at, inside, HALF, D, BLOCK_H, BLOCK_C)
    if TURN:
        a, b = a * cos + b * sin, b * cos - a * sin
    if NORM:
        # With n = x * scale: dweight = sum(g * n), dx = scale * (g * w - n * mean(g * w * n)).
        x, y, z = _head(source, at, inside, HALF, D, BLOCK_H, BLOCK_C)
        scale = tl.rsqrt(_inner(x, y, z, x, y, z) / D + eps)
        x, y, z = x * scale, y * scale, z * scale
        ta, tb, tc = ta + tl.sum(a * x, 0), tb + tl.sum(b * y, 0), tc + tl.sum(c * z, 0)
        wa, wb, wc = _weight(weight, HALF, D, BLOCK_H, BLOCK_C)
        a, b, c = a * wa, b * wb, c * wc
        mean = _inner(a, b, c, x, y, z) / D
        a, b, c = scale * (a - x * mean), scale * (b - y * mean), scale * (c - z * mean)
    _store_head(target, to, a, b, c, inside, HALF, D, BLOCK_H, BLOCK_C)
    return ta, tb, tc


@tuned(TILES, KEY)
@triton.jit
def norm_rope_forward_kernel(
    mixed,  # [rows, b, groups, (RATIO + 2) * D]
    table,  # [2, rows, b, HALF] with EACH, else [2, rows, HALF]
    q_weight,  # [D] each; not read where the norm is off
    k_weight,
    v_weight,
    query,  # [rows, b, groups * RATIO, D], contiguous, as are the next two
    key,  # [rows, b, groups, D]
    value,  # not written without NORM_V
    mixed_strides,  # of rows, batch and groups
    rows,
    batch,
    groups,
    eps,
    RATIO: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    NORM_V: tl.constexpr,
    EACH: tl.constexpr,  # each sequence is turned by positions of its own
    HALF: tl.constexpr,  # half the turned columns; 0 turns nothing
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: one head of one KV group in ``BLOCK_R`` (row, sequence) pairs."""
    TURN: tl.constexpr = HALF > 0
    pair = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = pair < rows * batch
    group, head = tl.program_id(1) // (RATIO + 2), tl.program_id(1) % (RATIO + 2)
    at = _places(pair, group, head, batch, mixed_strides, D)
    bundle = pair.to(tl.int64) * groups + group  # (row, sequence, group)
    if head < RATIO:
        cos, sin = _turning(table, pair, inside, rows, batch, EACH, HALF, BLOCK_H)
        _forward_head(
            mixed, at, query, (bundle * RATIO + head) * D, inside, q_weight, cos, sin, eps,
            NORM_Q, TURN, HALF, D, BLOCK_H, BLOCK_C,
        )  # fmt: skip
    elif head == RATIO:
        cos, sin = _turning(table, pair, inside, rows, batch, EACH, HALF, BLOCK_H)
        _forward_head(
            mixed, at, key, bundle * D, inside, k_weight, cos, sin, eps,
            NORM_K, TURN, HALF, D, BLOCK_H, BLOCK_C,
        )  # fmt: skip
    elif NORM_V:
        _forward_head(
            mixed, at, value, bundle * D, inside, v_weight, 0.0, 0.0, eps,
            True, False, HALF, D, BLOCK_H, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _places(pair, group, head, batch, mixed_strides, D: tl.constexpr):
    """Where one head of (row, sequence) pairs begins in the projection's output."""
    row = pair // batch
    at = row.to(tl.int64) * mixed_strides[0] + (pair - row * batch).to(tl.int64) * mixed_strides[1]
    return at + group.to(tl.int64) * mixed_strides[2] + head * D


@tuned(TILES, KEY)
@triton.jit
def norm_rope_backward_kernel(
    query_grad,  # contiguous, as are all gradients
    key_grad,
    value_grad,
    mixed,
    table,
    q_weight,
    k_weight,
    v_weight,
    mixed_grad,  # [rows, b, groups, (RATIO + 2) * D]
    partial,  # [programs, groups, RATIO + 2, D] float32: each program's gradient of its head's weight
    mixed_strides,
    rows,
    batch,
    groups,
    eps,
    RATIO: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    NORM_V: tl.constexpr,
    EACH: tl.constexpr,
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: one head in every so many-th tile of rows, so that few weight gradients are left to add up."""
    TURN: tl.constexpr = HALF > 0
    group, head = tl.program_id(1) // (RATIO + 2), tl.program_id(1) % (RATIO + 2)
    a, b, c = tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows * batch, BLOCK_R), tl.num_programs(0)):
        pair = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = pair < rows * batch
        at = _places(pair, group, head, batch, mixed_strides, D)
        bundle = pair.to(tl.int64) * groups + group
        to = (bundle * (RATIO + 2) + head) * D
        if head < RATIO:
            cos, sin = _turning(table, pair, inside, rows, batch, EACH, HALF, BLOCK_H)
            a, b, c = _backward_head(
                query_grad, (bundle * RATIO + head) * D, mixed, at, mixed_grad, to, inside,
                q_weight, cos, sin, eps, a, b, c, NORM_Q, TURN, HALF, D, BLOCK_H, BLOCK_C,
            )  # fmt: skip
        elif head == RATIO:
            cos, sin = _turning(table, pair, inside, rows, batch, EACH, HALF, BLOCK_H)
            a, b, c = _backward_head(
                key_grad, bundle * D, mixed, at, mixed_grad, to, inside,
                k_weight, cos, sin, eps, a, b, c, NORM_K, TURN, HALF, D, BLOCK_H, BLOCK_C,
            )  # fmt: skip
        else:
            a, b, c = _backward_head(
                value_grad, bundle * D, mixed, at, mixed_grad, to, inside,
                v_weight, 0.0, 0.0, eps, a, b, c, NORM_V, False, HALF, D, BLOCK_H, BLOCK_C,
            )  # fmt: skip
    if NORM_Q or NORM_K or NORM_V:
        part = partial + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D
        _store_weight(part, a, b, c, HALF, D, BLOCK_H, BLOCK_C)


@triton.jit
def _store_weight(pointer, a, b, c, HALF: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    h, r = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    tl.store(pointer + h, a, mask=h < HALF)
    tl.store(pointer + HALF + h, b, mask=h < HALF)
    tl.store(pointer + 2 * HALF + r, c, mask=r < D - 2 * HALF)


@triton.jit
def norm_weight_gradient_kernel(
    partial,  # [programs, groups, RATIO + 2, D] float32
    q_grad,  # [D] each; not written where the norm is off
    k_grad,
    v_grad,
    bundles,  # programs * groups
    RATIO: tl.constexpr,
    NORM_Q: tl.constexpr,
    NORM_K: tl.constexpr,
    NORM_V: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: ``COLUMNS`` columns of one norm's weight gradient, added up in a fixed order."""
    norm = tl.program_id(1)
    if norm == 0:
        if NORM_Q:
            _add_up(partial, q_grad, bundles, 0, RATIO, RATIO + 2, D, COLUMNS, BLOCK_R)
    elif norm == 1:
        if NORM_K:
            _add_up(partial, k_grad, bundles, RATIO, 1, RATIO + 2, D, COLUMNS, BLOCK_R)
    elif NORM_V:
        _add_up(partial, v_grad, bundles, RATIO + 1, 1, RATIO + 2, D, COLUMNS, BLOCK_R)


@triton.jit
def _add_up(
    partial, target, bundles, FIRST: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Heads ``FIRST .. FIRST + COUNT`` of every bundle's ``HEADS``."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < D)[None, :]
    total = tl.zeros([BLOCK_R, COLUMNS], tl.float32)
    for begin in range(0, bundles * COUNT, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R)
        at = (row // COUNT * HEADS + FIRST + row % COUNT) * D
        mask = (row < bundles * COUNT)[:, None] & inside
        total += tl.load(partial + at[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(target + column, tl.sum(total, 0).to(target.dtype.element_ty), mask=column < D)
