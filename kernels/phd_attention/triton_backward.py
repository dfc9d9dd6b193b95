"""Triton kernels: PHD attention backward.

Two passes, each over what it owns, so that nothing is added up between programs and every run gives the same bits:
``query_gradient_kernel`` holds a tile of packed queries and walks over its keys, ``key_gradient_kernel`` holds a tile
of keys and walks over the queries that see it; the sum over copies and query heads of a group stays in registers. With
``ATOMIC_DQ`` the second pass also adds up dq in memory and the first is not run: two matrix products fewer of seven,
float32 atomics, and an order of summation that changes from run to run.

Both recompute ``p = exp(s - lse)`` from the merged log-sum-exp and use ``ds = p * (dp - delta)``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phd_megatron.kernels.triton_support import Tile, tuned

from .triton_tiles import (
    LOG2_E,
    TUNING_KEY,
    bundle_offset,
    first_hidden,
    hidden_tile,
    hidden_visible,
    key_offsets,
    last_hidden_query,
    load_tile,
    packed_queries,
    query_offsets,
    store_tile,
)


@triton.jit
def delta_kernel(
    grad,  # like query: [Kq, s, b, groups, ratio, d]
    out,
    delta,  # [b * groups, SLICES * slice_length * Kq * ratio] float32, packed rows: rowsum(grad * out)
    grad_strides,
    out_strides,
    groups,
    rows,  # SLICES * slice_length * Kq * ratio; slices lie one after the other in memory
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: ``delta`` of ``BLOCK_M`` packed rows."""
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    token, _, copy, _, head = packed_queries(row, 0, COPIES, RATIO, 1)
    g = load_tile(grad, query_offsets(token, copy, head, batch, group, grad_strides), inside, True, D, BLOCK_D)
    o = load_tile(out, query_offsets(token, copy, head, batch, group, out_strides), inside, True, D, BLOCK_D)
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + tl.program_id(1).to(tl.int64) * rows + row, total, mask=inside)


@triton.jit
def _slope(q, k, v, grad, lse, delta, visible, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of the scores ``[M, N]`` without the factor ``scale``; ``lse`` in base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32) * (scale * LOG2_E)
    weights = scores - lse[:, None]
    if MASKED:
        weights = tl.where(visible, weights, float("-inf"))
    slope = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=tl.float32)
    return tl.math.exp2(weights) * (slope - delta[:, None])


QUERY_TILES = (
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, warps=4, stages=2),
    Tile({"BLOCK_M": 128, "BLOCK_N": 64}, warps=8, stages=2),
    Tile({"BLOCK_M": 64, "BLOCK_N": 32}, warps=4, stages=2),
    Tile({"BLOCK_M": 128, "BLOCK_N": 32}, warps=8, stages=3),
    Tile({"BLOCK_M": 32, "BLOCK_N": 32}, warps=4, stages=2),
)
KEY_TILES = (
    Tile({"BLOCK_M": 32, "BLOCK_N": 64}, warps=4, stages=2),
    Tile({"BLOCK_M": 32, "BLOCK_N": 128}, warps=8, stages=2),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, warps=4, stages=2),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, warps=8, stages=2),
    Tile({"BLOCK_M": 64, "BLOCK_N": 128}, warps=8, stages=2),
    Tile({"BLOCK_M": 32, "BLOCK_N": 32}, warps=4, stages=2),
)


