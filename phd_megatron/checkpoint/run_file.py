"""``SAVE/run.json``: whose directory this is. Standard library only.

::

    {"run": "32 hex digits", "began": 100, "start": "32 hex digits", "origin": ["/A/iter_0000100", false, true]}

Every checkpoint carries the ``run`` that saved it. A run that goes back to an older checkpoint of its own directory
gets a new id and ``began``: the checkpoints after that iteration that carry another id are the ones it left. ``start``
is of one start of the program, and ``origin`` says how the run began: :func:`origin_of`.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from phd_megatron.runtime.durable import read_small, write_atomically

RUN_FILE = "run.json"


def new_id() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex


def origin_of(load: str | os.PathLike[str] | None, finetune: bool, rewind: bool) -> list[str | bool] | None:
    """What a start was told to begin with: the same command again is a restart of the run that it began."""
    return None if load is None else [os.path.realpath(load), finetune, rewind]


@dataclass(frozen=True)
class RunFile:
    """Content of ``run.json``."""

    run: str
    began: int = 0
    start: str = field(default_factory=new_id)
    origin: list[str | bool] | None = None


def read_run(root: str | os.PathLike[str]) -> RunFile | None:
    """The run that saves into ``root``; None when it is not known (nothing saved there, or an earlier release did)."""
    try:
        content = json.loads(read_small(Path(root) / RUN_FILE))
        run, began, start = content["run"], content["began"], content["start"]
        origin = content.get("origin")
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    if isinstance(run, str) and isinstance(began, int) and isinstance(start, str):
        return RunFile(run, began, start, origin if isinstance(origin, list) else None)
    return None


def is_foreign(root: str | os.PathLike[str]) -> bool:
    """Whether a ``run.json`` is there that is not a run's, be it damaged: something that is not to be replaced."""
    path = Path(root) / RUN_FILE
    return os.path.lexists(path) and read_run(root) is None and not (path.is_file() and not path.stat().st_size)


def write_run(root: str | os.PathLike[str], content: RunFile) -> None:
    """Make ``root`` the directory of a run.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(Path(root) / RUN_FILE, json.dumps(asdict(content)) + "\n")
