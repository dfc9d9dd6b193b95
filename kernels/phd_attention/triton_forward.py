"""Triton kernel: PHD attention forward, originals and hidden window in one pass of online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from phd_megatron.kernels.triton_support import Tile, tuned

from .triton_tiles import (
    LN_2,
    LOG2_E,
    TUNING_KEY,
    bundle_offset,
    first_hidden,
    hidden_tile,
    load_tile,
    packed_queries,
    query_offsets,
    softmax_step,
    store_tile,
)

TILES = (
    Tile({"BLOCK_M": 128, "BLOCK_N": 64}, warps=8, stages=3),
    Tile({"BLOCK_M": 128, "BLOCK_N": 64}, warps=4, stages=3),
    Tile({"BLOCK_M": 128, "BLOCK_N": 128}, warps=8, stages=2),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, warps=4, stages=2),
    Tile({"BLOCK_M": 64, "BLOCK_N": 32}, warps=4, stages=2),
    Tile({"BLOCK_M": 32, "BLOCK_N": 32}, warps=4, stages=2),
)


@tuned(TILES, TUNING_KEY)
@triton.jit
def forward_kernel(
    query,  # [Kq, s, b, groups, ratio, d]
    key,  # [1, keys, b, groups, d], originals
    value,
    hidden_key,  # [K - 1, hidden rows, b, groups, d]
    hidden_value,
    out,  # like query
    lse,  # [b * groups, SLICES * slice_length * Kq * ratio] float32, packed rows, natural logarithm
    query_strides,
    key_strides,
    value_strides,
    hidden_key_strides,
    hidden_value_strides,
    out_strides,
    scale,  # factor on the scores
    groups,
    slice_length,  # tokens of each slice
    starts,  # position of each slice's first token
    hidden_starts,  # position of the hidden row that hidden_bases names: the slice's start less its halo
    hidden_bases,
    SLICES: tl.constexpr,
    COPIES: tl.constexpr,  # Kq
    RATIO: tl.constexpr,  # query heads of a KV group
    HIDDEN: tl.constexpr,  # K - 1
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: ``BLOCK_M`` packed query rows of one sequence and KV group over everything they see."""
    PACK: tl.constexpr = COPIES * RATIO
    FIRST_COPY: tl.constexpr = HIDDEN + 2 - COPIES
    rows = slice_length * PACK
    tiles = tl.cdiv(rows, BLOCK_M)
    index = SLICES * tiles - 1 - tl.program_id(0)  # the longest rows first, so that the last wave is short
    part = index // tiles
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    start, hidden_start, hidden_base = starts[0], hidden_starts[0], hidden_bases[0]
    if SLICES == 2:
        start = tl.where(part == 0, start, starts[1])
        hidden_start = tl.where(part == 0, hidden_start, hidden_starts[1])
        hidden_base = tl.where(part == 0, hidden_base, hidden_bases[1])

    scale = scale * LOG2_E  # exponentials are taken in base 2
    first_row = index % tiles * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    token, position, copy, copy_number, head = packed_queries(row, start, COPIES, RATIO, FIRST_COPY)
    token += part * slice_length
    first = start + first_row // PACK  # positions of the tile's first and last token
    last = start + (tl.minimum(first_row + BLOCK_M, rows) - 1) // PACK
    q = load_tile(query, query_offsets(token, copy, head, batch, group, query_strides), inside, True, D, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    near = tl.arange(0, BLOCK_N)
    key += bundle_offset(batch, group, key_strides)
    value += bundle_offset(batch, group, value_strides)
    key_step, value_step = tl.cast(key_strides[1], tl.int64), tl.cast(value_strides[1], tl.int64)
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N  # keys before it need no mask
    for begin in range(0, seen_by_all, BLOCK_N):
        k = load_tile(key + begin * key_step, near * key_strides[1], near >= 0, False, D, BLOCK_D)
        v = load_tile(value + begin * value_step, near * value_strides[1], near >= 0, False, D, BLOCK_D)
        acc, top, total = softmax_step(q, k, v, True, acc, top, total, scale, False, PRECISION)
    for begin in range(seen_by_all, last + 1, BLOCK_N):
        n = begin + near
        k = load_tile(key + begin * key_step, near * key_strides[1], n <= last, True, D, BLOCK_D)
        v = load_tile(value + begin * value_step, near * value_strides[1], n <= last, True, D, BLOCK_D)
        visible = n[None, :] <= tl.minimum(position, last)[:, None]
        acc, top, total = softmax_step(q, k, v, visible, acc, top, total, scale, True, PRECISION)

    if HIDDEN > 0:
        low = tl.maximum(first_hidden(first, WINDOW, CHUNK), hidden_start)
        for begin in range(0, (last + 1 - low) * HIDDEN, BLOCK_N):
            k, v, visible = hidden_tile(
                begin, low, last, hidden_key, hidden_value, hidden_key_strides, hidden_value_strides, hidden_start,
                hidden_base, batch, group, position, copy_number, HIDDEN, WINDOW, CHUNK, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            acc, top, total = softmax_step(q, k, v, visible, acc, top, total, scale, True, PRECISION)

    store_at = query_offsets(token, copy, head, batch, group, out_strides)
    store_tile(out, store_at, acc / total[:, None], inside, D, BLOCK_D)
    packed = tl.program_id(1).to(tl.int64) * (SLICES * rows) + part * rows + row
    tl.store(lse + packed, (top + tl.math.log2(total)) * LN_2, mask=inside)
