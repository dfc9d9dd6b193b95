"""PHD attention straight from its definition: one dense mask, one softmax, plain autograd.

Slow and quadratic in memory (``[b, heads, Kq*s, K*s]`` scores), and right in any float dtype: it is what the other
backends are tested against. Needs torch alone, since it also ships inside an exported Hugging Face model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from phd_megatron.phd.kv_policy import KVPolicy


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    policy: KVPolicy,
    *,
    scale: float | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Softmax attention under ``policy.mask`` (PHD-Transformer, arXiv 2504.14992, Eq. 2).

    Args:
        query: ``[Kq, s, b, heads, d]``, the last ``Kq`` of the ``K`` copies, in token order.
        key, value: ``[K, s, b, groups, d]``, originals first. Head ``h`` uses group ``h // (heads / groups)``.
        scale: factor on the scores, default ``d ** -0.5``.
        starts: ``[b, s]``, where each token's document begins, if they are kept apart.

    Returns:
        ``[Kq, s, b, heads, d]`` in the dtype of ``query``.
    """
    copies, length, batch, heads, width = query.shape
    groups = key.size(3)
    scale = width**-0.5 if scale is None else scale
    rows = query.flatten(0, 1).unflatten(2, (groups, heads // groups))  # [Kq*s, b, g, r, d]
    scores = torch.einsum("qbgrd,kbgd->bgrqk", rows, key.flatten(0, 1)) * scale
    mask = policy.mask(length, device=query.device, starts=starts)[..., -copies * length :, :]
    if starts is not None:
        mask = mask[:, None, None]  # [b, 1, 1, Kq*s, K*s]
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    out = torch.einsum("bgrqk,kbgd->qbgrd", weights, value.flatten(0, 1))
    return out.reshape(copies, length, batch, heads, width)
