"""The sequences of a prepared data set, as Megatron's datasets read them while a run trains.

Megatron's own reader maps both files, takes every pointer as it is, and hands on whatever ids lie there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from phd_megatron.data.indexed import IndexedInfo
from phd_megatron.data.verify import check_ids
from phd_megatron.errors import UserError

SECONDS_BETWEEN_LOOKS = 1.0  #: at the size and time of the files


class TokenFiles:
    """Random access to sequences. Every read is checked against the index and the vocabulary.

    Args:
        info: the checked pair.
        vocab_size: ids are below it.
    """

    def __init__(self, info: IndexedInfo, vocab_size: int) -> None:
        self._info, self._vocab_size = info, vocab_size
        self.path_prefix = info.prefix
        self._lengths_in_memory: np.ndarray | None = None
        self._next_look = 0.0
        for file in (info.bin_file, info.idx_file):
            file.watch()

    def __len__(self) -> int:
        return len(self._info.lengths)

    @contextmanager
    def lengths_in_memory(self) -> Iterator[None]:
        """Inside, ``sequence_lengths`` is an array: 4 bytes a sequence, for building an index of samples."""
        self._lengths_in_memory = self._info.lengths.read()
        try:
            yield
        finally:
            self._lengths_in_memory = None

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int32 [sequences]; inside of :meth:`lengths_in_memory` only."""
        assert self._lengths_in_memory is not None
        return self._lengths_in_memory

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids of a sequence, or of ``length`` tokens from ``offset`` on.

        Raises:
            UserError: when a file was changed under the run, or holds what it should not.
        """
        info, now = self._info, time.monotonic()
        if now >= self._next_look:
            info.bin_file.look()
            info.idx_file.look()
            self._next_look = now + SECONDS_BETWEEN_LOOKS
        pointer, total = int(info.pointers[index]), int(info.lengths[index])
        count = total - offset if length is None else int(length)
        size = info.dtype.itemsize
        if pointer < 0 or pointer % size or not 0 <= total <= (info.bin_file.size - pointer) // size:
            raise UserError(
                f"{info.idx_file.path} was overwritten while it is being read: sequence {int(index)} has now {total} "
                f"tokens at byte {pointer}; stop the run, bring the data back, and start from the last checkpoint"
            )
        if not 0 <= offset <= offset + count <= total:
            raise UserError(
                f"a sample asks for tokens {offset} to {offset + count} of sequence {int(index)} of {info.prefix!r}, "
                f"which has {total}: the index cache in {info.prefix}.cache (or --data-cache-path) is damaged; delete "
                "it, and it is built again"
            )
        place = pointer + offset * size
        tokens = np.frombuffer(info.bin_file.read(count * size, place), info.dtype)
        check_ids(info, tokens, place // size, self._vocab_size)
        return tokens
