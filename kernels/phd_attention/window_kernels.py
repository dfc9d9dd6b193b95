"""Triton kernels: part (b) of PHD attention, the hidden window, added to what a vendor's kernel found over originals.

Both are bound by memory: the window is a tile or two of keys. So each tensor is read once and written once, and what
the vendor's kernel returned, one tensor for each copy, is read where it lies. Rows are packed as in
:mod:`.triton_tiles`, hidden copies alone: ``COPIES`` counts those among the queries, and copy numbers start at
``FIRST_COPY``. Positions start at ``start`` for queries and at ``hidden_start`` for hidden keys, which is earlier where
a context-parallel slice has a halo.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phd_megatron.kernels.triton_support import Tile, tuned

from .triton_tiles import (
    LN_2,
    LOG2_E,
    TUNING_KEY,
    first_hidden,
    hidden_tile,
    hidden_visible,
    key_offsets,
    last_hidden_query,
    load_tile,
    packed_queries,
    query_offsets,
    softmax_step,
    store_tile,
)


@triton.jit
def _load_parts(parts, offsets, copy, inside, COPIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]`` float32 from a tuple of tensors, one for each copy, all with the same strides."""
    tile = load_tile(parts[0], offsets, inside & (copy == 0), True, D, BLOCK_D).to(tl.float32)
    for i in tl.static_range(1, COPIES):
        tile += load_tile(parts[i], offsets, inside & (copy == i), True, D, BLOCK_D).to(tl.float32)
    return tile


@triton.jit
def _load_numbers(parts, offsets, copy, inside, COPIES: tl.constexpr):
    """The same for one number a row."""
    numbers = tl.load(parts[0] + offsets, mask=inside & (copy == 0), other=0.0)
    for i in tl.static_range(1, COPIES):
        numbers += tl.load(parts[i] + offsets, mask=inside & (copy == i), other=0.0)
    return numbers


FORWARD_TILES = (
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, warps=4, stages=2),
    Tile({"BLOCK_M": 128, "BLOCK_N": 64}, warps=8, stages=2),
    Tile({"BLOCK_M": 64, "BLOCK_N": 32}, warps=4, stages=2),
    Tile({"BLOCK_M": 32, "BLOCK_N": 32}, warps=4, stages=2),
)


