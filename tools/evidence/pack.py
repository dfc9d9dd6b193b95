"""A prepared text as one xz archive, or as parts of it, for a machine that has no network."""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from phd_megatron.errors import UserError

_BLOCK = 1 << 20
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 28, "lc": 0, "lp": 1, "pb": 1}]


class _Joined(io.RawIOBase):
    """Files read one after the other."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = list(paths)
        self._file: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._paths:
                    return 0
                self._file = self._paths.pop(0).open("rb")
            count = self._file.readinto(buffer)  # type: ignore[attr-defined]
            if count:
                return int(count)
            self._file.close()
            self._file = None


def parts_of(folder: Path, text: str) -> list[Path]:
    """``TEXT.tar.xz``, or ``TEXT.tar.xz.00`` and on.

    Raises:
        UserError: when there is none.
    """
    parts = sorted(folder.glob(f"{text}.tar.xz*"))
    if not parts:
        raise UserError(f"{folder} holds no {text}.tar.xz; make it with `python -m evidence pack {text}`")
    return parts


@contextmanager
def open_parts(folder: Path, text: str) -> Iterator[IO[bytes]]:
    """The archive's content as a plain stream."""
    joined = io.BufferedReader(_Joined(parts_of(folder, text)), _BLOCK)
    with lzma.open(joined) as stream:
        yield stream


def pack(prepared: Path, files: list[str], output: Path, part_bytes: int) -> list[Path]:
    """Write ``prepared``'s files and folders into ``output``, in parts of at most ``part_bytes``.

    The archive holds no times and no owners: the same data gives the same bytes.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for old in output.parent.glob(f"{output.name}*"):
        old.unlink()
    with (
        lzma.open(output, "wb", format=lzma.FORMAT_XZ, filters=_FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in files:
            archive.add(prepared / name, name, filter=_anonymous)
    if output.stat().st_size <= part_bytes:
        return [output]
    parts: list[Path] = []
    with output.open("rb") as whole:
        while block := whole.read(part_bytes):
            parts.append(output.with_name(f"{output.name}.{len(parts):02d}"))
            parts[-1].write_bytes(block)
    output.unlink()
    return parts


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info
