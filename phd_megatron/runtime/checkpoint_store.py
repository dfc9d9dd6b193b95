"""The directory protocol of checkpoints: what is complete, which one is next to load, what may be deleted.

::

    SAVE/latest_checkpointed_iteration.txt      the tracker: "100", replaced by an atomic rename after the commit
    SAVE/iter_0000100/                          one checkpoint (Megatron's torch_dist layout)
    SAVE/iter_0000100/metadata.json             written last: its presence is the commit
    SAVE/iter_0000100.replaced/                 a complete checkpoint that is being saved anew; gone after the commit

A process may be killed between any two system calls here and the last complete checkpoint stays loadable. Standard
library only, so that every tool can find a checkpoint without torch or Megatron.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phd_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = "metadata.json"
_ITERATION_NAME = re.compile(r"iter_(\d{7,})")
_ASIDE = ".replaced"

Warn = Callable[[str], None]


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found or read; the message names the file and the way out."""


def iteration_dir(root: str | os.PathLike[str], iteration: int) -> Path:
    """Directory of the checkpoint of one iteration: ``root/iter_0000100``."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(directory: str | os.PathLike[str]) -> int | None:
    """The iteration in a checkpoint directory's name, or None when it is not such a name."""
    match = _ITERATION_NAME.fullmatch(Path(directory).name.removesuffix(_ASIDE))
    return int(match.group(1)) if match else None


