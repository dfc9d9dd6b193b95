"""Megatron-core's torch_dist format: what its files hold, and reading them without trusting them.

Written by `checkpoint/writer.py`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException

from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.store import METADATA, CheckpointError
from phd_megatron.config.plain import Json, Plain

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import CommonStateDict, ShardedStateDict, StateDict
    from torch.distributed.checkpoint.planner import ReadItem

#: beside the tensors: the tokenizer's files
TOKENIZER = "tokenizer"
#: content of metadata.json
FORMAT: dict[str, str | int] = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def read_common(directory: Path) -> CommonStateDict:
    """The part of the state that is the same on all ranks (optimizer groups, scheduler, content description).

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than plain values and tensors.
    """
    path = directory / COMMON_STATE_FNAME
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {' '.join(first)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a mapping: load another checkpoint")
    return check_common(path, content)


def check_common(path: Path, content: CommonStateDict) -> CommonStateDict:
    """Refuse entries that are read and are not what they should be; the content, else."""
    _check_entry(path, content, "content_metadata", "a mapping", lambda value: isinstance(value, dict))
    _check_entry(
        path,
        content,
        "opt_param_scheduler",
        "a mapping with a count of samples in num_steps",
        lambda value: isinstance(value, dict) and isinstance(value.get("num_steps"), int) and value["num_steps"] >= 0,
    )
    return content


def _check_entry(path: Path, content: CommonStateDict, name: str, wanted: str, fits: Callable[[Plain], bool]) -> None:
    value = content.get(name)
    if value is not None and not fits(value):
        raise CheckpointError(f"{path} is damaged: {name} is {repr(value)[:80]}, not {wanted}; load another checkpoint")


def requested(state: ShardedStateDict) -> dict[str, ShardedTensor | ShardedObject]:
    """What a sharded state dict asks a checkpoint for: storage key -> one of its shards."""
    sharded, _, _ = load_preprocess(state)
    return {str(storage_key(value)): value for value in nested_values(extract_sharded_base(sharded)[0])}


def storage_key(value: ShardedTensor | ShardedObject | Plain) -> str | None:
    """Under what a shard is stored; None for what is not stored as one."""
    if isinstance(value, ShardedObject):
        return str(value.unique_key)
    return str(value.key) if isinstance(value, ShardedTensor) else None


class _LoadPlanner(mcore_torch.MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch's own would unpickle anything here
        with torch.serialization.safe_globals([io.BytesIO]):
            content = torch.load(value, map_location="cpu", weights_only=True)
        key = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], content)
        else:
            self.state_dict[key] = content


class SafeLoad(mcore_torch.TorchDistLoadShardedStrategy):
    """megatron-core's load strategy on top of :class:`CheckpointReader`."""

    def __init__(self, reader: CheckpointReader) -> None:
        super().__init__()
        self._reader = reader

    def load(
        self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> StateDict:
        """Fill the sharded state dict from the checkpoint; how it was written in the background makes no difference.

        Raises:
            CheckpointError: on all ranks; names the damaged file.
        """
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        by_key, flat_mapping, rename_mapping = mcore_torch._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict
        )
        state = mcore_torch.mcore_to_pyt_state_dict(by_key, True)
        planner = _LoadPlanner(
            shapes_validation_sharded_tensors=[value for value in tensors if not value.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={value.key: value for value in tensors if value.allow_shape_mismatch},
        )
        try:
            dcp.state_dict_loader._load_state_dict(state, self._reader, planner=planner)
        except CheckpointException as error:
            raise CheckpointError(first_failure(error)) from error
        loaded = {key: mcore_torch._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        result = mcore_torch._replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
        mcore_torch._restore_dict_types(result, sharded_state_dict)
        return result


def check_format(directory: Path, content: Json) -> None:
    """Refuse a checkpoint whose metadata.json names another format than torch_dist version 1."""
    if content.get("sharded_backend") != FORMAT["sharded_backend"]:
        raise CheckpointError(
            f"{directory / METADATA} says format {content.get('sharded_backend')!r}; "
            "only torch_dist checkpoints are read: convert it with Megatron-LM's tools first"
        )


def names(keys: Iterable[str], limit: int = 3) -> str:
    """The first few keys for a message."""
    ordered = sorted(keys)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


def first_failure(error: CheckpointException) -> str:
    """What went wrong on the first rank that failed, in one sentence."""
    failures = {number: pair[0] for number, pair in error.failures.items()}
    texts = {}
    for number, cause in failures.items():
        text = str(cause).strip()
        texts[number] = text if isinstance(cause, CheckpointError) else f"{type(cause).__name__}: {text}"
    if not texts:
        return str(error)
    number, text = min(texts.items())
    others = f" (and {len(texts) - 1} more ranks)" if len(texts) > 1 else ""
    return f"rank {number}: {text}{others}"
