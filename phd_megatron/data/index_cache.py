"""The files of an index: three arrays, and the checksums of what was written into them.

``BASE-{document,sample,shuffle}.npy`` appear by rename, and ``BASE-sums.json`` after them::

    {"algorithm": "crc32", "arrays": {"document": ["<i4", [3000], "8 hex digits"], ...}}

Type and shape are compared whenever the files are opened. The numbers are compared once for each start and node, before
the first step: by a process that is alone as it opens them, of several by the first of a node
(`training/streams.py`), since an index may have ten gigabytes and need not be read by every rank. What is damaged
after that is not noticed. Files without checksums, of releases before, are built again.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from phd_megatron.data.open_file import FileArray, open_npy
from phd_megatron.errors import UserError
from phd_megatron.runtime.durable import read_small, write_atomically

logger = logging.getLogger(__name__)
_PARTS = ("document", "sample", "shuffle")
_ALGORITHM = "crc32"  # runs at a gigabyte a second, with the interpreter's lock released

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
Files = tuple[FileArray, FileArray, FileArray]


def is_alone() -> bool:
    """Whether no other rank works on this run, so that all checks are this process's own."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def load_index(base: Path, *, read_all: bool) -> Files | None:
    """The three arrays, in their files; None when one is missing or not what was written there.

    Args:
        read_all: compare the numbers, too.
    """
    try:
        text = read_small(_sums(base))
        opened = [open_npy(_file(base, part)) for part in _PARTS]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError, UserError) as error:
        logger.warning("index cache files %s-* are damaged (%s); they are built again", base, error)
        return None
    document, sample, shuffle = files = tuple(opened)
    try:
        known = json.loads(text)
        said = [known["arrays"][part][:2] for part in _PARTS] if known["algorithm"] == _ALGORITHM else None
    except (ValueError, RecursionError, KeyError, TypeError):
        said = None
    if said != [[array.dtype.str, [*array.shape]] for array in files]:
        logger.warning("index cache files %s-* do not belong together; they are built again", base)
        return None
    found = document, sample, shuffle
    return found if not read_all or is_as_written(base, found) else None


def is_as_written(base: Path, files: Files) -> bool:
    """Whether the numbers of an index have their checksums; reads all of it, and says which file is damaged."""
    try:
        arrays = json.loads(read_small(_sums(base)))["arrays"]
        wanted = [arrays[part][2] for part in _PARTS]
        with ThreadPoolExecutor(len(_PARTS)) as pool:
            found = [*pool.map(_sum, files)]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, UserError) as error:
        logger.warning("index cache files %s-* cannot be compared with their checksums (%s)", base, error)
        return False
    for part, one, other in zip(_PARTS, wanted, found, strict=True):
        if one != other:
            logger.warning("index cache file %s is damaged (its checksum); it is built again", _file(base, part))
    return wanted == found


def forget_index(base: Path) -> None:
    """Let the files be built again. Without their checksums they are none."""
    _sums(base).unlink(missing_ok=True)


def save_index(base: Path, arrays: Arrays) -> None:
    """Write an index.

    Raises:
        OSError: it cannot be written.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    entries = {}
    for part, array in zip(_PARTS, map(np.ascontiguousarray, arrays), strict=True):
        # Its own name per process: ranks and runs that build the same index at once write the same bytes.
        temporary = base.parent / f".building-{uuid.uuid4().hex}.npy"
        try:
            with open(temporary, "xb") as stream:
                np.save(stream, array, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, _file(base, part))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        entries[part] = [array.dtype.str, [*array.shape], f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"]
    write_atomically(_sums(base), json.dumps({"algorithm": _ALGORITHM, "arrays": entries}) + "\n")


def _sum(array: FileArray) -> str:
    crc = 0
    for rows in array.chunks():
        crc = zlib.crc32(rows.reshape(-1).view(np.uint8).data, crc)
    return f"{crc:08x}"


def _file(base: Path, part: str) -> Path:
    return Path(f"{base}-{part}.npy")


def _sums(base: Path) -> Path:
    return Path(f"{base}-sums.json")
