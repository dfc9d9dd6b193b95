"""PHD attention through FlexAttention, for comparison and odd masks. GPU only: its CPU path has no backward.

Rows are copy-major, ``copy * s + token``, so that the block mask skips what no query of a block sees: hidden keys away
from the diagonal, and the later half of the originals. Token-major order, ``token * K + copy``, mixes hidden keys into
every block and leaves causality alone to skip by; it is here to be measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phd_megatron.phd.kv_policy import KVPolicy

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_of(policy: KVPolicy, length: int, query_copies: int, token_major: bool = False) -> Mask:
    """FlexAttention's ``mask_mod`` for ``policy``, over the last ``query_copies`` copies of queries and all of keys."""
    first = policy.repeat - query_copies

    def place(index: Tensor, copies: int) -> tuple[Tensor, Tensor]:
        """(position, 0-based copy) of a row."""
        return (index // copies, index % copies) if token_major else (index % length, index // length)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_position, query_copy = place(query, query_copies)
        key_position, key_copy = place(key, policy.repeat)
        return policy.visible(query_position, query_copy + first + 1, key_position, key_copy + 1)

    return visible


@lru_cache(maxsize=16)
def _block_mask(policy: KVPolicy, length: int, query_copies: int, token_major: bool, device: torch.device) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = mask_of(policy, length, query_copies, token_major)
    return create_block_mask(mask, None, None, query_copies * length, policy.repeat * length, device=device)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    *,
    scale: float | None = None,
    token_major: bool = False,
    flash: bool = False,
) -> Tensor:
    """PHD attention as one masked attention over ``K * s`` rows. Shapes as :func:`sdpa_attention`'s.

    On CUDA it is compiled, with ``flash`` around FlashAttention 4 (package flash-attn-4) instead of Triton; elsewhere
    it runs eagerly, forward only.
    """
    length = query.size(1)

    def rows(x: Tensor) -> Tensor:
        """``[copies, s, b, heads, d]`` to ``[b, heads, copies * s, d]``."""
        return (x.permute(2, 3, 1, 0, 4) if token_major else x.permute(2, 3, 0, 1, 4)).flatten(2, 3)

    if query.is_cuda:
        attend = _compiled()
    else:
        from torch.nn.attention.flex_attention import flex_attention as attend
    mask = _block_mask(policy, length, query.size(0), token_major, query.device)
    grouped = query.size(3) != key.size(3)
    options = {"BACKEND": "FLASH"} if flash else None
    inputs = (rows(query), rows(key), rows(value))
    out = attend(*inputs, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
    if token_major:
        return out.unflatten(2, (length, query.size(0))).permute(3, 2, 0, 1, 4)
    return out.unflatten(2, (query.size(0), length)).permute(2, 3, 0, 1, 4)
