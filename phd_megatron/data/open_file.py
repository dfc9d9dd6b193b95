"""Numbers in files that a run reads for days: with pread, never through a mapping.

A mapped file that is cut under a run ends the process with SIGBUS, which Python cannot turn into a message. A read that
comes back short can.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import resource
import stat
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import numpy.typing as npt

from phd_megatron.config.plain import Plain
from phd_megatron.errors import UserError

logger = logging.getLogger(__name__)

_AGAIN = "stop the run, bring the data back as it was, and start again from the last checkpoint"
#: Descriptors that are open, oldest first. Blends and long orders have more files than a process may open, and use few
#: of them at a time.
_opened: OrderedDict[int, weakref.ref[OpenFile]] = OrderedDict()


def _most_open() -> int:
    return min(1024, max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


class OpenFile:
    """A file that is read at any place. Processes that fork share it; a pickle opens the same file again.

    Raises:
        UserError: when it cannot be opened or read, or is not the file any more that it was at first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._descriptor = -1
        stat = os.fstat(self._open())
        self.size, self.mtime_ns, self.inode = stat.st_size, stat.st_mtime_ns, stat.st_ino
        self._samples: bytes | None = None

    def _open(self) -> int:
        while len(_opened) >= _most_open():
            _, reference = _opened.popitem(last=False)
            if (oldest := reference()) is not None:
                oldest._close()
        try:
            # Not blocking, so that a pipe in the file's place is an error and no wait.
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); check the file and its rights") from error
        _opened[id(self)] = weakref.ref(self)
        return self._descriptor

    def _open_again(self) -> int:
        stat = os.fstat(self._open())
        if (stat.st_size, stat.st_ino) != (self.size, self.inode):
            raise UserError(f"{self.path} was replaced while it is being read; {_AGAIN}")
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on."""
        descriptor = self._descriptor if self._descriptor >= 0 else self._open_again()
        try:
            data = os.pread(descriptor, size, offset)
            while len(data) < size:  # one call gives at most 2 GiB
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    raise self._resized(os.fstat(descriptor).st_size)
                data += more
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more ({error.strerror}); {_AGAIN}") from error
        return data

    def watch(self) -> None:
        """Remember parts of the content, with which :meth:`look` compares."""
        self._samples = self._sample()

    def look(self) -> None:
        """Compare the file with what it was."""
        try:
            stat = os.fstat(self._descriptor if self._descriptor >= 0 else self._open_again())
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more ({error.strerror}); {_AGAIN}") from error
        if stat.st_size != self.size:
            raise self._resized(stat.st_size)
        if stat.st_mtime_ns != self.mtime_ns:
            if self._samples is not None and self._sample() != self._samples:
                raise UserError(f"{self.path} was overwritten with other content while it is being read; {_AGAIN}")
            logger.warning("%s got a new time while it is being read; the parts looked at are as they were", self.path)
            self.mtime_ns = stat.st_mtime_ns

    def _resized(self, size: int) -> UserError:
        what = "cut" if size < self.size else "made longer"
        return UserError(
            f"{self.path} was {what} while it is being read: it has {size} bytes, and had {self.size}; {_AGAIN}"
        )

    def _sample(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for begin, end in spread(self.size, 16, 4096):
            digest.update(self.read(end - begin, begin))
        return digest.digest()

    def __getstate__(self) -> dict[str, Plain]:
        return {**vars(self), "_descriptor": -1}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            _opened.pop(id(self), None)
            self._close()


def spread(size: int, blocks: int, block: int) -> Iterator[tuple[int, int]]:
    """Begin and end of ``blocks`` stretches of ``block`` bytes, even over ``size`` bytes; all of a smaller file.

    They begin at multiples of 16, so they hold whole tokens of any type.
    """
    if size <= blocks * block:
        yield 0, size
        return
    for number in range(blocks):
        begin = (size - block) * number // (blocks - 1) // 16 * 16
        yield begin, begin + block if number < blocks - 1 else size


class FileArray:
    """An array in an open file, of which one row or a stretch of rows is read at a time.

    Args:
        shape: the first dimension counts rows.
        offset: bytes before the first row.
    """

    def __init__(self, file: OpenFile, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int) -> None:
        self.file, self.dtype, self.shape, self.offset = file, np.dtype(dtype), shape, offset
        self._row_bytes = math.prod(shape[1:]) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: SupportsInt) -> Any:
        number = int(index)
        if not -self.shape[0] <= number < self.shape[0]:
            raise IndexError(f"row {number} of {self.shape[0]}")
        if number < 0:
            number += self.shape[0]
        values = np.frombuffer(self.file.read(self._row_bytes, self.offset + number * self._row_bytes), self.dtype)
        return values[0] if len(self.shape) == 1 else values.reshape(self.shape[1:])

    def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows from ``begin`` to before ``end``, in memory."""
        begin, end, _ = slice(begin, end).indices(self.shape[0])
        rows = max(0, end - begin)
        data = self.file.read(rows * self._row_bytes, self.offset + begin * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])

    def chunks(self, begin: int = 0, end: int | None = None, rows: int = 1 << 20) -> Iterator[np.ndarray]:
        """The same stretch in parts of at most ``rows``."""
        begin, end, _ = slice(begin, end).indices(self.shape[0])
        for start in range(begin, end, rows):
            yield self.read(start, min(end, start + rows))


def open_npy(path: str | Path) -> FileArray:
    """The array in an ``.npy`` file of numbers.

    Raises:
        ValueError: for a file of another kind, of objects, or of another size than its header says.
        FileNotFoundError: where there is none.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no regular file")
    with open(path, "rb") as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version} of .npy")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        offset = stream.tell()
    if dtype.hasobject or by_columns or not shape:
        raise ValueError(f"an array of {dtype}, by columns or without rows")
    file = OpenFile(path)
    wanted = offset + math.prod(shape) * dtype.itemsize
    if file.size != wanted:
        raise ValueError(f"{file.size} bytes and not {wanted}")
    return FileArray(file, dtype, shape, offset)
