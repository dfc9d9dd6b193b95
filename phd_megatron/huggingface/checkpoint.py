"""A Megatron checkpoint as the converter sees it: the configuration, the tokenizer and model tensors one by one.

No process group, no Megatron-Core, whatever layout saved it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phd_megatron.checkpoint import checksums
from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.status import RUN_CONFIG, own_config
from phd_megatron.checkpoint.store import CheckpointError, iteration_of, latest_complete
from phd_megatron.config.files import read_json
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import load_yaml
from phd_megatron.huggingface.json_values import Fields

_NOT_THE_MODEL = ("optimizer.",)


class MegatronCheckpoint:
    """One complete ``iter_...`` directory.

    Args:
        path: that directory, or the one it was saved into, whose tracker then chooses.
        verify: compare every file with its checksum first.
        log: where a note goes when there are no checksums.

    Raises:
        CheckpointError: if there is no complete checkpoint, a file is damaged, or it does not describe itself.
    """

    def __init__(
        self, path: str | Path, *, verify: bool = True, log: Callable[[str], None] = lambda message: None
    ) -> None:
        found = latest_complete(path)
        if found is None:
            raise CheckpointError(
                f"{path} holds no complete checkpoint; give the directory of --save, or one iter_... directory in it"
            )
        self.directory = found
        if verify:
            manifest = checksums.read_manifest(found)
            if manifest is None:
                log(checksums.unverified(found))
            else:
                checksums.verify(found, manifest)
        config = own_config(found)
        if config is None or not config.is_file():
            raise CheckpointError(
                f"{found / RUN_CONFIG} is missing, or Megatron-Bridge's: the checkpoint does not say what model it "
                "holds; only checkpoints that phd-megatron saved can be read. Load one of Megatron-LM or Bridge with "
                "pretrain --load, and save it"
            )
        self.run: RunConfig = load_yaml(config)
        self._reader = CheckpointReader(found)
        entries = self._reader.read_metadata().state_dict_metadata
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_NOT_THE_MODEL)
        }

    @property
    def iteration(self) -> int | None:
        """Training step, from the directory's name."""
        return iteration_of(self.directory)

    @property
    def tokenizer_dir(self) -> Path | None:
        """Directory of the tokenizer's files, if the checkpoint has one."""
        path = self.directory / "tokenizer"
        return path if path.is_dir() and any(path.iterdir()) else None

    @property
    def training_state(self) -> Fields:
        """Iteration, consumed samples and so on; empty when it was not saved."""
        path = self.directory / "training_state.json"
        if not os.path.lexists(path):
            return {}
        content = read_json(path, "copy the checkpoint again")
        return content if isinstance(content, dict) else {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Type of one tensor, without reading it."""
        return self.tensors[key].properties.dtype

    def read(self, key: str) -> Tensor:
        """One whole tensor on the CPU, joined from the shards of all ranks.

        Raises:
            CheckpointError: if a file is missing or damaged.
        """
        tensor = torch.empty(self.tensors[key].size, dtype=self.dtype(key))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")
            try:
                dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
            except dcp.CheckpointException as error:
                for cause, _ in error.failures.values():
                    if isinstance(cause, CheckpointError):
                        raise cause from None
                raise CheckpointError(f"{key} cannot be read from {self.directory}: {error}") from error
        return tensor
