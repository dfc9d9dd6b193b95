"""Megatron's GPTDataset with an index cache that survives crashes, several runs at once and replaced data.

Megatron writes the three arrays of an index in place, loads them with ``allow_pickle=True``, keys them by path only and
lets rank 0 alone build them. Here they are one ``.npz``-free set of ``.npy`` files that appear by rename, are loaded
with ``allow_pickle=False``, are keyed by the data's sizes and time too, are rebuilt when damaged (`index_cache.py`),
and are built by any rank that does not see them (file systems need not be shared between nodes).
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import SplitPlan
from phd_megatron.data.index_cache import Arrays, Files, forget_index, is_alone, is_as_written, load_index, save_index
from phd_megatron.data.indexed import IndexedInfo
from phd_megatron.data.open_file import FileArray
from phd_megatron.data.samples import Sample, Samples
from phd_megatron.data.token_files import TokenFiles
from phd_megatron.data.tokenizers import Tokenizer
from phd_megatron.errors import UserError
from phd_megatron.phd.documents import positions_in_documents, starts_of_tokens

logger = logging.getLogger(__name__)


@dataclass
class IndexedGPTConfig(GPTDatasetConfig):
    """``path_to_cache`` stays None, which switches Megatron's own cache off, also that of blends."""

    index_cache: str | None = None
    """Directory of the index cache; None is PREFIX.cache beside the data, or no cache where that cannot be written."""

    fingerprints: dict[str, list[int]] = field(default_factory=dict)
    """Per prefix, sizes and time of the files, so that replaced data does not meet an old index."""

    infos: dict[str, IndexedInfo] = field(default_factory=dict)
    """Per prefix, the checked files."""

    separate_documents: bool = False
    """Samples say where documents begin (``reset_attention_mask``). Megatron's own field would make dense masks."""

    restart_positions: bool = False
    """Positions count from each document's start (``reset_position_ids``)."""


