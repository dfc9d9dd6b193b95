"""Reading torch's distributed-checkpoint files without trusting them.

``.metadata`` is a pickle. It is read here with an unpickler that knows the few classes such a file is made of and
refuses every other name, so that a checkpoint from elsewhere cannot run code. The data files go through
``torch.load(weights_only=True)``. A file that is missing, cut short or damaged is named in the error.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from phd_megatron.checkpoint.store import CheckpointError

_MODULES = {module.__name__: module for module in (metadata, planner, filesystem)}
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "pathlib._local":  # where Python 3.13 says that PosixPath lives
            module = "pathlib"
        if module == "pathlib" and (module, name) in _NAMES:
            return pathlib.PurePosixPath if name == "PosixPath" else pathlib.PureWindowsPath
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        found = getattr(_MODULES.get(module), name, None)
        if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of tensors needs")


def read_metadata(directory: str | os.PathLike[str]) -> Metadata:
    """The tensors, objects and file positions of a torch_dist checkpoint.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or holds something else than checkpoint metadata.
    """
    path = Path(directory) / ".metadata"
    try:
        with open(path, "rb") as stream:
            content = _MetadataUnpickler(stream).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; load another one") from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({_words(error)}): load another checkpoint") from error
    if not isinstance(content, Metadata) or not isinstance(content.storage_data, dict):
        raise CheckpointError(f"{path} holds no checkpoint metadata: load another checkpoint")
    return content


class CheckpointReader(FileSystemReader):
    """torch's reader with the safe metadata, which is read once, and errors that name the damaged file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    # No rank argument: torch would fall back to per-rank metadata files, which this format does not have.
    def read_metadata(self) -> Metadata:
        """The checkpoint's metadata; see :func:`read_metadata`."""
        if self._metadata is None:
            self._metadata = read_metadata(self.path)
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read one file after the other.

        Raises:
            CheckpointError: a file is missing, shorter than the metadata says, or does not decode.
        """
        items_of: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            items_of.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in items_of.items():
            path = Path(self.path) / name
            self._check_length(path, items)
            try:
                super().read_data(dataclasses.replace(plan, items=items), planner).wait()
            except Exception as error:
                raise CheckpointError(f"{path} is damaged ({_words(error)}): load another checkpoint") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check_length(self, path: Path, items: list[ReadItem]) -> None:
        places = [self.storage_data[item.storage_index] for item in items]
        needed = max(place.offset + place.length for place in places)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({_words(error)}): load another checkpoint") from error
        if size < needed:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, but tensors lie in it up to byte {needed}; "
                "load another checkpoint"
            )


def _words(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
