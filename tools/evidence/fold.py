"""Put the records that a piece left into the checkout: one file an experiment, with the commit that made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phd_megatron.errors import UserError
from phd_megatron.sweep.store import write

from .record import dump
from .source import find_commit

ANCHOR_SECTION = "anchor"


def fold(file: Path, runs: Path, root: Path) -> Iterator[str]:
    """Write the records of ``evidence.json`` into ``runs``; a line for each. Those that are there already stay.

    An anchor's file is named after its piece, since every piece has one.

    Raises:
        UserError: when the file is none.
    """
    try:
        records = json.loads(file.read_text("utf-8"))["records"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no {file.name} of a piece ({error!r})") from None
    commits: dict[str, str | None] = {}
    for record in records:
        key = json.dumps(record["sources"], sort_keys=True)
        if key not in commits:
            commits[key] = find_commit(root, record["sources"])
        record = {"name": record["name"], "commit": commits[key], **record}
        path = runs / f"{file_name(record)}.json"
        text = dump(record)
        if path.exists():
            there = json.loads(path.read_text("utf-8"))
            if there["piece"] != record["piece"]:  # others continue it, so it was trained once more
                yield f"{path.name}: kept as of piece {there['piece']}; that of {record['piece']} is left out"
                continue
            if there["commit"] is not None and record["commit"] is None:
                yield f"{path.name}: there already"
                continue
        write(path, text)
        unknown = "" if record["commit"] else "; its sources are no commit of this checkout yet: commit, and fold again"
        yield f"{path.name}: {record['state']}{unknown}"


def file_name(record: dict[str, Any]) -> str:
    """Stem of a record's file."""
    name = str(record["name"])
    return f"{name}-{record['piece']}" if record["section"] == ANCHOR_SECTION else name
