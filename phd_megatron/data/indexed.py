r"""Megatron's indexed data: ``PREFIX.bin`` holds token ids, ``PREFIX.idx`` says where each sequence lies.

Layout of .idx (megatron.core.datasets.indexed_dataset): 9 bytes ``MMIDIDX\0\0``, u64 version 1, u8 dtype code,
u64 sequences n, u64 document marks d, int32[n] lengths in tokens, int64[n] byte offsets, int64[d] document marks
(0, then the number of sequences after each document). This module writes it in bounded memory and checks it without
importing Megatron, which takes seconds and holds the whole index as Python lists while writing.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from phd_megatron.data.open_file import FileArray, OpenFile
from phd_megatron.errors import UserError

AGAIN = "prepare or copy the data again"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CHUNK = 1 << 18


def dtype_for(vocab_size: int) -> type[np.generic]:
    """Megatron's choice: uint16 below 65500 ids, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


class IndexedWriter:
    """Writes ``directory/data.bin`` and ``directory/data.idx``. Memory does not grow with the data."""

    def __init__(self, directory: Path, dtype: type[np.generic]) -> None:
        self.dtype = np.dtype(dtype)
        self.bin_path, self.idx_path = directory / "data.bin", directory / "data.idx"
        self._lengths_path, self._marks_path = directory / "lengths", directory / "marks"
        self._bin: BinaryIO = self.bin_path.open("wb")
        self._lengths: BinaryIO = self._lengths_path.open("wb")
        self._marks: BinaryIO = self._marks_path.open("wb")
        self._marks.write(struct.pack("<q", 0))
        self.sequences = self.documents = self.tokens = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, marks: np.ndarray) -> None:
        """Append sequences: ``tokens`` [sum(lengths)], and ``marks``, how many of them precede each document end."""
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._lengths.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self._marks.write(np.ascontiguousarray(marks + self.sequences, dtype=np.int64).data)
        self.sequences += len(lengths)
        self.documents += len(marks)
        self.tokens += int(tokens.size)

    def finish(self) -> None:
        """Write the index and bring both files to the disk."""
        _sync(self._bin)
        self.close()
        code = next(code for code, dtype in _DTYPES.items() if np.dtype(dtype) == self.dtype)
        with self.idx_path.open("wb") as out, self._lengths_path.open("rb") as lengths:
            out.write(_HEADER.pack(_MAGIC, 1, code, self.sequences, self.documents + 1))
            while block := lengths.read(4 * _CHUNK):
                out.write(block)
            lengths.seek(0)
            offset = 0
            while block := lengths.read(4 * _CHUNK):
                ends = np.cumsum(np.frombuffer(block, np.int32), dtype=np.int64) * self.dtype.itemsize + offset
                out.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).data)
                offset = int(ends[-1])
            with self._marks_path.open("rb") as marks:
                while block := marks.read(8 * _CHUNK):
                    out.write(block)
            _sync(out)
        self._lengths_path.unlink()
        self._marks_path.unlink()

    def close(self) -> None:
        """Close what is open; harmless twice."""
        for stream in (self._bin, self._lengths, self._marks):
            stream.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class IndexedInfo:
    """A pair whose header and sizes were looked at.

    ``lengths`` int32 and ``pointers`` int64 [sequences], ``marks`` int64 [documents + 1] lie in the index.
    """

    prefix: str
    dtype: np.dtype[np.generic]
    lengths: FileArray
    pointers: FileArray
    marks: FileArray
    bin_file: OpenFile
    idx_file: OpenFile

    @property
    def documents(self) -> int:
        """Documents of the index, empty ones too."""
        return len(self.marks) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.bin_file.size // self.dtype.itemsize

    def tokens_of(self, sequences: range) -> int:
        """Tokens of some of the sequences."""
        return sum(int(part.sum(dtype=np.int64)) for part in self.lengths.chunks(sequences.start, sequences.stop))


def check_indexed(prefix: str, named_by: str = "--data-path") -> IndexedInfo:
    """Open ``PREFIX.bin/.idx`` and compare their sizes with the header of the index.

    ``named_by`` is what named it, for the message.

    It takes no longer for a larger index; :func:`phd_megatron.data.verify.verify_index` reads the whole of it.

    Raises UserError when one is missing, the header is not Megatron's, or a size is not what the index says.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        hint = " (give the prefix without .bin or .idx)" if prefix.endswith((".bin", ".idx")) else ""
        raise UserError(
            f"data {prefix!r}: {' and '.join(missing)} not found{hint}; prepare the data with `phd-megatron prepare "
            f"--output-prefix {prefix}`, or correct {named_by}"
        )
    bin_file, idx_file = OpenFile(bin_path), OpenFile(idx_path)
    if idx_file.size < _HEADER.size:
        raise UserError(f"{idx_path} is truncated: {idx_file.size} bytes are less than its header; {AGAIN}")
    head = idx_file.read(_HEADER.size, 0)
    magic, version, code, sequences, marks = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise UserError(
            f"{idx_path} is not an index of Megatron token data (header {head[:18]!r}); give another prefix, or {AGAIN}"
        )
    expected = _HEADER.size + 12 * sequences + 8 * marks
    if sequences and idx_file.size == expected + sequences:
        raise UserError(
            f"{idx_path} is an index of multimodal data: behind its {sequences} sequences it says of each what it is, "
            "text or an image; only text is trained on here, so prepare the text alone and give its prefix"
        )
    if idx_file.size != expected:
        word = "truncated" if idx_file.size < expected else "damaged"
        raise UserError(
            f"{idx_path} is {word}: {idx_file.size} bytes, but its header ({sequences} sequences, {marks - 1} "
            f"documents) makes {expected}; {AGAIN}"
        )
    if sequences == 0:
        raise UserError(f"data {prefix!r} is empty: its index lists no sequence; prepare it from an input with text")
    begin = _HEADER.size
    return IndexedInfo(
        prefix,
        np.dtype(_DTYPES[code]),
        FileArray(idx_file, np.int32, (sequences,), begin),
        FileArray(idx_file, np.int64, (sequences,), begin + 4 * sequences),
        FileArray(idx_file, np.int64, (marks,), begin + 12 * sequences),
        bin_file,
        idx_file,
    )
