"""The directory protocol of checkpoints: how one becomes complete, and what may be deleted.

::

    SAVE/latest_checkpointed_iteration.txt      the tracker: "100", replaced by an atomic rename after the commit
    SAVE/run.json                               whose directory this is (run_file.py)
    SAVE/iter_0000100/                          one checkpoint (Megatron's torch_dist layout)
    SAVE/iter_0000100/unfinished                there until the commit
    SAVE/iter_0000100/metadata.json             written last: its presence is the commit
    SAVE/iter_0000100.replaced/                 a complete checkpoint that is being saved anew; gone after the commit
    SAVE/iter_0000100.kept/                     a damaged one, or somebody's files, that a save found in its place

A process may be killed between any two system calls here and the last complete checkpoint stays loadable. What a
directory is tells `checkpoint_status.py`, which one is loaded `checkpoint_find.py`. Standard library only, so that
every tool can find a checkpoint without torch or Megatron.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from phd_megatron.checkpoint.find import (
    RELEASE,
    TRACKER,
    Survey,
    Warn,
    aside,
    complete_dir,
    complete_iterations,
    latest_complete,
    read_tracker,
    saved_iteration,
)
from phd_megatron.checkpoint.status import (
    METADATA,
    PROTOCOL,
    TRAINING_STATE,
    UNFINISHED,
    CheckpointError,
    had_checksums,
    is_complete,
    is_left_over,
    is_stock,
    iteration_dir,
    iteration_of,
    run_of,
    training_state,
)
from phd_megatron.console.terminal import say
from phd_megatron.runtime.durable import fsync_dir, fsync_tree, write_atomically

__all__ = [
    "METADATA",
    "PROTOCOL",
    "RELEASE",
    "TRACKER",
    "TRAINING_STATE",
    "UNFINISHED",
    "CheckpointError",
    "Survey",
    "Warn",
    "complete_dir",
    "complete_iterations",
    "had_checksums",
    "is_complete",
    "iteration_dir",
    "iteration_of",
    "latest_complete",
    "read_tracker",
    "run_of",
    "training_state",
    "write_atomically",
]


def write_tracker(root: str | os.PathLike[str], iteration: int) -> None:
    """Point the tracker at a complete checkpoint, by temporary file, fsync and rename."""
    write_atomically(Path(root) / TRACKER, f"{iteration}\n")


def prepare_iteration(root: str | os.PathLike[str], iteration: int, warn: Warn = say) -> Path:
    """Make the directory that a save of ``iteration`` writes into; it holds the mark of an unfinished one alone.

    What a killed save left there is deleted. A complete checkpoint of the same iteration is set aside until
    :func:`commit_iteration`, never deleted before. Anything else stays under another name, which ``warn`` tells.

    Raises:
        CheckpointError: there is something that is no directory.
    """
    path = iteration_dir(root, iteration)
    new = _new(path)
    _delete(new)
    new.mkdir(parents=True)
    (new / UNFINISHED).touch()
    if is_complete(path) and saved_iteration(path) in (None, iteration):
        remove_checkpoint(aside(path))
        os.rename(path, aside(path))
    elif path.is_dir() and not path.is_symlink() and is_left_over(path):
        remove_checkpoint(path)
    elif os.path.lexists(path):
        kept = keep(path)
        warn(
            f"warning: {path} is neither complete nor what a killed save leaves, so it is not deleted: it is {kept} now"
        )
    os.rename(new, path)
    fsync_dir(path)
    fsync_dir(path.parent)
    return path


def commit_iteration(root: str | os.PathLike[str], iteration: int, metadata: Mapping[str, str | int]) -> Path:
    """Declare a written checkpoint complete: metadata.json, then the tracker, then drop what it replaces.

    Args:
        metadata: content of ``metadata.json``, mcore's ``CheckpointingConfig`` fields.
    """
    path = iteration_dir(root, iteration)
    fsync_tree(path)
    write_atomically(path / METADATA, metadata_text(metadata))
    (path / UNFINISHED).unlink(missing_ok=True)
    fsync_dir(path)
    fsync_dir(path.parent)
    write_tracker(root, iteration)
    remove_checkpoint(aside(path))
    return path


def metadata_text(metadata: Mapping[str, str | int]) -> str:
    """What :func:`commit_iteration` writes into ``metadata.json``."""
    return json.dumps(dict(metadata))


def abandon_iteration(root: str | os.PathLike[str], iteration: int) -> None:
    """Undo :func:`prepare_iteration` after a failed save: the space comes back, a set-aside checkpoint too."""
    path = iteration_dir(root, iteration)
    _delete(_new(path))
    if (path / UNFINISHED).exists() and not is_complete(path):
        remove_checkpoint(path)
    if not path.exists() and is_complete(aside(path)):
        os.rename(aside(path), path)


def tidy(root: str | os.PathLike[str]) -> None:
    """Finish what a kill after a commit left undone, so that damage to the checkpoint would be seen as such."""
    for iteration in complete_iterations(root):
        path = iteration_dir(root, iteration)
        if is_complete(path):
            (path / UNFINISHED).unlink(missing_ok=True)


def prune(root: str | os.PathLike[str], keep_last: int, *, current: int) -> list[Path]:
    """Delete the oldest complete checkpoints after the commit of ``current``, keeping the newest ``keep_last``.

    Checkpoints of later iterations and of a branch that a rewind has left, unfinished and damaged ones, and those of
    Megatron-LM and Bridge are left alone.

    Returns:
        The deleted directories.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last = {keep_last}: at least the checkpoint just written stays; use 1 or more")
    survey = Survey(root)
    past = [
        i
        for i in survey.complete
        if i <= current and survey.is_of_the_run(i, by_tracker=False) and not is_stock(iteration_dir(root, i))
    ]
    deleted = []
    for iteration in past[:-keep_last]:
        path = iteration_dir(root, iteration)
        if not path.exists():
            continue
        remove_checkpoint(path)
        deleted.append(path)
    return deleted


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint directory so that a kill half-way leaves one that counts as unfinished.

    Of a link to a directory elsewhere the link alone is deleted.
    """
    if path.is_symlink():
        path.unlink()
        return
    if not path.exists():
        return
    with contextlib.suppress(OSError):  # a full disk: what follows is then told from damage by the order alone
        (path / UNFINISHED).touch()
    for name in (METADATA, TRAINING_STATE):
        (path / name).unlink(missing_ok=True)
        fsync_dir(path)
    for entry in path.iterdir():
        if entry.name != UNFINISHED:
            _delete(entry)
    _delete(path)
    # A network file system may hold ".nfs..." names of files that another process still reads.
    if path.exists() and any(not name.startswith(".nfs") for name in os.listdir(path)):
        raise CheckpointError(f"cannot delete {path}: check its permissions")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # the caller looks what is left
            path.unlink()


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def keep(path: Path) -> Path:
    """Move what is not ours out of the way; where it is then."""
    kept = _free_name(path)
    os.rename(path, kept)
    return kept


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.kept{number or ''}") for number in range(1000))
    return next(name for name in names if not os.path.lexists(name))
