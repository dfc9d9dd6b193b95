"""What a program asks of the disk, in order: which file is behind an ``os.fsync``, what is renamed and deleted.

A file that is there and read back proves nothing about a power cut; the order of these calls does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """``what`` is fsync, replace, unlink, or a word of the test's own.

    Attributes:
        path: the file or directory; of a replace the new name.
        source: of a replace the old name.
        state: of a file its size and time of change, of a directory its names, of a replace every file and directory
            below ``root`` at that moment.
    """

    what: str
    path: Path
    source: Path | None = None
    state: Any = None


class Disk:
    """The events below ``root``, in order; ``note`` adds one of the test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []

    def note(self, what: str) -> None:
        self.events.append(Event(what, self.root))

    def index(self, what: str, path: Path, start: int = 0) -> int:
        """Place of the first such event from ``start`` on."""
        for number in range(start, len(self.events)):
            if (self.events[number].what, self.events[number].path) == (what, path):
                return number
        raise AssertionError(f"there is no {what} of {path} after event {start}")

    def synced(self, path: Path, state: Any, first: int, last: int) -> bool:
        """Whether a file of that size and time, or a directory with those names, was synced between two events."""
        return Event("fsync", path, None, state) in self.events[first:last]


def state_of(path: Path) -> Any:
    """Of a directory its names, of a file its size and time of change."""
    if path.is_dir():
        return tuple(sorted(os.listdir(path)))
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def everything(root: Path) -> dict[Path, Any]:
    """State of every file and directory below ``root``, itself too."""
    return {path: state_of(path) for path in (root, *root.rglob("*"))}


@contextmanager
def watching(root: Path, monkeypatch: Any) -> Iterator[Disk]:
    """Everything is done as it would be; what lies below ``root`` is written down."""
    disk = Disk(root)
    fsync, replace, rename, unlink = os.fsync, os.replace, os.rename, os.unlink

    def add(what: str, path: Any, source: Path | None = None, state: Any = None) -> None:
        path = Path(path)
        if path == root or root in path.parents:
            disk.events.append(Event(what, path, source, state))

    def watched_fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        state = state_of(path)
        fsync(file)
        add("fsync", path, None, state)

    def watched_move(move: Any) -> Any:
        def run(source: Any, target: Any, **options: Any) -> None:
            state = everything(root) if root.exists() else {}
            move(source, target, **options)
            add("replace", target, Path(source), state)

        return run

    def watched_unlink(path: Any, **options: Any) -> None:
        unlink(path, **options)
        folder = Path(os.readlink(f"/proc/self/fd/{options['dir_fd']}")) if options.get("dir_fd") else Path()
        add("unlink", folder / path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        patch.setattr(os, "replace", watched_move(replace))
        patch.setattr(os, "rename", watched_move(rename))
        patch.setattr(os, "unlink", watched_unlink)
        yield disk