class IndexedGPTDataset(GPTDataset):
    """``GPTDataset`` whose index comes from the cache described above. Samples and order are Megatron's."""

    config: IndexedGPTConfig
    dataset: TokenFiles

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> TokenFiles:
        """Megatron's would map the files."""
        assert isinstance(config, IndexedGPTConfig)
        return TokenFiles(config.infos[dataset_path], config.tokenizer.vocab_size)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: TokenFiles) -> int:
        """Sequences of the data."""
        return len(low_level_dataset)

    def __getitem__(self, idx: int | None) -> Sample:
        """A sample, which says where its documents begin if it is asked for."""
        sample: Sample = super().__getitem__(idx)
        if self.config.separate_documents:
            starts = starts_of_tokens(sample["tokens"], self.config.tokenizer.eod)
            sample["document_starts"] = starts
            if self.config.restart_positions:
                sample["position_ids"] = positions_in_documents(starts)
        return sample

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, ...]:
        """Token ids of a sample, its documents, and what else Megatron-Core says of them.

        Raises:
            UserError: when the index does not fit the data, which a damaged cache does not.
        """
        try:
            found = super()._query_document_sample_shuffle_indices(idx)
            text = found[0]
            if text.shape == (self.config.sequence_length + 1,) and int(text.min()) >= 0:  # a short one is padded
                return tuple(found)
            reason = "it is too short"
        except (IndexError, ValueError) as error:
            reason = str(error)
        raise self._damaged(idx, reason)

    def _damaged(self, sample: int, reason: str) -> UserError:
        return UserError(
            f"sample {sample} of {self.dataset_path!r} cannot be made of the index {self._cache_path()}-*.npy "
            f"({reason}): it is damaged; delete these files, and it is built again"
        )

    def _cache_path(self) -> Path:
        key = f"{self.unique_description}{self.config.fingerprints.get(self.dataset_path)}"
        name = hashlib.blake2b(key.encode("utf-8"), digest_size=12).hexdigest()
        return Path(self.config.index_cache or f"{self.dataset_path}.cache") / f"{self.index_split.name}-{name}"

    def _build_document_sample_shuffle_indices(self) -> Arrays | Files:
        base = self._cache_path()
        loaded = load_index(base, read_all=is_alone())
        if loaded is not None:
            return loaded
        with self.dataset.lengths_in_memory():
            built = self._build_in_memory()
        try:
            save_index(base, built)
            return load_index(base, read_all=False) or built  # the files' pages are shared by the ranks of a node
        except OSError as error:
            if self.config.index_cache is not None:
                raise UserError(
                    f"--data-cache-path {self.config.index_cache} cannot be written ({error.strerror or error}); free "
                    f"space there, or name a directory that can be written"
                ) from error
            logger.warning(
                "index cache %s cannot be written (%s); each process keeps its own index in memory; "
                "--data-cache-path names another place",
                base.parent,
                error,
            )
        return built

    def forget_damaged_cache(self) -> bool:
        """Read the whole index, if it is in files, and have it built again if it is damaged; whether it is."""
        files = self.document_index, self.sample_index, self.shuffle_index
        if not all(isinstance(file, FileArray) for file in files) or is_as_written(self._cache_path(), files):
            return False
        forget_index(self._cache_path())
        return True

    def _build_in_memory(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        # `mock` is what makes Megatron build without any path for a cache; nothing else in the call reads it.
        self.config = copy.copy(config)
        self.config.mock = True
        self.config.path_to_cache = None
        previous = logging.getLogger("megatron.core.datasets.gpt_dataset").level
        logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(logging.ERROR)  # "unable to save" is meant
        try:
            document, sample, shuffle = super()._build_document_sample_shuffle_indices()
        finally:
            logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(previous)
            self.config = config
        return document, sample, shuffle


class OrderedGPTDataset(IndexedGPTDataset):
    """One epoch of the documents in their order, cut into samples that come in one fixed permutation.

    Where a sample begins depends on the documents and the sequence length alone, and the first N samples are a fair
    sample of all. The class's name is part of the cache's key, so an index in Megatron's order is never met here.
    """

    def _build_in_memory(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from megatron.core.datasets import helpers

        document = np.asarray(self.indices, np.int32)
        sample = helpers.build_sample_idx(
            self.dataset.sequence_lengths,
            document,
            self.config.sequence_length,
            1,  # epoch
            self._get_num_tokens_per_epoch(),
        )
        return document, sample, permutation(len(sample) - 1)


#: Another one would make every validation loss a number of other samples.
_PERMUTATION_SEED = 20250421


def permutation(samples: int) -> np.ndarray:
    """The order of a pass over so many samples. numpy promises that these numbers stay in later releases."""
    return np.random.RandomState(_PERMUTATION_SEED).permutation(samples)


def forget_damaged_caches(datasets: Iterable[Samples | None]) -> int:
    """Of all index caches that these datasets read; how many were damaged."""
    count = 0
    for dataset in datasets:
        if isinstance(dataset, IndexedGPTDataset):
            count += dataset.forget_damaged_cache()
        elif dataset is not None and hasattr(dataset, "dataset"):  # around another
            count += forget_damaged_caches([dataset.dataset])
        else:  # made of blocks, of a blend's parts, of a pass's
            inner = (getattr(dataset, name, ()) for name in ("blocks", "datasets", "parts"))
            count += forget_damaged_caches(part for parts in inner for part in parts)
    return count


def index_config(
    run: RunConfig,
    tokenizer: Tokenizer,
    plan: SplitPlan,
    infos: dict[str, IndexedInfo],
    index: int,
    *,
    random_seed: int = _PERMUTATION_SEED,
    blend: tuple[list[str], list[float] | None] | None = None,
    **options: float,
) -> IndexedGPTConfig:
    """What Megatron's datasets are told of split ``index``; the default of ``random_seed`` is that of a pass."""
    config = IndexedGPTConfig(
        random_seed=random_seed,
        sequence_length=run.model.seq_length,
        blend=blend or (plan.prefixes, None),
        split="1,1,1",  # replaced below by the exact borders of the one split that is built
        tokenizer=TokenizerView(tokenizer.vocab_size, tokenizer.eod, tokenizer.unique_identifiers),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=run.data.eod_mask_loss,
        create_attention_mask=False,
        separate_documents=run.data.reset_attention_mask,
        restart_positions=run.data.reset_position_ids,
        index_cache=run.data.data_cache_path,
        fingerprints={
            p: [infos[p].bin_file.size, infos[p].idx_file.size, infos[p].idx_file.mtime_ns] for p in plan.prefixes
        },
        infos={p: infos[p] for p in plan.prefixes},
        **options,
    )
    config.split = run.data.split
    config.split_matrix = [plan.share if i == index else None for i in range(3)]
    return config


class TokenizerView:
    """What Megatron's datasets want to know of a tokenizer.

    ``pad`` is -1, an id no data holds: a real one would be masked and replaced wherever it occurs in the text.
    """

    pad = -1

    def __init__(self, vocab_size: int, eod: int, identifiers: dict[str, str | int]) -> None:
        self.vocab_size = vocab_size
        self.eod = eod
        self.unique_identifiers = identifiers
