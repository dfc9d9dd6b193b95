"""What one checkpoint directory is: complete, left by a killed save, or damaged. Standard library only.

A directory of protocol 2 holds a file ``unfinished`` from its first moment until its commit, and again while it is
being deleted. So one without that file and without a valid ``metadata.json`` was complete once and is damaged.
Checkpoints of earlier releases and of Megatron-LM lack the file in every state: there only the tracker, which moves
after the commit, tells that one was complete.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phd_megatron.config.plain import Json
from phd_megatron.errors import UserError
from phd_megatron.runtime.durable import read_small

METADATA, TRAINING_STATE, UNFINISHED = "metadata.json", "training_state.json", "unfinished"
#: the resolved configuration
RUN_CONFIG = "run_config.yaml"
PROTOCOL = 2
"""``training_state.json`` names it. From 2 on there is ``unfinished`` as told above, and always ``checksums.json``."""
ASIDE = ".replaced"
_TENSORS = ".metadata"
_ITERATION_NAME = re.compile(r"iter_(\d{7,})")
#: what a save writes before its commit
_WRITTEN = re.compile(
    r"run_config\.yaml|training_state\.json|tokenizer|common\.pt|.*\.distcp|\.metadata(\.tmp)?|checksums\.json|"
    r"unfinished|\.metadata\.json\.\d+\.tmp|\.nfs.*"
)

SAME_IN_ALL = f"{METADATA} is the same in every checkpoint of phd-megatron, so it can be copied from another one"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, found or read; the message names the file and the way out."""


@dataclass(frozen=True)
class Status:
    """What a directory is; ``reason`` says how a damaged one is known to be one."""

    kind: Literal["complete", "unfinished", "damaged", "absent"]
    reason: str = ""


def iteration_dir(root: str | os.PathLike[str], iteration: int) -> Path:
    """Directory of the checkpoint of one iteration: ``root/iter_0000100``."""
    return Path(root) / f"iter_{iteration:07d}"


def iteration_of(directory: str | os.PathLike[str]) -> int | None:
    """The iteration in a checkpoint directory's name, or None when it is not such a name."""
    match = _ITERATION_NAME.fullmatch(Path(directory).name.removesuffix(ASIDE))
    return int(match.group(1)) if match else None


def status(directory: str | os.PathLike[str], *, tracked: bool = False) -> Status:
    """What ``directory`` is.

    Args:
        tracked: the tracker names it, so its save was committed.
    """
    path = Path(directory)
    metadata = path / METADATA
    try:
        content = json.loads(read_small(metadata))
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_dir():
            return Status("absent")
        if (path / UNFINISHED).exists():
            return Status("unfinished")
        if os.path.lexists(metadata):
            return Status("damaged", f"{metadata} is a link to a file that is gone")
        if tracked or _protocol(path) >= PROTOCOL:
            return Status("damaged", f"{metadata} is missing")
        return Status("unfinished")
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        problem = f"is damaged ({str(error) or type(error).__name__})"
    else:
        if isinstance(content, dict) and isinstance(content.get("sharded_backend"), str):
            return Status("complete")
        problem = "is damaged (it does not name its sharded_backend)"
    if (path / UNFINISHED).exists():
        return Status("unfinished")
    return Status("damaged", f"{metadata} {problem}")


def is_complete(directory: str | os.PathLike[str]) -> bool:
    """Whether the save of this directory was committed: its ``metadata.json`` is there and whole."""
    return status(directory).kind == "complete"


def training_state(directory: str | os.PathLike[str]) -> Json:
    """The facts that were saved with a checkpoint; empty when they are not there or not readable."""
    try:
        content = json.loads(read_small(Path(directory) / TRAINING_STATE))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def own_config(directory: str | os.PathLike[str]) -> Path | None:
    """The configuration beside a checkpoint of ours. Megatron-Bridge's file of that name says ``_target_``."""
    path = Path(directory) / RUN_CONFIG
    try:
        text = read_small(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return path  # whoever reads it says what is wrong
    return None if re.search(r"^_target_:", text, re.MULTILINE) else path


def is_stock(directory: str | os.PathLike[str]) -> bool:
    """Whether a complete checkpoint has none of the files that ours have: Megatron-LM or Bridge wrote it."""
    return own_config(directory) is None and not os.path.lexists(Path(directory) / TRAINING_STATE)


def run_of(directory: str | os.PathLike[str]) -> str | None:
    """Id of the run that saved a checkpoint; None for those of earlier releases and of Megatron-LM."""
    found = training_state(directory).get("run")
    return found if isinstance(found, str) else None


def had_checksums(directory: str | os.PathLike[str]) -> bool:
    """Whether the checkpoint says itself that it was saved with ``checksums.json``."""
    return _protocol(Path(directory)) >= PROTOCOL


def is_left_over(directory: Path) -> bool:
    """Whether ``directory`` holds nothing but what a killed save left, so that it can be deleted without a loss."""
    if (directory / UNFINISHED).exists():
        return True
    # Of an earlier release, or of somebody else: with every rank's tensors it may be a checkpoint that lost a file.
    names = os.listdir(directory)
    return _TENSORS not in names and METADATA not in names and all(_WRITTEN.fullmatch(name) for name in names)


def looks_like_one(directory: Path) -> bool:
    """Whether a directory of any name holds a checkpoint's own files."""
    return os.path.lexists(directory / METADATA) or (directory / _TENSORS).exists()


def _protocol(directory: Path) -> int:
    found = training_state(directory).get("protocol")
    return found if isinstance(found, int) else 1