def is_complete(directory: str | os.PathLike[str]) -> bool:
    """Whether the save of this directory was committed: its ``metadata.json`` is there and whole."""
    try:
        content = json.loads((Path(directory) / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "sharded_backend" in content


def complete_iterations(root: str | os.PathLike[str]) -> list[int]:
    """Iterations with a complete checkpoint under ``root``, ascending; empty when there is no such directory."""
    return sorted({iteration for iteration, path in _candidates(Path(root)) if is_complete(path)})


def complete_dir(root: str | os.PathLike[str], iteration: int) -> Path | None:
    """The complete checkpoint of one iteration, else None.

    While an iteration is saved anew its old checkpoint lies set aside; after a kill at that moment it is the answer.
    """
    path = iteration_dir(root, iteration)
    for candidate in (path, _aside(path)):
        if is_complete(candidate):
            return candidate
    return None


def read_tracker(root: str | os.PathLike[str]) -> str | None:
    """Stripped text of the tracker file, or None when there is none."""
    try:
        return (Path(root) / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_tracker(root: str | os.PathLike[str], iteration: int) -> None:
    """Point the tracker at a complete checkpoint, by temporary file, fsync and rename."""
    write_atomically(Path(root) / TRACKER, f"{iteration}\n")


def latest_complete(load_dir: str | os.PathLike[str], warn: Warn = print) -> Path | None:
    """The checkpoint to load from ``load_dir``: a root directory, or one iteration's directory.

    The tracker decides, so that a user can roll back by editing it. When it points at something missing or
    incomplete, the newest complete checkpoint is taken and ``warn`` says so.

    Returns:
        The checkpoint's directory, or None when ``load_dir`` is missing or holds no complete checkpoint.

    Raises:
        CheckpointError: ``load_dir`` is itself an iteration's directory and its save was not finished, or it is a file.
    """
    root = Path(load_dir)
    if root.exists() and not root.is_dir():
        raise CheckpointError(
            f"{root} is a file; give the directory that was saved into, or one iter_... directory of it"
        )
    if is_complete(root):
        return root
    own_iteration = iteration_of(root)
    if own_iteration is not None:
        if is_complete(_aside(root)):
            return _aside(root)
        if root.is_dir():
            raise CheckpointError(_incomplete_message(root))
    tracked = read_tracker(root)
    complete = complete_iterations(root)
    if tracked is not None:
        if tracked == "release" and is_complete(root / "release"):
            return root / "release"
        if tracked.isdecimal() and (found := complete_dir(root, int(tracked))) is not None:
            return found
        problem = (
            f"{iteration_dir(root, int(tracked)).name} is missing or its save was not finished"
            if tracked.isdecimal()
            else "that is not an iteration"
        )
        rest = f"; taking the newest complete checkpoint, iteration {complete[-1]}" if complete else ""
        warn(f"warning: {root / TRACKER} says {tracked!r}, but {problem}{rest}")
    elif complete:
        warn(f"warning: {root} has no {TRACKER}; taking the newest complete checkpoint, iteration {complete[-1]}")
    return complete_dir(root, complete[-1]) if complete else None


def prepare_iteration(root: str | os.PathLike[str], iteration: int) -> Path:
    """Make the empty directory that a save of ``iteration`` writes into.

    What a killed save left there is deleted. A complete checkpoint of the same iteration is set aside until
    :func:`commit_iteration`, never deleted before.
    """
    path = iteration_dir(root, iteration)
    if is_complete(path):
        remove_checkpoint(_aside(path))
        os.rename(path, _aside(path))
    elif path.exists():
        remove_checkpoint(path)
    path.mkdir(parents=True)
    _fsync_dir(path.parent)
    return path


def commit_iteration(root: str | os.PathLike[str], iteration: int, metadata: dict[str, Any]) -> Path:
    """Declare a written checkpoint complete: metadata.json, then the tracker, then drop what it replaces.

    Args:
        metadata: content of ``metadata.json``, mcore's ``CheckpointingConfig`` fields.
    """
    path = iteration_dir(root, iteration)
    fsync_tree(path)
    write_atomically(path / METADATA, metadata_text(metadata))
    _fsync_dir(path.parent)
    write_tracker(root, iteration)
    remove_checkpoint(_aside(path))
    return path


def metadata_text(metadata: dict[str, Any]) -> str:
    """What :func:`commit_iteration` writes into ``metadata.json``."""
    return json.dumps(metadata)


def abandon_iteration(root: str | os.PathLike[str], iteration: int) -> None:
    """Undo :func:`prepare_iteration` after a failed save: the space comes back, a set-aside checkpoint too."""
    path = iteration_dir(root, iteration)
    if path.exists() and not is_complete(path):
        remove_checkpoint(path)
    if not path.exists() and is_complete(_aside(path)):
        os.rename(_aside(path), path)


def prune(root: str | os.PathLike[str], keep_last: int, *, current: int, protect: tuple[Path, ...] = ()) -> list[Path]:
    """Delete the oldest complete checkpoints after the commit of ``current``, keeping the newest ``keep_last``.

    Checkpoints of later iterations (from before a roll-back), unfinished ones and those in ``protect`` are left alone.

    Returns:
        The deleted directories.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last = {keep_last}: at least the checkpoint just written stays; use 1 or more")
    protected = {path.resolve() for path in protect}
    past = [iteration for iteration in complete_iterations(root) if iteration <= current]
    deleted = []
    for iteration in past[:-keep_last]:
        path = iteration_dir(root, iteration)
        if path.resolve() in protected or not path.exists():
            continue
        remove_checkpoint(path)
        deleted.append(path)
    return deleted


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint directory so that a kill half-way leaves one that counts as incomplete."""
    if not path.exists():
        return
    (path / METADATA).unlink(missing_ok=True)
    _fsync_dir(path)
    # A network file system may hold ".nfs..." names of files that another process still reads.
    shutil.rmtree(path, ignore_errors=True)
    if path.exists() and any(not name.startswith(".nfs") for name in os.listdir(path)):
        raise CheckpointError(f"cannot delete {path}: check its permissions")


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
    _fsync_dir(path.parent)


def fsync_tree(directory: Path) -> None:
    """Bring every file under ``directory``, and the names themselves, to stable storage."""
    for parent, _, files in os.walk(directory):
        for name in files:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _fsync_dir(Path(parent))


def _fsync_dir(directory: Path) -> None:
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


def _aside(path: Path) -> Path:
    return path.with_name(path.name + _ASIDE)


def _candidates(root: Path) -> Iterator[tuple[int, Path]]:
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        iteration = iteration_of(name)
        if iteration is not None:
            yield iteration, root / name


def _incomplete_message(path: Path) -> str:
    others = complete_iterations(path.parent)
    cure = (
        f"load {iteration_dir(path.parent, others[-1])}, the newest complete one"
        if others
        else "there is no complete checkpoint beside it"
    )
    return f"{path} is not a complete checkpoint (no valid {METADATA}: its save was interrupted); {cure}"
