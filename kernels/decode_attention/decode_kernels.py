"""Triton kernels: flash-decoding for PHD, the KV length in parts, then the parts' merge by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from phd_megatron.kernels.phd_attention.fused_tiles import LOG2_E, hidden_visible, load_tile
from phd_megatron.kernels.triton_support import Tile, tuned

TILES = (
    Tile({"BLOCK_N": 64}, warps=4, stages=3),
    Tile({"BLOCK_N": 128}, warps=4, stages=2),
    Tile({"BLOCK_N": 128}, warps=8, stages=2),
    Tile({"BLOCK_N": 64}, warps=2, stages=3),
    Tile({"BLOCK_N": 32}, warps=2, stages=3),
)


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


@tuned(TILES, ("COPIES", "RATIO", "HIDDEN", "BLOCK_D"))
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
    out,  # [b * groups, parts, Kq * ratio, d] float32
    lse,  # [b * groups, parts, Kq * ratio] float32, base 2; -inf where a row sees nothing of the part
    query_strides,
    key_strides,
    value_strides,
    hidden_key_strides,
    hidden_value_strides,
    scale,
    groups,
    length,  # L
    hidden_length,  # r
    part_tiles,  # tiles of a part
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,  # keys; hidden ones are counted behind the originals' last tile
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: all copies and heads of one sequence and KV group over one part of its cache."""
    PACK: tl.constexpr = COPIES * RATIO
    part, bundle = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, group = bundle // groups, bundle % groups
    row = tl.arange(0, BLOCK_M)
    inside = row < PACK
    at = (row // RATIO).to(tl.int64) * query_strides[0] + row % RATIO * query_strides[3]
    q = load_tile(query + batch * query_strides[1] + group * query_strides[2], at, inside, True, D, BLOCK_D)
    position = tl.load(query_position + batch).to(tl.int32)
    copy = HIDDEN + 2 - COPIES + row // RATIO  # 1-based
    scale = scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    near = tl.arange(0, BLOCK_N)

    start, stop = part * part_tiles * TILE, (part + 1) * part_tiles * TILE
    stop_original = tl.minimum(stop, length)
    keys = key + batch * key_strides[0] + group * key_strides[1]
    values = value + batch * value_strides[0] + group * value_strides[1]
    for begin in range(start, stop_original, BLOCK_N):
        n = begin + near
        valid = n < stop_original
        n_position = tl.load(key_position + batch * length + n, mask=valid, other=-1).to(tl.int32)
        k = load_tile(keys, n.to(tl.int64) * key_strides[2], valid, True, D, BLOCK_D)
        v = load_tile(values, n.to(tl.int64) * value_strides[2], valid, True, D, BLOCK_D)
        visible = ((n_position >= 0) & (n_position <= position))[None, :] & inside[:, None]
        acc, top, total = _step(q, k, v, visible, acc, top, total, scale, PRECISION)
    if HIDDEN > 0:
        first_hidden = tl.cdiv(length, TILE) * TILE
        stop_hidden = tl.minimum(stop - first_hidden, HIDDEN * hidden_length)
        hidden_keys = hidden_key + batch * hidden_key_strides[0] + group * hidden_key_strides[1]
        hidden_values = hidden_value + batch * hidden_value_strides[0] + group * hidden_value_strides[1]
        for begin in range(tl.maximum(start - first_hidden, 0), stop_hidden, BLOCK_N):
            entry = begin + near
            valid = entry < stop_hidden
            n_copy, slot = entry // hidden_length, entry % hidden_length
            n_position = tl.load(hidden_position + batch * hidden_length + slot, mask=valid, other=-1).to(tl.int32)
            key_at = n_copy.to(tl.int64) * hidden_key_strides[2] + slot * hidden_key_strides[3]
            value_at = n_copy.to(tl.int64) * hidden_value_strides[2] + slot * hidden_value_strides[3]
            k = load_tile(hidden_keys, key_at, valid, True, D, BLOCK_D)
            v = load_tile(hidden_values, value_at, valid, True, D, BLOCK_D)
            visible = (valid & (n_position >= 0))[None, :] & inside[:, None]
            visible &= hidden_visible(position, copy[:, None], n_position[None, :], n_copy[None, :] + 2, WINDOW, CHUNK)
            acc, top, total = _step(q, k, v, visible, acc, top, total, scale, PRECISION)

    column = tl.arange(0, BLOCK_D)
    to = (bundle * tl.num_programs(0) + part) * PACK + row
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + to[:, None] * D + column[None, :], acc, mask=inside[:, None] & (column < D)[None, :])
    tl.store(lse + to, top + tl.math.log2(tl.where(total == 0.0, 1.0, total)), mask=inside)


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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program: one packed row."""
    PACK: tl.constexpr = COPIES * RATIO
    row, bundle = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, column = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    at = (bundle * parts + part) * PACK + row
    lse = tl.load(parts_lse + at, mask=part < parts, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.math.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    mask = (part < parts)[:, None] & (column < D)[None, :]
    found = tl.load(parts_out + at[:, None] * D + column[None, :], mask=mask, other=0.0)
    merged = tl.sum(found * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    to = (row // RATIO).to(tl.int64) * out_strides[0] + row % RATIO * out_strides[3]
    to += bundle // groups * out_strides[1] + bundle % groups * out_strides[2]
    tl.store(out + to + column, merged.to(out.dtype.element_ty), mask=column < D)
