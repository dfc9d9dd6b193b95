"""Attention of one new token's ``K`` copies over a KV cache: flash-decoding in Triton, and its definition.

The cache of a PHD-Transformer holds originals, as many as a vanilla model's, and at most ``(K - 1) * min(W, C)`` hidden
entries. All copies and query heads of a KV group are packed into the rows of one tile, so the cache is read once, not
``K`` times. The KV length is split over programs, whose parts a second launch puts together. No gradients.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from phd_megatron.errors import UserError
from phd_megatron.kernels.triton_support import block_of, covering, precision, triton_problem
from phd_megatron.phd.kv_policy import KVPolicy

TILE = 64  # keys: parts begin at multiples of it
SHORTEST_PART = 2  # tiles; shorter parts cost more to put together than they save
LONG_PART = 512  # keys: the kernel's own tile is chosen separately for parts that are longer
MOST_ROWS = 64  # packed copies and heads of a program; with more of them the cache is read more than once
OWN_PART = 4  # parts that there must be room for before the hidden keys become one
ROWS, MANY = 4, 256  # rows of a program of the merge, where that leaves more than so many programs
WIDEST = 256  # head dimension


class Hidden(NamedTuple):
    """What the cache holds of copies 2 to K."""

    key: Tensor  # [b, groups, K - 1, r, d]
    value: Tensor
    position: Tensor  # [b, r]


def decode_problem(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot run here, or None where it can."""
    if head_dim > WIDEST:
        return f"its tiles hold head dimensions up to {WIDEST}, not {head_dim}"
    return triton_problem(device, dtype)


def decode_attention(
    query: Tensor,
    query_position: Tensor,
    key: Tensor,
    value: Tensor,
    key_position: Tensor,
    hidden_key: Tensor | None,
    hidden_value: Tensor | None,
    hidden_position: Tensor | None,
    policy: KVPolicy,
    *,
    scale: float | None = None,
) -> Tensor:
    """The last ``Kq`` copies of one token per sequence over what the cache holds, the token's own keys included.

    Args:
        query: ``[Kq, b, heads, d]``.
        query_position: ``[b]``, the token's position in its sequence.
        key, value: ``[b, groups, L, d]``, originals in any order.
        key_position: ``[b, L]``, -1 for padding.
        hidden_key, hidden_value: ``[b, groups, K - 1, r, d]``, copies 2 to K; None for a vanilla model.
        hidden_position: ``[b, r]``, -1 for padding.
        policy: repeat, window and chunk.
        scale: factor on the scores, default ``d ** -0.5``.

    Returns:
        ``[Kq, b, heads, d]``. A query that sees nothing, a padding row's, gives zeros.

    Raises:
        ValueError: if shapes or strides do not fit together.
        UserError: where Triton cannot run.
    """
    hidden = _checked_hidden(
        query, query_position, key, value, key_position, hidden_key, hidden_value, hidden_position, policy
    )
    problem = decode_problem(query.device, query.dtype, query.size(3))
    if problem is not None:
        raise UserError(f"the decode kernel cannot run here: {problem}")
    scale = query.size(3) ** -0.5 if scale is None else scale
    return _launch(query, query_position, key, value, key_position, hidden, policy, scale)


