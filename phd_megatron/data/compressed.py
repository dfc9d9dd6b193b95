"""Files as they lie on the disk, or unpacked on the way from gzip and Zstandard, in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.data.rows import Damaged, missing
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zstandard import ZstdDecompressionObj

_GZIP, _ZSTANDARD = (".gz", ".tgz"), (".zst",)
#: Bytes given to Zstandard at a time. Four of them can stand for 128 KiB, so these make at most 64 MiB.
_STEP = 1 << 11
#: What ``zstd --long=31`` writes, its most; it is also the most memory that reading takes.
_LARGEST_WINDOW = 1 << 31
_BUFFER = 1 << 17


class _Zstandard(io.RawIOBase):
    """The content of one frame after the other."""

    def __init__(self, packed: io.BufferedReader) -> None:
        import zstandard

        self._packed, self._error = packed, zstandard.ZstdError
        self._new_frame: Callable[[], ZstdDecompressionObj] = zstandard.ZstdDecompressor(
            max_window_size=_LARGEST_WINDOW
        ).decompressobj
        self._frame: ZstdDecompressionObj | None = None
        self._waiting, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]  # of any buffer
        while not self._ready:
            self._waiting = self._waiting or self._packed.read(_STEP)
            if not self._waiting:
                if self._frame is not None:
                    raise EOFError("it ends inside of a frame")
                return 0
            self._advance()
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _advance(self) -> None:
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            self._ready = memoryview(self._frame.decompress(self._waiting))
        except self._error as error:
            raise EOFError(str(error).rpartition("error: ")[2]) from error  # it says thrice that it is one
        if self._frame.eof:
            self._waiting, self._frame = self._frame.unused_data, None
        else:
            self._waiting = b""


class _Checked(io.RawIOBase):
    """Says :class:`Damaged` for all that unpacking can say, which is no error of the disk."""

    def __init__(self, inner: io.BufferedIOBase | io.RawIOBase) -> None:
        self._inner = inner

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]  # of any buffer
        try:
            return self._inner.readinto(target) or 0
        except (OSError, EOFError, zlib.error) as error:
            raise Damaged(str(error)) from error


def is_compressed(path: Path) -> bool:
    """Whether ``path`` is packed by gzip or Zstandard, by its name."""
    return path.name.lower().endswith(_GZIP + _ZSTANDARD)


def opened(path: Path) -> tuple[io.BufferedReader, io.BufferedReader]:
    """A stream of the file's content, unpacked, and the one below whose position measures progress.

    Closing the second one closes the file. Reading the first raises :class:`Damaged`.

    Raises:
        UserError: the package that unpacks it is not installed.
        OSError: the file cannot be opened.
    """
    name = path.name.lower()
    raw = path.open("rb")
    try:
        if name.endswith(_GZIP):
            return io.BufferedReader(_Checked(gzip.GzipFile(fileobj=raw)), _BUFFER), raw
        if name.endswith(_ZSTANDARD):
            return io.BufferedReader(_Checked(_Zstandard(raw)), _BUFFER), raw
    except ImportError as error:
        raw.close()
        raise UserError(missing("zstandard", path, error)) from error
    return raw, raw
