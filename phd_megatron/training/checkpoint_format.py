"""Megatron-core's torch_dist format, written and read in this process.

megatron-core 0.16 writes through forked workers and a spawned queue server: seconds for the smallest model, and a
worker that dies leaves the save waiting for ever. Here torch's own file writer does it: each rank writes and syncs one
file, and an error on any rank is raised on all of them. The result is the same format.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException

from phd_megatron.runtime.checkpoint_store import METADATA, CheckpointError
from phd_megatron.runtime.dcp_reader import CheckpointReader
from phd_megatron.training import agreement

#: content of metadata.json
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def prepare_save(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a sharded state dict into (sharded part, common part) and check that the shards cover every tensor once."""
    return agreement.everywhere(lambda: save_preprocess(state, validate_access_integrity=True))


def bytes_to_write(sharded: dict[str, Any]) -> int:
    """Bytes of tensors that this rank will write."""
    return sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id) and value.data is not None
    )


def check_space(directory: Path, sharded: dict[str, Any]) -> int:
    """Refuse a save that cannot fit, before anything is written.

    Returns:
        Bytes that all ranks together will write.

    Raises:
        CheckpointError: on all ranks, with the bytes needed and free.
    """
    total = sum(agreement.gather(bytes_to_write(sharded)))
    needed = total + total // 50 + (1 << 20)  # names, headers and random-number states

    def compare() -> None:
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise CheckpointError(
                f"no space left for a checkpoint in {directory}: it needs {_size(needed)}, {_size(free)} are free; "
                "free some, lower keep_last, or choose another --save directory"
            )

    agreement.from_rank_zero(compare)
    return total


def write(directory: Path, sharded: dict[str, Any], common: dict[str, Any]) -> None:
    """Write common.pt, the .distcp files and .metadata; metadata.json, the commit, is the caller's.

    Raises:
        UserError: on all ranks, naming the rank and the system's error (no space left, quota, input/output error).
    """

    def write_common() -> None:
        with _system_error(), open(directory / COMMON_STATE_FNAME, "wb") as stream:
            torch.save(common, stream)
            stream.flush()
            os.fsync(stream.fileno())

    agreement.from_rank_zero(write_common)

    def translate() -> dict[str, Any]:
        by_key, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        return mcore_torch.mcore_to_pyt_state_dict(by_key)

    tensors = agreement.everywhere(translate)
    planner = mcore_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    writer = _Writer(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        dcp.save(tensors, storage_writer=writer, planner=planner)
    except CheckpointException as error:
        raise CheckpointError(_first_failure(error)) from error


def read_common(directory: Path) -> dict[str, Any]:
    """The part of the state that is the same on all ranks (optimizer groups, scheduler, content description).

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than plain values and tensors.
    """
    path = directory / COMMON_STATE_FNAME
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {' '.join(first)})") from error


def requested(state: dict[str, Any]) -> dict[str, ShardedTensor | ShardedObject]:
    """What a sharded state dict asks a checkpoint for: storage key -> one of its shards."""
    sharded, _, _ = load_preprocess(state)
    return {
        value.unique_key if isinstance(value, ShardedObject) else value.key: value
        for value in nested_values(extract_sharded_base(sharded)[0])
    }


@contextmanager
def _system_error() -> Iterator[None]:
    """Raise the operating system's "No space left on device" where torch's archive writer hides it behind its own."""
    try:
        yield
    except RuntimeError as error:
        hidden: BaseException | None = error
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__cause__ or hidden.__context__
        if hidden is None:
            raise
        raise OSError(hidden.errno, hidden.strerror, hidden.filename) from error


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        with _system_error():
            return super().write_data(plan, planner)


class _LoadPlanner(mcore_torch.MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        # torch's own uses weights_only=False here
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

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        """Fill the sharded state dict from the checkpoint.

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
            raise CheckpointError(_first_failure(error)) from error
        loaded = {key: mcore_torch._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        result = mcore_torch._replace_sharded_keys_with_state_dict_keys(loaded, flat_mapping, rename_mapping)
        mcore_torch._restore_dict_types(result, sharded_state_dict)
        return result


def check_format(directory: Path, content: dict[str, Any]) -> None:
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


def _first_failure(error: CheckpointException) -> str:
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


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
