"""Directories that vanish, whenever a signal comes."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_directory(purpose: str) -> Iterator[Path]:
    """A new directory of this user alone in the place for temporary files, named for its ``purpose``.

    The standard library's own is left behind by an exception that a signal's handler raises while it is being made or
    deleted.

    Raises:
        OSError: it cannot be made.
    """
    # A name that nobody else has: it may be deleted before it is known whether it was made.
    place = Path(tempfile.gettempdir()) / f"phd-megatron-{purpose}-{secrets.token_hex(8)}"
    try:
        place.mkdir(mode=0o700)
        yield place
    finally:
        _delete(place)


def _delete(place: Path) -> None:
    try:
        _delete_once(place)
    except BaseException:
        _delete_once(place)
        raise


def _delete_once(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    if place.exists():  # what was copied from a read-only installation is read-only too
        for folder, _, _ in os.walk(place):
            os.chmod(folder, 0o700)
        shutil.rmtree(place, ignore_errors=True)
