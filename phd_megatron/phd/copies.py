"""Making and dropping the K copies of a token.

Rows inside the decoder are copy-major on each rank: ``[K, s_rank]`` with the originals first (``docs/semantics.md``).
Sequence parallelism gathers ranks, so what attention sees is ``[tp, K, s_rank]``. With that layout the copies are
made and dropped without communication on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_tokens(hidden: Tensor, repeat: int, vectors: Tensor | None = None) -> Tensor:
    """``[s, b, h]`` to ``[K*s, b, h]``, originals first; ``vectors`` ``[K-1, h]`` are added to copies 2 to K."""
    if repeat == 1:
        return hidden
    if vectors is None:
        return hidden.repeat(repeat, *[1] * (hidden.dim() - 1))
    copies = hidden + vectors[:, None, None]  # [K-1, s, b, h]
    return torch.cat([hidden[None], copies]).flatten(0, 1)


def last_copy(hidden: Tensor, repeat: int) -> Tensor:
    """``[K*s, ...]`` to ``[s, ...]``: the copy that the loss, the final norm and the head see."""
    return hidden if repeat == 1 else hidden[-(hidden.size(0) // repeat) :]


def split_copies(rows: Tensor, repeat: int, ranks: int = 1) -> Tensor:
    """Rows as attention sees them, ``[ranks*K*s_rank, ...]``, to ``[K, s, ...]`` (a view when ``ranks`` is 1)."""
    rank_rows = rows.size(0) // (ranks * repeat)
    # [ranks*K*s_rank, ...] -> [K, ranks, s_rank, ...] -> [K, s, ...]
    split = rows.unflatten(0, (ranks, repeat, rank_rows)).transpose(0, 1)
    return split.flatten(1, 2)


def join_copies(copies: Tensor, ranks: int = 1) -> Tensor:
    """Inverse of :func:`split_copies`: ``[K, s, ...]`` to ``[ranks*K*s_rank, ...]``."""
    # [K, s, ...] -> [K, ranks, s_rank, ...] -> [ranks*K*s_rank, ...]
    return copies.unflatten(1, (ranks, copies.size(1) // ranks)).transpose(0, 1).flatten(0, 2)
