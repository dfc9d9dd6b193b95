"""Triton kernels: flash-decoding for PHD, the KV length in parts, then the parts' merge by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from phd_megatron.kernels.phd_attention.triton_tiles import LOG2_E, hidden_visible, load_tile
from phd_megatron.kernels.triton_support import Tile, tuned

TILES = (
    Tile({"BLOCK_N": 128}, warps=4, stages=3),
    Tile({"BLOCK_N": 64}, warps=4, stages=4),
    Tile({"BLOCK_N": 64}, warps=4, stages=3),
    Tile({"BLOCK_N": 32}, warps=2, stages=3),
)
HIDDEN_TILE = tl.constexpr(64)


@triton.jit
def _step(q, k, v, visible, acc, top, total, scale, PRECISION: tl.constexpr):
    """One tile of keys; unlike in training a row may see nothing of it, and nothing at all in this part."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32) * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.math.exp2(scores - base[:, None])
    shrink = tl.math.exp2(top - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=tl.float32)
    return acc, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def _originals(
    key, key_step, value, value_step, key_position, begin, stop, query_position,
    q, acc, top, total, scale, CHECK: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of originals from ``begin``; with ``CHECK`` it may reach beyond ``stop``."""
    n = begin + tl.arange(0, BLOCK_N)
    valid = n < stop
    if CHECK:
        position = tl.load(key_position + n, mask=valid, other=-1).to(tl.int32)
    else:
        position = tl.load(key_position + n).to(tl.int32)
    k = load_tile(key, n.to(tl.int64) * key_step, valid, CHECK, D, BLOCK_D)
    v = load_tile(value, n.to(tl.int64) * value_step, valid, CHECK, D, BLOCK_D)
    visible = ((position >= 0) & (position <= query_position))[None, :]
    return _step(q, k, v, visible, acc, top, total, scale, PRECISION)


@tuned(TILES, ("COPIES", "RATIO", "HIDDEN", "BLOCK_D", "LONG"))
@triton.jit
def split_kernel(
    query,  # [Kq, b, groups, ratio, d]
    query_position,  # [b]
    key,  # [b, groups, L, d]
    value,
    key_position,  # [b, L], contiguous
    hidden_key,  # [b, groups, K - 1, r, d]
    hidden_value,
    hidden_position,  # [b, r], contiguous
    parts_out,  # [b * groups, parts, Kq * ratio, d] float32
    parts_lse,  # [b * groups, parts, Kq * ratio] float32, base 2; -inf where a row sees nothing of the part
    out,  # like query; written instead of the parts where there is one
    query_strides,
    key_strides,
    value_strides,
    hidden_key_strides,
    hidden_value_strides,
    out_strides,
    scale,
    groups,
    length,  # L
    hidden_length,  # r
    part_keys,  # originals of a part
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    LONG: tl.constexpr,  # whether parts are long: another tile may be quicker then
    ALONE: tl.constexpr,  # whether there is one part
    PDL: tl.constexpr,  # whether the merge is started early (programmatic dependent launch)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: copies and heads of one sequence and KV group over one part of its cache.

    All of them, up to ``BLOCK_M``; the third dimension of the grid has the others. The last part ends with the hidden
    keys; it may have no originals.
    """
    PACK: tl.constexpr = COPIES * RATIO
    if PDL:
        gdc_launch_dependents()
    part, bundle = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, group = bundle // groups, bundle % groups
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < PACK
    at = (row // RATIO).to(tl.int64) * query_strides[0] + row % RATIO * query_strides[3]
    q = load_tile(query + batch * query_strides[1] + group * query_strides[2], at, inside, True, D, BLOCK_D)
    position = tl.load(query_position + batch).to(tl.int32)
    scale = scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    start = part * part_keys
    stop = tl.minimum(start + part_keys, length)
    whole = start + tl.maximum(stop - start, 0) // BLOCK_N * BLOCK_N
    keys = key + batch * key_strides[0] + group * key_strides[1]
    values = value + batch * value_strides[0] + group * value_strides[1]
    positions = key_position + batch * length
    for begin in range(start, whole, BLOCK_N):
        acc, top, total = _originals(
            keys, key_strides[2], values, value_strides[2], positions, begin, stop, position,
            q, acc, top, total, scale, False, PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    if whole < stop:
        acc, top, total = _originals(
            keys, key_strides[2], values, value_strides[2], positions, whole, stop, position,
            q, acc, top, total, scale, True, PRECISION, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
    if HIDDEN > 0:
        copy = HIDDEN + 2 - COPIES + row // RATIO  # 1-based
        hidden_keys = hidden_key + batch * hidden_key_strides[0] + group * hidden_key_strides[1]
        hidden_values = hidden_value + batch * hidden_value_strides[0] + group * hidden_value_strides[1]
        hidden = tl.where(part == tl.num_programs(0) - 1, HIDDEN * hidden_length, 0)
        for begin in tl.range(0, hidden, HIDDEN_TILE, num_stages=1):
            entry = begin + tl.arange(0, HIDDEN_TILE)
            valid = entry < hidden
            n_copy, slot = entry // hidden_length, entry % hidden_length
            n_position = tl.load(hidden_position + batch * hidden_length + slot, mask=valid, other=-1).to(tl.int32)
            key_at = n_copy.to(tl.int64) * hidden_key_strides[2] + slot * hidden_key_strides[3]
            value_at = n_copy.to(tl.int64) * hidden_value_strides[2] + slot * hidden_value_strides[3]
            k = load_tile(hidden_keys, key_at, valid, True, D, BLOCK_D)
            v = load_tile(hidden_values, value_at, valid, True, D, BLOCK_D)
            visible = hidden_visible(position, copy[:, None], n_position[None, :], n_copy[None, :] + 2, WINDOW, CHUNK)
            visible &= (n_position >= 0)[None, :]
            acc, top, total = _step(q, k, v, visible, acc, top, total, scale, PRECISION)

    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < D)[None, :]
    weight = tl.where(total == 0.0, 1.0, total)
    acc = acc / weight[:, None]
    if ALONE:
        at = (row // RATIO).to(tl.int64) * out_strides[0] + row % RATIO * out_strides[3]
        at += batch * out_strides[1] + group * out_strides[2]
        tl.store(out + at[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        to = (bundle * tl.num_programs(0) + part) * PACK + row
        tl.store(parts_out + to[:, None] * D + column[None, :], acc, mask=mask)
        tl.store(parts_lse + to, top + tl.math.log2(weight), mask=inside)


@triton.jit
def combine_kernel(
    parts_out,  # [b * groups, parts, Kq * ratio, d] float32
    parts_lse,
    out,  # [Kq, b, groups, ratio, d]
    out_strides,
    groups,
    parts,
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    PDL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ``ROWS`` packed rows."""
    PACK: tl.constexpr = COPIES * RATIO
    bundle = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part, column = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    at = (bundle * parts + part)[None, :] * PACK + row[:, None]  # [ROWS, BLOCK_P]
    there = (part < parts)[None, :] & (row < PACK)[:, None]
    if PDL:
        gdc_wait()
    lse = tl.load(parts_lse + at, mask=there, other=float("-inf"))
    mask = there[:, :, None] & (column < D)[None, None, :]
    found = tl.load(parts_out + at[:, :, None] * D + column[None, None, :], mask=mask, other=0.0)
    top = tl.max(lse, 1)
    weights = tl.math.exp2(lse - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weights, 1)
    merged = tl.sum(found * weights[:, :, None], 1) / tl.where(total == 0.0, 1.0, total)[:, None]
    to = (row // RATIO).to(tl.int64) * out_strides[0] + row % RATIO * out_strides[3]
    to += bundle // groups * out_strides[1] + bundle % groups * out_strides[2]
    mask = (row < PACK)[:, None] & (column < D)[None, :]
    tl.store(out + to[:, None] + column[None, :], merged.to(out.dtype.element_ty), mask=mask)