def decode_attention_reference(
    query: Tensor,
    query_position: Tensor,
    key: Tensor,
    value: Tensor,
    key_position: Tensor,
    hidden_key: Tensor | None,
    hidden_value: Tensor | None,
    hidden_position: Tensor | None,
    policy: KVPolicy,
    *,
    scale: float | None = None,
) -> Tensor:
    """The definition: one softmax under a dense mask. Arguments as :func:`decode_attention`'s."""
    hidden = _checked_hidden(
        query, query_position, key, value, key_position, hidden_key, hidden_value, hidden_position, policy
    )
    copies, width = query.size(0), query.size(3)
    scale = width**-0.5 if scale is None else scale
    keys, values, position = key, value, key_position
    copy = torch.ones(key.size(2), dtype=torch.long, device=query.device)
    if policy.repeat > 1:
        slots = hidden.position.size(1)
        keys, values = (torch.cat([a, b.flatten(2, 3)], 2) for a, b in ((key, hidden.key), (value, hidden.value)))
        position = torch.cat([key_position, hidden.position.repeat(1, policy.repeat - 1)], 1)  # [b, L + (K - 1) * r]
        later = torch.arange(2, policy.repeat + 1, device=query.device).repeat_interleave(slots)
        copy = torch.cat([copy, later])
    query_copy = torch.arange(policy.repeat - copies + 1, policy.repeat + 1, device=query.device)
    # [b, Kq, keys]
    seen = policy.visible(query_position[:, None, None], query_copy[:, None], position[:, None], copy)
    seen = seen & (position >= 0)[:, None]
    grouped = query.unflatten(2, (key.size(1), -1))  # [Kq, b, g, r, d]
    scores = torch.einsum("cbgrd,bgkd->bgcrk", grouped, keys) * scale
    weights = scores.masked_fill(~seen[:, None, :, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bgcrk,bgkd->cbgrd", weights, values).reshape(query.shape)


def _launch(
    query: Tensor,
    query_position: Tensor,
    key: Tensor,
    value: Tensor,
    key_position: Tensor,
    hidden: Hidden,
    policy: KVPolicy,
    scale: float,
) -> Tensor:
    """A launch for the parts and, where there are several, one that puts them together."""
    from .decode_kernels import split_kernel

    copies, batch, heads, width = query.shape
    groups, length = key.size(1), key.size(2)
    packed, bundles = copies * (heads // groups), batch * groups
    block = min(block_of(packed), MOST_ROWS)
    blocks = -(-packed // block)
    keys, parts = _parts(bundles * blocks, length, policy.repeat > 1, query.device)
    merged = parts if parts > 1 else 0  # a single part is the output
    found = torch.empty(bundles, merged, packed, width, dtype=torch.float32, device=query.device)
    lse = torch.empty(bundles, merged, packed, dtype=torch.float32, device=query.device)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grouped, grouped_out = (x.unflatten(2, (groups, -1)) for x in (query, out))  # [Kq, b, groups, ratio, d]
    early = parts > 1 and _starts_early(query.device)
    shared = {"COPIES": copies, "RATIO": heads // groups, "D": width, "BLOCK_D": block_of(width), "PDL": early}
    split_kernel[parts, bundles, blocks](
        *(grouped, query_position.contiguous(), key, value, key_position.contiguous()),
        *(hidden.key, hidden.value, hidden.position.contiguous(), found, lse, grouped_out),
        *(grouped.stride()[:4], key.stride()[:3], value.stride()[:3]),
        *(hidden.key.stride()[:4], hidden.value.stride()[:4], grouped_out.stride()[:4]),
        *(scale, groups, length, hidden.position.size(1), keys),
        HIDDEN=policy.repeat - 1,
        WINDOW=policy.window,
        CHUNK=policy.chunk or 0,
        LONG=keys > LONG_PART,
        ALONE=parts == 1,
        PRECISION=precision(query.dtype),
        BLOCK_M=block,
        **shared,
    )
    if parts > 1:
        _combine(found, lse, grouped_out, shared)
    return out


def _combine(found: Tensor, lse: Tensor, out: Tensor, shared: dict[str, int]) -> None:
    """Put the parts ``[b * groups, parts, Kq * ratio, d]`` together in ``out [Kq, b, groups, ratio, d]``."""
    from .decode_kernels import combine_kernel

    bundles, parts, packed, _ = found.shape
    rows = ROWS if bundles * packed > ROWS * MANY else 1
    combine_kernel[-(-packed // rows), bundles](
        *(found, lse, out, out.stride()[:4], out.size(2), parts),
        BLOCK_P=covering(parts),
        ROWS=rows,
        **({"launch_pdl": True} if shared["PDL"] else {}),
        **shared,
    )


def _parts(bundles: int, length: int, hidden: bool, device: torch.device) -> tuple[int, int]:
    """Originals of a part, and parts, so that the device is full once and no part is too short.

    Hidden keys are a part of their own where multiprocessors are left for it; else the last part has them too.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    places = processors // bundles
    own = hidden and places >= OWN_PART
    tiles = -(-length // TILE)
    each = max(SHORTEST_PART, -(-tiles // max(1, places - own)))
    return each * TILE, -(-tiles // each) + own


@cache
def _starts_early(device: torch.device) -> bool:
    """Whether the merge's programs may wait on the multiprocessors for the parts (Hopper and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _checked_hidden(
    query: Tensor,
    query_position: Tensor,
    key: Tensor,
    value: Tensor,
    key_position: Tensor,
    hidden_key: Tensor | None,
    hidden_value: Tensor | None,
    hidden_position: Tensor | None,
    policy: KVPolicy,
) -> Hidden:
    """Empty stand-ins, never read, for a vanilla model."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape or query.size(2) % key.size(1):
        raise ValueError(f"{shapes}: [Kq, b, heads, d] over [b, groups, L, d] is needed, heads a multiple of groups")
    if query.size(1) != key.size(0) or query.size(3) != key.size(3) or not 1 <= query.size(0) <= policy.repeat:
        raise ValueError(f"{shapes}: batch and head dimension must agree, with 1 to {policy.repeat} copies of queries")
    if query_position.shape != key.shape[:1] or key_position.shape != (key.size(0), key.size(2)):
        found = f"{tuple(query_position.shape)} and {tuple(key_position.shape)}"
        raise ValueError(f"positions are {found}, not [b] and [b, L] for {shapes}")
    tensors = [x for x in (query, key, value, hidden_key, hidden_value) if x is not None]
    if any(x.stride(-1) != 1 for x in tensors):
        raise ValueError(f"{shapes}: the last dimensions must be dense; pass .contiguous() tensors")
    if hidden_key is None or hidden_value is None or hidden_position is None:
        if policy.repeat > 1:
            raise ValueError(f"{policy.name} has hidden copies: pass hidden_key, hidden_value and hidden_position")
        empty = key[:, :, None, :0]
        return Hidden(empty, empty, key.new_zeros(key.size(0), 0, dtype=torch.long))
    wanted = (*key.shape[:2], policy.repeat - 1, hidden_position.size(1), key.size(3))
    if hidden_key.shape != wanted or hidden_value.shape != wanted:
        found = f"{tuple(hidden_key.shape)} and {tuple(hidden_value.shape)}"
        raise ValueError(f"hidden key and value are {found}, not {wanted}")
    return Hidden(hidden_key, hidden_value, hidden_position)
