"""Small files that are read without trusting them and written so that a crash leaves the old or the new content.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

SMALL = 1 << 20
"""No file of a few facts is longer, in bytes."""


def read_small(path: str | os.PathLike[str], limit: int = SMALL) -> str:
    """Text of a regular file of at most ``limit`` bytes. A pipe or a device is not waited for.

    Raises:
        OSError: it is not there, cannot be read, or is no regular file.
        ValueError: it is too long for what it should be, or no UTF-8.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is longer than {limit} bytes")
    return content.decode("utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that readers see the old or the new content, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def fsync_tree(directory: Path) -> None:
    """Bring every file under ``directory``, and the names themselves, to stable storage."""
    for parent, _, files in os.walk(directory):
        for name in files:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_dir(Path(parent))


def fsync_dir(directory: Path) -> None:
    """Bring the names in ``directory`` to stable storage where the file system can do that."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse to sync a directory; the rename is still ordered on the server
    finally:
        os.close(descriptor)
