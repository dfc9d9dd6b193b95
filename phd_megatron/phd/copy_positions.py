"""Where RoPE puts the copies of a token.

What a query sees never follows from this: windows, chunks, halos and the prefill cone count token positions
(:mod:`.kv_policy`). The module needs torch alone, because it also ships inside an exported Hugging Face model.
"""

from __future__ import annotations

import torch
from torch import Tensor

COPY_POSITIONS = ("token", "repeated", "fraction")


def rotary_positions(positions: Tensor, copies: Tensor, repeat: int, kind: str) -> Tensor:
    """Positions by which RoPE (arXiv 2104.09864) turns copies of tokens.

    Args:
        positions: token positions ``n`` in their samples, from 0: in the whole sequence, not in a rank's part of it.
        copies: ``j`` from 1, which are the originals; broadcasts with ``positions``.
        repeat: ``K``.
        kind: ``token`` gives ``n`` to every copy; ``repeated`` gives ``K n + j - 1``, the place in the sequence of
            repeated tokens, copies of a token side by side; ``fraction`` gives ``n + (j - 1) / K``, which leaves the
            originals where a vanilla model has them.

    Returns:
        float32 of the broadcast shape: places of repeated tokens up to 2^24 are exact, and fractions the nearest
        numbers to theirs.

    Raises:
        ValueError: for another kind.
    """
    if kind == "token":
        return positions.float().expand(torch.broadcast_shapes(positions.shape, copies.shape))
    if kind not in COPY_POSITIONS:
        raise ValueError(f"phd_copy_positions={kind!r} is not known; choose {', '.join(COPY_POSITIONS)}")
    places = (positions * repeat + (copies - 1)).float()
    return places if kind == "repeated" else places / repeat
