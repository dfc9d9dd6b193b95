"""What lies in a save directory, judged without the program's own code; and what can be done to it."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

DISK = 24 * 2**20  # bytes of the small file system
FILE_LIMIT = 200_000  # bytes; stands in for a full disk where none can be mounted


def complete(save: Path) -> list[int]:
    """Iterations whose ``metadata.json`` is whole, ascending. Those that are set aside count."""
    found = set()
    for path in save.glob("iter_*"):
        name = re.fullmatch(r"iter_(\d{7})(\.replaced)?", path.name)
        try:
            if name and "sharded_backend" in json.loads((path / "metadata.json").read_text()):
                found.add(int(name.group(1)))
        except (OSError, ValueError):
            continue
    return sorted(found)


def checkpoint(save: Path, iteration: int) -> Path:
    """Where the complete checkpoint of an iteration lies."""
    path = save / f"iter_{iteration:07d}"
    return path if (path / "metadata.json").exists() else path.with_name(f"{path.name}.replaced")


def damage_in(path: Path) -> list[str]:
    """Files of a checkpoint that are not what ``checksums.json`` says."""
    entries = json.loads((path / "checksums.json").read_text())["files"]
    wrong = []
    for name, (size, digest) in entries.items():
        content = (path / name).read_bytes() if (path / name).exists() else None
        if content is None or len(content) != size or f"{zlib.crc32(content):08x}" != digest:
            wrong.append(name)
    return wrong


def contents(save: Path) -> dict[str, int]:
    """Name -> checksum of every file of the checkpoints and beside them."""
    names = [path for place in (".", "iter_*/**") for path in save.glob(f"{place}/*") if path.is_file()]
    # Which start saves there is written when a start claims the directory, before it looks into checkpoints.
    names = [path for path in names if not path.name.startswith((".lock", "run.json"))]
    return {str(path.relative_to(save)): zlib.crc32(path.read_bytes()) for path in names}


def damage(path: Path, choice: float) -> tuple[str, Callable[[], None]]:
    """Damage one file of a checkpoint.

    Returns:
        What was done to which file, and how to undo it.
    """
    generator = random.Random(choice)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    victim = generator.choice(files)
    before = victim.read_bytes()
    kind = generator.choice(["one bit", "cut", "emptied", "removed"] if before else ["removed"])
    if kind == "one bit":
        place = generator.randrange(len(before))
        victim.write_bytes(before[:place] + bytes([before[place] ^ 1 << generator.randrange(8)]) + before[place + 1 :])
    elif kind == "removed":
        victim.unlink()
    else:
        victim.write_bytes(b"" if kind == "emptied" else before[: generator.randrange(len(before))])

    def undo() -> None:
        victim.write_bytes(before)

    return f"{victim.relative_to(path)}: {kind}", undo


#: disks to be unmounted, for whoever ends the harness early
MOUNTED: set[Disk] = set()


class Disk:
    """A small file system of its own, where one can be mounted; else just a directory."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.path = path
        self.mounted = os.geteuid() == 0 and _succeeds("mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", path)
        self._ballast = path / "ballast"
        MOUNTED.add(self)

    def fill(self, processes: list[int], leave: int) -> None:
        """No more space than ``leave`` bytes. Without a file system of its own: no large files of these processes."""
        if not self.mounted:
            for process in processes:
                resource.prlimit(process, resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
            return
        with self._ballast.open("wb") as stream:
            while True:
                free = os.statvfs(self.path)
                try:
                    os.posix_fallocate(stream.fileno(), 0, max(free.f_bavail * free.f_frsize - leave, 1))
                    return
                except OSError:  # the run has written meanwhile
                    continue

    def empty(self) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        MOUNTED.discard(self)
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=False)


def make_read_only(save: Path) -> Callable[[], None] | None:
    """Refuse every write below ``save``; how to undo it, or None when that cannot be had here."""
    if os.geteuid() != 0:
        save.chmod(0o555)
        return lambda: save.chmod(0o755)
    if not _succeeds("mount", "--bind", save, save):
        return None
    if not _succeeds("mount", "-o", "remount,bind,ro", save):
        subprocess.run(["umount", "-l", str(save)], check=False)
        return None

    def undo() -> None:
        subprocess.run(["umount", "-l", str(save)], check=True)

    return undo


def _succeeds(*command: object) -> bool:
    if shutil.which(str(command[0])) is None:
        return False
    return subprocess.run([str(word) for word in command], capture_output=True).returncode == 0
