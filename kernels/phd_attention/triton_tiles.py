"""Device functions that the Triton kernels of PHD attention share.

Query rows are *packed*: row ``(token * COPIES + copy) * RATIO + head`` of one sequence and KV group, so a tile of
``BLOCK_M`` rows holds all copies and all query heads of ``BLOCK_M / (COPIES * RATIO)`` neighbouring tokens, and a tile
of keys and values that is loaded once serves them all. Hidden keys are packed likewise: ``position * HIDDEN + copy``.

Everything is in the subset of Triton that 3.6 and 3.9 share. Helpers take and return tensors in registers alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
TUNING_KEY = ("COPIES", "RATIO", "HIDDEN", "BLOCK_D")  # and the types, which Triton adds by itself
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def packed_queries(row, first_position, COPIES: tl.constexpr, RATIO: tl.constexpr, FIRST_COPY: tl.constexpr):
    """Packed rows to (token in its slice, its position, index of the copy, 1-based copy, head in the group)."""
    token = row // (COPIES * RATIO)
    copy = row % (COPIES * RATIO) // RATIO
    return token, first_position + token, copy, copy + FIRST_COPY, row % RATIO


@triton.jit
def bundle_offset(batch, group, strides):
    """Element offset of one sequence and KV group in a tensor whose third and fourth dimension they are, int64."""
    return batch.to(tl.int64) * strides[2] + group.to(tl.int64) * strides[3]


@triton.jit
def query_offsets(token, copy, head, batch, group, strides):
    """Element offsets of packed rows in a ``[Kq, s, b, groups, ratio, d]`` tensor, int64."""
    row = copy.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[4]
    return row + bundle_offset(batch, group, strides)


@triton.jit
def key_offsets(copy, row, batch, group, strides):
    """Element offsets of hidden keys in a ``[copies, s, b, groups, d]`` tensor, int64."""
    return copy.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[1] + bundle_offset(batch, group, strides)


@triton.jit
def load_tile(pointer, offsets, inside, CHECK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]`` at row ``offsets``; columns from ``D`` on are zero, and so are rows not ``inside``.

    ``CHECK`` says whether there can be such rows at all: without any mask the loads vectorise and pipeline.
    """
    column = tl.arange(0, BLOCK_D)
    address = pointer + offsets[:, None] + column[None, :]
    if CHECK and BLOCK_D != D:
        return tl.load(address, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    elif CHECK:
        return tl.load(address, mask=inside[:, None], other=0.0)
    elif BLOCK_D != D:
        return tl.load(address, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def store_tile(pointer, offsets, tile, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write ``tile`` ``[rows, BLOCK_D]`` where ``inside`` and below column ``D``."""
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(pointer + offsets[:, None] + column[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def hidden_visible(query_position, query_copy, key_position, key_copy, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """:meth:`KVPolicy.hidden_visible` on the device; ``CHUNK`` 0 means no chunks. Tests compare the two."""
    distance = query_position - key_position
    seen = (distance >= 0) & (distance < WINDOW) & ((distance > 0) | (key_copy <= query_copy)) & (query_copy > 1)
    if CHUNK > 0:
        seen = seen & (query_position // CHUNK == key_position // CHUNK)
    return seen


@triton.jit
def first_hidden(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """First position whose hidden keys a query at ``position`` sees (:meth:`KVPolicy.first_hidden_key`)."""
    first = tl.maximum(position - (WINDOW - 1), 0)
    if CHUNK > 0:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def last_hidden_query(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Last position whose queries see hidden keys at ``position``: the inverse of :func:`first_hidden`."""
    last = position + (WINDOW - 1)
    if CHUNK > 0:
        last = tl.minimum(last, position // CHUNK * CHUNK + (CHUNK - 1))
    return last


@triton.jit
def hidden_tile(
    begin, low, last, hidden_key, hidden_value, key_strides, value_strides, hidden_start, hidden_base, batch, group,
    position, copy_number, HIDDEN: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Packed hidden keys from entry ``begin`` on, counted from position ``low``: keys, values, which rows see which.

    ``hidden_start`` is the position of the hidden row ``hidden_base``; keys behind position ``last`` are seen by none.
    """
    entry = begin + tl.arange(0, BLOCK_N)
    key_position, key_copy = low + entry // HIDDEN, entry % HIDDEN
    valid = key_position <= last
    row = key_position - hidden_start + hidden_base
    key_at = key_offsets(key_copy, row, batch, group, key_strides)
    value_at = key_offsets(key_copy, row, batch, group, value_strides)
    k = load_tile(hidden_key, key_at, valid, True, D, BLOCK_D)
    v = load_tile(hidden_value, value_at, valid, True, D, BLOCK_D)
    visible = valid[None, :] & hidden_visible(
        position[:, None], copy_number[:, None], key_position[None, :], key_copy[None, :] + 2, WINDOW, CHUNK
    )
    return k, v, visible


@triton.jit
def softmax_step(q, k, v, visible, out, top, total, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Add one tile of keys to the running (unnormalised output, row maximum, row sum); scores are in base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=tl.float32) * scale  # [M, N]
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))  # finite: rows see their own original first, or start from its part
    weights = tl.math.exp2(scores - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None]
    out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION, out_dtype=tl.float32)
    return out, new_top, total