@tuned(QUERY_TILES, TUNING_KEY)
@triton.jit
def query_gradient_kernel(
    query,
    key,
    value,
    hidden_key,
    hidden_value,
    grad,  # of the output
    lse,
    delta,
    query_grad,
    query_strides,
    key_strides,
    value_strides,
    hidden_key_strides,
    hidden_value_strides,
    grad_strides,
    query_grad_strides,
    scale,
    groups,
    slice_length,
    starts,
    hidden_starts,
    hidden_bases,
    SLICES: tl.constexpr,
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: dq of ``BLOCK_M`` packed rows. Arguments and walk are those of ``forward_kernel``."""
    PACK: tl.constexpr = COPIES * RATIO
    FIRST_COPY: tl.constexpr = HIDDEN + 2 - COPIES
    rows = slice_length * PACK
    tiles = tl.cdiv(rows, BLOCK_M)
    index = SLICES * tiles - 1 - tl.program_id(0)
    part = index // tiles
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    start, hidden_start, hidden_base = starts[0], hidden_starts[0], hidden_bases[0]
    if SLICES == 2:
        start = tl.where(part == 0, start, starts[1])
        hidden_start = tl.where(part == 0, hidden_start, hidden_starts[1])
        hidden_base = tl.where(part == 0, hidden_base, hidden_bases[1])

    first_row = index % tiles * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    token, position, copy, copy_number, head = packed_queries(row, start, COPIES, RATIO, FIRST_COPY)
    token += part * slice_length
    first = start + first_row // PACK
    last = start + (tl.minimum(first_row + BLOCK_M, rows) - 1) // PACK
    q = load_tile(query, query_offsets(token, copy, head, batch, group, query_strides), inside, True, D, BLOCK_D)
    g = load_tile(grad, query_offsets(token, copy, head, batch, group, grad_strides), inside, True, D, BLOCK_D)
    packed = tl.program_id(1).to(tl.int64) * (SLICES * rows) + part * rows + row
    row_lse = tl.load(lse + packed, mask=inside, other=float("inf")) * LOG2_E  # inf: rows outside weigh nothing
    row_delta = tl.load(delta + packed, mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    near = tl.arange(0, BLOCK_N)
    key += bundle_offset(batch, group, key_strides)
    value += bundle_offset(batch, group, value_strides)
    key_step, value_step = tl.cast(key_strides[1], tl.int64), tl.cast(value_strides[1], tl.int64)
    seen_by_all = (first + 1) // BLOCK_N * BLOCK_N
    for begin in range(0, seen_by_all, BLOCK_N):
        k = load_tile(key + begin * key_step, near * key_strides[1], near >= 0, False, D, BLOCK_D)
        v = load_tile(value + begin * value_step, near * value_strides[1], near >= 0, False, D, BLOCK_D)
        slope = _slope(q, k, v, g, row_lse, row_delta, True, scale, False, PRECISION)
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION, out_dtype=tl.float32)
    for begin in range(seen_by_all, last + 1, BLOCK_N):
        n = begin + near
        k = load_tile(key + begin * key_step, near * key_strides[1], n <= last, True, D, BLOCK_D)
        v = load_tile(value + begin * value_step, near * value_strides[1], n <= last, True, D, BLOCK_D)
        visible = n[None, :] <= tl.minimum(position, last)[:, None]
        slope = _slope(q, k, v, g, row_lse, row_delta, visible, scale, True, PRECISION)
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION, out_dtype=tl.float32)

    if HIDDEN > 0:
        low = tl.maximum(first_hidden(first, WINDOW, CHUNK), hidden_start)
        for begin in range(0, (last + 1 - low) * HIDDEN, BLOCK_N):
            k, v, visible = hidden_tile(
                begin, low, last, hidden_key, hidden_value, hidden_key_strides, hidden_value_strides, hidden_start,
                hidden_base, batch, group, position, copy_number, HIDDEN, WINDOW, CHUNK, D, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            slope = _slope(q, k, v, g, row_lse, row_delta, visible, scale, True, PRECISION)
            acc = tl.dot(slope.to(k.dtype), k, acc, input_precision=PRECISION, out_dtype=tl.float32)

    store_tile(
        query_grad, query_offsets(token, copy, head, batch, group, query_grad_strides), acc * scale, inside, D, BLOCK_D
    )


@triton.jit
def _key_gradient_step(
    first_row,
    k,
    v,
    key_position,
    key_copy,
    key_grad,
    value_grad,
    query,
    grad,
    lse,
    delta,
    query_grad,
    query_strides,
    grad_strides,
    query_grad_strides,
    batch,
    group,
    part,
    rows,
    packed_base,
    start,
    slice_length,
    scale,
    MODE: tl.constexpr,  # "all": every row sees every key; "causal": originals by position; "hidden": the window
    ATOMIC_DQ: tl.constexpr,
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    FIRST_COPY: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What ``BLOCK_M`` packed query rows add to dk (without ``scale``) and dv of a tile of keys."""
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < rows
    token, position, copy, copy_number, head = packed_queries(row, start, COPIES, RATIO, FIRST_COPY)
    token += part * slice_length
    q = load_tile(query, query_offsets(token, copy, head, batch, group, query_strides), inside, True, D, BLOCK_D)
    g = load_tile(grad, query_offsets(token, copy, head, batch, group, grad_strides), inside, True, D, BLOCK_D)
    row_lse = tl.load(lse + packed_base + row, mask=inside, other=float("inf")) * LOG2_E
    row_delta = tl.load(delta + packed_base + row, mask=inside, other=0.0)
    # Everything is [keys, queries] here: the products that are summed then have the keys, the larger side, as rows, and
    # take weights and slope from registers as they come.
    weights = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=tl.float32) * (scale * LOG2_E)
    weights -= row_lse[None, :]
    if MODE == "causal":
        weights = tl.where(key_position[:, None] <= position[None, :], weights, float("-inf"))
    elif MODE == "hidden":
        visible = hidden_visible(
            position[None, :], copy_number[None, :], key_position[:, None], key_copy[:, None], WINDOW, CHUNK
        )
        weights = tl.where(visible, weights, float("-inf"))
    weights = tl.math.exp2(weights)
    slope = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=tl.float32)
    slope = (weights * (slope - row_delta[None, :])).to(q.dtype)
    value_grad = tl.dot(weights.to(g.dtype), g, value_grad, input_precision=PRECISION, out_dtype=tl.float32)
    key_grad = tl.dot(slope, q, key_grad, input_precision=PRECISION, out_dtype=tl.float32)
    if ATOMIC_DQ:
        step = tl.dot(tl.trans(slope), k, input_precision=PRECISION, out_dtype=tl.float32) * scale
        column = tl.arange(0, BLOCK_D)
        offsets = query_offsets(token, copy, head, batch, group, query_grad_strides)
        mask = inside[:, None] & (column < D)[None, :]
        tl.atomic_add(query_grad + offsets[:, None] + column[None, :], step, mask=mask, sem="relaxed")
    return key_grad, value_grad


