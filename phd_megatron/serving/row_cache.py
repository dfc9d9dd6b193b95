"""Rows of a KV cache that come and go: joined on the left, taken out, and shortened when only padding is left.

Shapes: ``b`` rows, ``g`` KV heads, ``p`` slots, ``r`` hidden slots of a PHD cache, ``d`` head dimension. A row's tokens
are its last slots, so shorter rows have padding before them; PHD's own cache marks it by position -1, for others
:func:`attention_mask` says it. What is in padding is never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import Cache


def is_phd(cache: Cache) -> bool:
    """Whether it holds hidden copies, and so knows the position of each slot itself."""
    return hasattr(cache, "hidden_positions")


def is_joinable(cache: Cache) -> bool:
    """Whether rows can be put together: a PHD cache, or plain keys and values of all tokens in every layer."""
    from transformers.cache_utils import DynamicLayer

    return is_phd(cache) or all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


def join(caches: Sequence[Cache]) -> Cache:
    """One cache of all rows, in order; the first is changed into it, wholly or, when memory is short, not at all."""
    first, *others = caches
    if not others:
        return first
    slots = max(cache.get_seq_length() for cache in caches)
    if is_phd(first):
        hidden = max(cache.hidden_positions.size(-1) for cache in caches)
        for cache in caches:
            cache.widen(hidden)
    changes = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        sizes = {"keys": slots, "values": slots}
        if is_phd(first):
            sizes |= {"hidden_keys": hidden, "hidden_values": hidden}
        for name, size in sizes.items():
            changes.append((layers[0], name, _stack([getattr(layer, name) for layer in layers], size, -2)))
    if is_phd(first):
        for name, size in (("positions", slots), ("hidden_positions", hidden)):
            changes.append((first, name, _stack([getattr(cache, name) for cache in caches], size, -1, -1)))
        changes.append((first, "lengths", torch.cat([cache.lengths for cache in caches])))
    for owner, name, tensor in changes:
        setattr(owner, name, tensor)
    if is_phd(first):
        for layer in first.layers:
            layer.stores = []  # they hold what was there before
    return first


def keep(cache: Cache, rows: Sequence[int], lengths: Sequence[int]) -> None:
    """Leave these rows, of so many tokens each, and no slot that is padding in all of them."""
    device = cache.layers[0].keys.device
    cache.batch_select_indices(torch.tensor(rows, device=device))
    spare = cache.get_seq_length() - max(lengths)
    if spare <= 0:
        return

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, :, spare:].clone()  # a view would keep the memory of what is left out

    for layer in cache.layers:
        layer.keys, layer.values = cut(layer.keys), cut(layer.values)
    if is_phd(cache):
        cache.positions = cache.positions[:, spare:]


def attention_mask(lengths: Sequence[int], slots: int, device: torch.device) -> Tensor:
    """``[b, slots]``, 1 for the last ``lengths`` slots of each row."""
    begins = slots - torch.tensor(lengths, device=device)
    return (torch.arange(slots, device=device) >= begins[:, None]).long()


def _stack(parts: Sequence[Tensor], size: int, dim: int, padding: int = 0) -> Tensor:
    """Parts joined along the batch, each padded at the front of ``dim`` (-1 or -2) to ``size``."""
    zeros = (0, 0) * (-1 - dim)
    return torch.cat([pad(part, (*zeros, size - part.size(dim), 0), value=padding) for part in parts])
