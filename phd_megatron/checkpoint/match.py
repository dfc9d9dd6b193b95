"""Does a checkpoint hold what this model and its optimizer ask for?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phd_megatron.checkpoint import format as checkpoint_format
from phd_megatron.checkpoint.state import content
from phd_megatron.checkpoint.status import RUN_CONFIG
from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.runtime import agreement

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import CommonStateDict, ShardedStateDict
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES

BUILD_IT = f"build the model that its {RUN_CONFIG} describes"


def check_sharding(path: Path, common: CommonStateDict) -> None:
    """Refuse optimizer states that load under one layout only, which Megatron-LM can write."""
    expected = content()["distrib_optim_sharding_type"]
    found = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type", expected)
    if found != expected:
        raise CheckpointError(
            f"{path} holds optimizer states of sharding type {found}, which load under the layout that saved them "
            f"only; save it again as {expected} (Megatron-LM's --dist-ckpt-optim-fully-reshardable), or load "
            "parameters only with --no-load-optim or --finetune"
        )


def check_contents(
    path: Path,
    state: ShardedStateDict,
    stored: Mapping[str, STORAGE_TYPES],
    wants_optimizer: bool,
    may_lack: frozenset[str],
    cure: str = BUILD_IT,
) -> frozenset[str]:
    """Compare names and shapes before anything is read, so that another architecture is refused by name.

    Args:
        cure: what to do about another model.

    Returns:
        Keys that this model has, the checkpoint lacks and that stay as they are: those in ``may_lack`` and Transformer
        Engine's extra states.
    """
    wanted = checkpoint_format.requested(state)
    missing = {key for key in wanted if key not in stored}
    absent = frozenset(key for key in missing if "_extra_state" in key or key in may_lack)
    missing -= absent

    def compare() -> None:
        if wants_optimizer and not any(key.startswith("optimizer.") for key in stored):
            raise CheckpointError(
                f"{path} holds no optimizer state; start from its parameters with --finetune, or --no-load-optim"
            )
        if missing:
            raise CheckpointError(
                f"{path} is of another architecture: it lacks {checkpoint_format.names(missing)}; {cure}"
            )
        for key, value in sorted(wanted.items()):
            if key in stored:
                _check_shard(path, key, value, stored[key], cure)

    agreement.everywhere(compare)
    everyone: set[str] = set().union(*agreement.gather(sorted(wanted)))
    left_over = {
        key
        for key in stored
        if key not in everyone and not key.startswith(("optimizer.", "rng_state/")) and "_extra_state" not in key
    }
    if left_over:
        raise CheckpointError(
            f"{path} is of another architecture: this model has no {checkpoint_format.names(left_over)}; {cure}"
        )
    return absent


def _check_shard(path: Path, key: str, value: ShardedTensor | ShardedObject, entry: STORAGE_TYPES, cure: str) -> None:
    if isinstance(value, ShardedTensor) != isinstance(entry, TensorStorageMetadata):
        kinds = ("a tensor", "an object")
        there, here = kinds if isinstance(entry, TensorStorageMetadata) else kinds[::-1]
        raise CheckpointError(f"{path} is damaged: {key} is {there} in it, not {here}; load another one")
    if isinstance(entry, TensorStorageMetadata) and not value.allow_shape_mismatch:
        shape, expected = tuple(entry.size), tuple(value.global_shape)
        if shape != expected:
            raise CheckpointError(
                f"{path} is of another architecture: {key} has shape {shape} there and {expected} in this model; {cure}"
            )