@tuned(KEY_TILES, TUNING_KEY, reset_to_zero=["query_grad"])
@triton.jit
def key_gradient_kernel(
    query,
    key,
    value,
    hidden_key,
    hidden_value,
    grad,
    lse,
    delta,
    query_grad,  # float32 zeros with ATOMIC_DQ, else not touched
    key_grad,  # like key
    value_grad,
    hidden_key_grad,  # like hidden_key
    hidden_value_grad,
    query_strides,
    key_strides,
    value_strides,
    hidden_key_strides,
    hidden_value_strides,
    grad_strides,
    query_grad_strides,
    key_grad_strides,
    value_grad_strides,
    hidden_key_grad_strides,
    hidden_value_grad_strides,
    scale,
    groups,
    keys,  # originals
    slice_length,
    starts,
    hidden_starts,
    hidden_bases,
    hidden_entries,  # most packed hidden keys of a slice, its halo included
    SLICES: tl.constexpr,
    ATOMIC_DQ: tl.constexpr,
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: dk and dv of ``BLOCK_N`` originals, or of ``BLOCK_N`` packed hidden keys of one slice."""
    PACK: tl.constexpr = COPIES * RATIO
    FIRST_COPY: tl.constexpr = HIDDEN + 2 - COPIES
    rows = slice_length * PACK
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    packed = tl.program_id(1).to(tl.int64) * (SLICES * rows)
    index = tl.program_id(0)
    original_tiles = tl.cdiv(keys, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    if index < original_tiles:
        begin = index * BLOCK_N
        n = begin + tl.arange(0, BLOCK_N)
        valid = n < keys
        original = n * 0  # index of the copy
        k = load_tile(key, key_offsets(original, n, batch, group, key_strides), valid, True, D, BLOCK_D)
        v = load_tile(value, key_offsets(original, n, batch, group, value_strides), valid, True, D, BLOCK_D)
        for part in tl.static_range(SLICES):
            start = starts[part]
            # Rows before `some` see no key of this tile; from the first tile of rows at `all` on they see every one.
            some = tl.minimum(tl.maximum(begin - start, 0) * PACK, rows) // BLOCK_M * BLOCK_M
            everything = tl.minimum(tl.maximum(begin + BLOCK_N - 1 - start, 0) * PACK, rows)
            everything = tl.maximum(tl.cdiv(everything, BLOCK_M) * BLOCK_M, some)
            for first_row in range(some, tl.minimum(everything, rows), BLOCK_M):
                dk, dv = _key_gradient_step(
                    first_row, k, v, n, n, dk, dv, query, grad, lse, delta, query_grad,
                    query_strides, grad_strides, query_grad_strides, batch, group, part, rows, packed + part * rows,
                    start, slice_length, scale, "causal", ATOMIC_DQ,
                    COPIES, RATIO, FIRST_COPY, WINDOW, CHUNK, D, BLOCK_D, PRECISION, BLOCK_M,
                )  # fmt: skip
            for first_row in range(everything, rows, BLOCK_M):
                dk, dv = _key_gradient_step(
                    first_row, k, v, n, n, dk, dv, query, grad, lse, delta, query_grad,
                    query_strides, grad_strides, query_grad_strides, batch, group, part, rows, packed + part * rows,
                    start, slice_length, scale, "all", ATOMIC_DQ,
                    COPIES, RATIO, FIRST_COPY, WINDOW, CHUNK, D, BLOCK_D, PRECISION, BLOCK_M,
                )  # fmt: skip
        store_tile(key_grad, key_offsets(original, n, batch, group, key_grad_strides), dk * scale, valid, D, BLOCK_D)
        store_tile(value_grad, key_offsets(original, n, batch, group, value_grad_strides), dv, valid, D, BLOCK_D)
    elif HIDDEN > 0:
        hidden_tiles = tl.cdiv(hidden_entries, BLOCK_N)
        part = (index - original_tiles) // hidden_tiles
        start, hidden_start, hidden_base = starts[0], hidden_starts[0], hidden_bases[0]
        if SLICES == 2:
            start = tl.where(part == 0, start, starts[1])
            hidden_start = tl.where(part == 0, hidden_start, hidden_starts[1])
            hidden_base = tl.where(part == 0, hidden_base, hidden_bases[1])
        entries = (start + slice_length - hidden_start) * HIDDEN
        begin = (index - original_tiles) % hidden_tiles * BLOCK_N
        entry = begin + tl.arange(0, BLOCK_N)
        valid = entry < entries
        key_position, key_copy = hidden_start + entry // HIDDEN, entry % HIDDEN
        n = entry // HIDDEN + hidden_base
        k = load_tile(hidden_key, key_offsets(key_copy, n, batch, group, hidden_key_strides), valid, True, D, BLOCK_D)
        offsets = key_offsets(key_copy, n, batch, group, hidden_value_strides)
        v = load_tile(hidden_value, offsets, valid, True, D, BLOCK_D)
        first = tl.maximum(hidden_start + begin // HIDDEN, start)
        last_key = hidden_start + (tl.minimum(begin + BLOCK_N, entries) - 1) // HIDDEN
        last = tl.minimum(last_hidden_query(last_key, WINDOW, CHUNK), start + slice_length - 1)
        for first_row in range((first - start) * PACK, (last + 1 - start) * PACK, BLOCK_M):
            dk, dv = _key_gradient_step(
                first_row, k, v, key_position, key_copy + 2, dk, dv, query, grad, lse, delta, query_grad,
                query_strides, grad_strides, query_grad_strides, batch, group, part, rows, packed + part * rows,
                start, slice_length, scale, "hidden", ATOMIC_DQ,
                COPIES, RATIO, FIRST_COPY, WINDOW, CHUNK, D, BLOCK_D, PRECISION, BLOCK_M,
            )  # fmt: skip
        offsets = key_offsets(key_copy, n, batch, group, hidden_key_grad_strides)
        store_tile(hidden_key_grad, offsets, dk * scale, valid, D, BLOCK_D)
        offsets = key_offsets(key_copy, n, batch, group, hidden_value_grad_strides)
        store_tile(hidden_value_grad, offsets, dv, valid, D, BLOCK_D)
