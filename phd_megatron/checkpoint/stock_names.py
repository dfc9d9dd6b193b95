"""The names that Megatron-Core's own GPT model gives the tensors of a checkpoint, and ours for the same.

Layers that are alike lie there in one tensor, ``decoder.layers.mlp.linear_fc1.weight`` of ``[layers, ...]``; layers
that differ are numbered, as all of ours are. Norms before a sublayer are named after the linear layer that follows, but
the one before experts in layers of Transformer Engine. Optimizer states have their parameter's name behind a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.model.layer_specs import NORMS_IN_LINEAR

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES

_BEFORE_FFN = "pre_mlp_layernorm."
_ALIKE = re.compile(r"(.*\b)?decoder\.layers\.(?!\d)(.*)")
_NUMBERED = re.compile(r"(.*\b)?decoder\.layers\.(\d+)\.(.*)")
_MOST_LAYERS = 10_000
#: of a chain of optimizers (experts have one of their own) that numbers its parts
_CHAINED = re.compile(r"chained_\d+\.(?=optimizer\.)")


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours lies: under ``key``, or in its part ``layer`` of ``layers``."""

    key: str
    layer: int | None = None
    layers: int = 0


Stored = dict[str, "STORAGE_TYPES"]


def in_our_names(stored: Mapping[str, STORAGE_TYPES]) -> tuple[Stored, dict[str, Place]]:
    """What a stock checkpoint holds as if we had saved it: tensors with their sizes, and where each of them lies.

    Objects are left out: random numbers and Transformer Engine's states of stacked layers are not taken over.

    Args:
        stored: the entries of its metadata.

    Raises:
        CheckpointError: for a shape that no model has.
    """
    entries: Stored = {}
    places: dict[str, Place] = {}
    for key, entry in stored.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        bare = _CHAINED.sub("", key)
        if found := _ALIKE.fullmatch(bare):
            if not entry.size or entry.size[0] > _MOST_LAYERS:
                raise CheckpointError(
                    f"its .metadata is damaged: {key} has the shape {tuple(entry.size)}, which is not that of layers; "
                    "load another checkpoint"
                )
            prefix, name = found[1] or "", _ours(found[2])
            for layer in range(entry.size[0]):
                ours = f"{prefix}decoder.layers.{layer}.{name}"
                entries[ours] = replace(entry, size=torch.Size(entry.size[1:]))
                places[ours] = Place(key, layer, entry.size[0])
        else:
            numbered = _NUMBERED.fullmatch(bare)
            ours = f"{numbered[1] or ''}decoder.layers.{numbered[2]}.{_ours(numbered[3])}" if numbered else bare
            entries[ours], places[ours] = entry, Place(key)
    return entries, places


def _ours(name: str) -> str:
    for theirs, ours in NORMS_IN_LINEAR.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def asked_there(tensor: ShardedTensor, place: Place) -> ShardedTensor:
    """A shard of ours, to be read from where it lies."""
    if place.layer is None:
        return replace(tensor, key=place.key)
    return replace(
        tensor,
        key=place.key,
        global_shape=(place.layers, *tensor.global_shape),
        global_offset=(place.layer, *tensor.global_offset),
        axis_fragmentations=None if tensor.axis_fragmentations is None else (place.layers, *tensor.axis_fragmentations),
        prepend_axis_num=tensor.prepend_axis_num + 1,
    )


def in_their_names(keys: Collection[str], *, alike: bool) -> dict[str, list[str]]:
    """Each tensor of a stock checkpoint, and ours that it is made of: one, or where layers lie together all in order.

    The norm before experts has two names there, of which each kind of layer reads its own.

    Args:
        keys: of a model of ours, in the order of its layers.
        alike: let layers lie together.
    """
    found: dict[str, list[str]] = {}
    for key in keys:
        layer = _NUMBERED.fullmatch(key)
        if layer is None:
            found[key] = [key]
            continue
        place = f"decoder.layers.{layer[2]}."
        for name in _theirs(layer[3], has_experts=f"{place}mlp.router.weight" in keys):
            found.setdefault(f"decoder.layers.{name}" if alike else place + name, []).append(key)
    return found


def _theirs(name: str, *, has_experts: bool) -> list[str]:
    for theirs, ours in NORMS_IN_LINEAR.items():
        if name.startswith(ours):
            renamed = theirs + name.removeprefix(ours)
            return [name, renamed] if has_experts and ours == _BEFORE_FFN else [renamed]
    return [name]