@tuned(FORWARD_TILES, TUNING_KEY, restore_value=["out", "lse"])  # which may be the parts themselves
@triton.jit
def window_forward_kernel(
    query,  # [J, s, b, groups, ratio, d], hidden copies
    hidden_key,  # [K - 1, hidden rows, b, groups, d]
    hidden_value,
    parts,  # J tensors [s, b, groups, ratio, d]: the vendor's outputs
    part_lses,  # J tensors [s, b, groups, ratio] float32, natural logarithm
    out,  # like query
    lse,  # [J, s, b, groups, ratio] float32
    query_strides,
    hidden_key_strides,
    hidden_value_strides,
    part_strides,  # with a leading 0 for the copy, like the next
    part_lse_strides,
    out_strides,
    lse_strides,
    scale,
    groups,
    length,  # s
    start,
    hidden_start,
    COPIES: tl.constexpr,  # J
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,  # K - 1
    FIRST_COPY: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: ``BLOCK_M`` packed rows of one sequence and KV group."""
    PACK: tl.constexpr = COPIES * RATIO
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    inside = row < length * PACK
    token, position, copy, copy_number, head = packed_queries(row, start, COPIES, RATIO, FIRST_COPY)
    first = start + first_row // PACK
    last = start + (tl.minimum(first_row + BLOCK_M, length * PACK) - 1) // PACK
    q = load_tile(query, query_offsets(token, copy, head, batch, group, query_strides), inside, True, D, BLOCK_D)
    part_at = query_offsets(token, copy, head, batch, group, part_strides)
    acc = _load_parts(parts, part_at, copy, inside, COPIES, D, BLOCK_D)
    lse_at = query_offsets(token, copy, head, batch, group, part_lse_strides)
    top = _load_numbers(part_lses, lse_at, copy, inside, COPIES).to(tl.float32) * LOG2_E
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    scale = scale * LOG2_E

    low = tl.maximum(first_hidden(first, WINDOW, CHUNK), hidden_start)
    for begin in range(0, (last + 1 - low) * HIDDEN, BLOCK_N):
        k, v, visible = hidden_tile(
            begin, low, last, hidden_key, hidden_value, hidden_key_strides, hidden_value_strides, hidden_start,
            0, batch, group, position, copy_number, HIDDEN, WINDOW, CHUNK, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        acc, top, total = softmax_step(q, k, v, visible, acc, top, total, scale, True, PRECISION)

    out_at = query_offsets(token, copy, head, batch, group, out_strides)
    store_tile(out, out_at, acc / total[:, None], inside, D, BLOCK_D)
    lse_at = query_offsets(token, copy, head, batch, group, lse_strides)
    tl.store(lse + lse_at, (top + tl.math.log2(total)) * LN_2, mask=inside)


@triton.jit
def _weights_and_slope(
    q, g, k, v, lse, delta, position, copy_number, key_position, key_copy, valid, scale,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``p`` and ``ds`` without the factor ``scale``, ``[M, N]`` float32; ``lse`` in base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32) * (scale * LOG2_E)
    visible = valid[None, :] & hidden_visible(
        position[:, None], copy_number[:, None], key_position[None, :], key_copy[None, :] + 2, WINDOW, CHUNK
    )
    weights = tl.math.exp2(tl.where(visible, scores - lse[:, None], float("-inf")))
    slope = tl.dot(g, tl.trans(v), input_precision=PRECISION, out_dtype=tl.float32)
    return weights, weights * (slope - delta[:, None])


BACKWARD_TILES = (
    Tile({"BLOCK_M": 64, "BLOCK_N": 32}, warps=8, stages=1),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, warps=8, stages=1),
    Tile({"BLOCK_M": 64, "BLOCK_N": 32}, warps=4, stages=1),
    Tile({"BLOCK_M": 32, "BLOCK_N": 64}, warps=8, stages=1),
    Tile({"BLOCK_M": 32, "BLOCK_N": 32}, warps=4, stages=1),
)


@triton.constexpr_function
def entries_of_a_tile(hidden: int, chunk: int, block: int) -> int:
    """Packed hidden keys that one backward program owns: whole chunks where they fit, else whole positions, else any.

    Queries of a tile of whole chunks see no key outside it.
    """
    positions = block // hidden
    if chunk and positions >= chunk:
        positions = positions // chunk * chunk
    return positions * hidden or block


@tuned(BACKWARD_TILES, TUNING_KEY, restore_value=["query_grad"])
@triton.jit
def window_backward_kernel(
    query,  # [J, s, b, groups, ratio, d], like the next two
    grad,
    out,
    lse,  # [J, s, b, groups, ratio] float32
    hidden_key,  # [K - 1, hidden rows, b, groups, d]
    hidden_value,
    parts,  # J tensors [s, b, groups, ratio, d]: the vendor's dq
    query_grad,  # like query
    hidden_key_grad,  # like hidden_key
    hidden_value_grad,
    query_strides,
    grad_strides,
    out_strides,
    lse_strides,
    hidden_key_strides,
    hidden_value_strides,
    part_strides,
    query_grad_strides,
    hidden_key_grad_strides,
    hidden_value_grad_strides,
    scale,
    groups,
    length,
    start,
    hidden_start,
    hidden_length,  # hidden rows, the halo's included
    COPIES: tl.constexpr,
    RATIO: tl.constexpr,
    HIDDEN: tl.constexpr,
    FIRST_COPY: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: dk and dv of some packed hidden keys, and dq of the tokens whose last copy is among them.

    Such a token sees keys of this tile and of earlier ones alone, so everything is written once, without atomics.
    """
    PACK: tl.constexpr = COPIES * RATIO
    STEP: tl.constexpr = entries_of_a_tile(HIDDEN, CHUNK, BLOCK_N)
    batch, group = tl.program_id(1) // groups, tl.program_id(1) % groups
    tile = tl.program_id(0) * STEP
    near = tl.arange(0, BLOCK_N)
    entry = tile + near
    valid = (near < STEP) & (entry < hidden_length * HIDDEN)
    key_row, key_copy = entry // HIDDEN, entry % HIDDEN
    k_at = key_offsets(key_copy, key_row, batch, group, hidden_key_strides)
    v_at = key_offsets(key_copy, key_row, batch, group, hidden_value_strides)
    k = load_tile(hidden_key, k_at, valid, True, D, BLOCK_D)
    v = load_tile(hidden_value, v_at, valid, True, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = tl.maximum(hidden_start + tile // HIDDEN, start)
    last_key = hidden_start + (tl.minimum(tile + STEP, hidden_length * HIDDEN) - 1) // HIDDEN
    last = tl.minimum(last_hidden_query(last_key, WINDOW, CHUNK), start + length - 1)

    for first_row in range((first - start) * PACK, (last + 1 - start) * PACK, BLOCK_M):
        row = first_row + tl.arange(0, BLOCK_M)
        inside = row < (last + 1 - start) * PACK
        token, position, copy, copy_number, head = packed_queries(row, start, COPIES, RATIO, FIRST_COPY)
        q = load_tile(query, query_offsets(token, copy, head, batch, group, query_strides), inside, True, D, BLOCK_D)
        g = load_tile(grad, query_offsets(token, copy, head, batch, group, grad_strides), inside, True, D, BLOCK_D)
        o = load_tile(out, query_offsets(token, copy, head, batch, group, out_strides), inside, True, D, BLOCK_D)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        lse_at = query_offsets(token, copy, head, batch, group, lse_strides)
        row_lse = tl.load(lse + lse_at, mask=inside, other=float("inf")) * LOG2_E  # inf: rows outside weigh nothing
        weights, slope = _weights_and_slope(
            q, g, k, v, row_lse, delta, position, copy_number, hidden_start + key_row, key_copy, valid, scale,
            WINDOW, CHUNK, PRECISION,
        )  # fmt: skip
        slope = slope.to(q.dtype)
        dv = tl.dot(tl.trans(weights.to(g.dtype)), g, dv, input_precision=PRECISION, out_dtype=tl.float32)
        dk = tl.dot(tl.trans(slope), q, dk, input_precision=PRECISION, out_dtype=tl.float32)

        final = (position - hidden_start) * HIDDEN + (HIDDEN - 1)  # the token's last entry
        own = inside & (final >= tile) & (final < tile + STEP)
        if ((start + first_row // PACK - hidden_start) * HIDDEN + HIDDEN - 1) < tile + STEP:
            acc = tl.dot(slope, k, input_precision=PRECISION, out_dtype=tl.float32)
            low = tl.maximum(first_hidden(start + first_row // PACK, WINDOW, CHUNK), hidden_start)
            for begin in range((low - hidden_start) * HIDDEN, tile, BLOCK_N):
                before = begin + near
                real = before < tile
                n, n_copy = before // HIDDEN, before % HIDDEN
                k_at = key_offsets(n_copy, n, batch, group, hidden_key_strides)
                v_at = key_offsets(n_copy, n, batch, group, hidden_value_strides)
                other_k = load_tile(hidden_key, k_at, real, True, D, BLOCK_D)
                other_v = load_tile(hidden_value, v_at, real, True, D, BLOCK_D)
                _, other_slope = _weights_and_slope(
                    q, g, other_k, other_v, row_lse, delta, position, copy_number, hidden_start + n, n_copy, real,
                    scale, WINDOW, CHUNK, PRECISION,
                )  # fmt: skip
                acc = tl.dot(other_slope.to(q.dtype), other_k, acc, input_precision=PRECISION, out_dtype=tl.float32)
            part_at = query_offsets(token, copy, head, batch, group, part_strides)
            acc = acc * scale + _load_parts(parts, part_at, copy, own, COPIES, D, BLOCK_D)
            target = query_offsets(token, copy, head, batch, group, query_grad_strides)
            store_tile(query_grad, target, acc, own, D, BLOCK_D)

    target = key_offsets(key_copy, key_row, batch, group, hidden_key_grad_strides)
    store_tile(hidden_key_grad, target, dk * scale, valid, D, BLOCK_D)
    target = key_offsets(key_copy, key_row, batch, group, hidden_value_grad_strides)
    store_tile(hidden_value_grad, target, dv, valid, D, BLOCK_D)
