"""Checksums of a checkpoint's files, so that a damaged one is named before anything of it is used.

``checksums.json`` lies beside the files and is written before the commit::

    {"algorithm": "crc32", "files": {"__0_0.distcp": [bytes, "8 hex digits"], ...}, "own": "8 hex digits"}

``own`` is the checksum of the list itself. CRC-32 finds every single flipped byte and every burst of up to four; it is
in the standard library and runs at some GB/s with the interpreter's lock released. It is no protection against forgery.
Standard library only.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from phd_megatron.checkpoint import store
from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.runtime.durable import read_small

MANIFEST = "checksums.json"
ALGORITHM = "crc32"
_BLOCK = 1 << 22  # bytes read at once
_LONGEST = 1 << 27  # bytes of a manifest: a million files
_THREADS = 4  # files read at once by one process


class FileSum(NamedTuple):
    """Length in bytes and checksum of one file."""

    size: int
    digest: str


class SummingWriter(io.BufferedWriter):
    """A new binary file that is written from its start to its end, and the checksum of what was written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._crc = self._size = 0

    # torch's writer passes bytes and memoryviews
    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override]
        """Write and sum."""
        self._crc = zlib.crc32(data, self._crc)
        written = super().write(data)
        self._size += written
        return written

    @property
    def sum(self) -> FileSum:
        """Of everything written so far."""
        return FileSum(self._size, _hex(self._crc))


def sum_file(path: str | os.PathLike[str]) -> FileSum:
    """Read a whole file.

    Raises:
        OSError: it cannot be read.
    """
    crc = size = 0
    block = bytearray(_BLOCK)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            crc = zlib.crc32(view[:count], crc)
            size += count
    return FileSum(size, _hex(crc))


def write_manifest(directory: Path, known: Mapping[str, FileSum], coming: Mapping[str, str]) -> None:
    """Write ``checksums.json`` for every file under ``directory``.

    Args:
        known: sums that the writers of the files have formed; the other files, small ones, are read.
        coming: names and texts of files that will be written later.

    Raises:
        CheckpointError: a known file has not the length that was written.
    """
    files = {name: FileSum(len(text.encode()), _hex(zlib.crc32(text.encode()))) for name, text in coming.items()}
    for name in _names(directory):
        if name == store.UNFINISHED:  # gone after the commit
            continue
        files[name] = known.get(name) or sum_file(directory / name)
    for name, expected in known.items():
        size = (directory / name).stat().st_size
        if size != expected.size:
            raise CheckpointError(f"{directory / name} has {size} bytes after {expected.size} were written to it")
    content = {"algorithm": ALGORITHM, "files": files, "own": _own(files)}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, FileSum] | None:
    """File name, relative to ``directory``, -> its sum. None when there is no manifest (older checkpoints).

    Raises:
        CheckpointError: the manifest itself is damaged or of a kind that this release does not know, or it is gone and
            the checkpoint says that it had one.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(read_small(path, _LONGEST))
        algorithm = content["algorithm"]
        files = {str(name): FileSum(int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        own = content["own"]
    except FileNotFoundError:
        if store.had_checksums(directory):
            raise CheckpointError(
                f"{path} is missing, and the checkpoint was saved with it, as {directory / store.TRAINING_STATE} says; "
                f"without it damage to the other files would go unseen: put it back, {_cure(directory)}"
            ) from None
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_cure(directory)}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); {_cure(directory)}") from error
    if algorithm != ALGORITHM:
        raise CheckpointError(f"{path} is damaged: its algorithm is {algorithm!r}, not {ALGORITHM}; {_cure(directory)}")
    if own != _own(files):
        raise CheckpointError(f"{path} is damaged: its own checksum is {_own(files)}, not {own}; {_cure(directory)}")
    return files


def unverified(directory: Path) -> str:
    """The note about a checkpoint without a manifest."""
    saved = "an earlier release or another program saved it"
    return f"note: {directory} has no {MANIFEST} ({saved}), so damage to its files may go unseen"


def verify(directory: Path, manifest: Mapping[str, FileSum], *, part: int = 0, parts: int = 1) -> int:
    """Compare the files of a checkpoint with its manifest; several processes take a part of the files each.

    Returns:
        Bytes that were read.

    Raises:
        CheckpointError: naming every file of this part that is missing, too short or long, or damaged.
    """
    by_size = sorted(manifest, key=lambda name: (-manifest[name].size, name))
    mine = by_size[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = [
            problem for problem in pool.map(lambda name: _problem(directory, name, manifest[name]), mine) if problem
        ]
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}; {_cure(directory)}")
    return sum(manifest[name].size for name in mine)


def _problem(directory: Path, name: str, expected: FileSum) -> str | None:
    path = directory / name
    try:
        size = path.stat().st_size
        if size != expected.size:
            kind = "truncated" if size < expected.size else "damaged"
            return f"{path} is {kind}: it has {size} bytes, and had {expected.size} when it was saved"
        found = sum_file(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if found == expected:
        return None
    return f"{path} is damaged: its {ALGORITHM} checksum is {found.digest}, and was {expected.digest} when it was saved"


def _names(directory: Path) -> Iterator[str]:
    for parent, _, files in os.walk(directory):
        for name in files:
            yield (Path(parent) / name).relative_to(directory).as_posix()


def _own(files: Mapping[str, FileSum]) -> str:
    return _hex(zlib.crc32(json.dumps(sorted((name, *entry) for name, entry in files.items())).encode()))


def _cure(directory: Path) -> str:
    survey = store.Survey(directory.parent)
    others = [
        iteration
        for iteration in survey.complete
        if iteration != store.iteration_of(directory) and survey.is_of_the_run(iteration, by_tracker=False)
    ]
    other = store.iteration_dir(directory.parent, others[-1]) if others else "another checkpoint"
    return f"load {other}, or this one as it is with --no-verify-checkpoint"


def _hex(crc: int) -> str:
    return f"{crc:08x}"
