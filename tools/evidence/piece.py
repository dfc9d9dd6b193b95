"""A piece of GPU time: what the environment says of it, and its folder on the machine.

A piece may be several commands one after the other on one machine: a run that is at work when a command ends saves and
goes on in the next one, as a sweep's members do. The folder holds everything until the piece is over; only the
finished runs' records leave the machine.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import shutil
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.errors import UserError
from phd_megatron.sweep.store import write

from .pack import open_parts, parts_of

ROOT = Path(__file__).resolve().parents[2]
_FILE = "piece.json"
RUNS, DONE, FAILED = OF_A_PIECE = ("runs", "done", "failed")  #: folders of the work folder
_STOP_SECONDS = 20.0  #: runs save, and the records are written
_LEAST_SECONDS = 30.0  #: with less left than this a piece is over


@dataclass(frozen=True)
class Piece:
    """Where, how long and how many.

    Attributes:
        name: date and time of the piece's beginning.
        queue: the queue's file.
        work: folder on the machine; it must outlive a command.
        out: where records are left for the checkout.
        archives: folder of packed texts.
        command_end: ``time.time()`` at which this command must be over.
        piece_end: the same of the last command on this machine.
        parallel: runs at once.
        flops: FLOPs a second of the whole GPU, before any have been measured.
        filled_by: so many runs fill the GPU, before it has been measured.
        start_seconds: of a run, beside its steps.
        only: a part of the names of experiments that may be run; empty for all.
        anchor: whether the piece begins with the anchor.
    """

    name: str
    queue: Path
    work: Path
    out: Path
    archives: Path
    command_end: float
    piece_end: float
    parallel: int
    flops: float
    filled_by: float
    start_seconds: float
    only: str
    anchor: bool

    @property
    def stop_at(self) -> float:
        """When running members are asked to save."""
        return self.command_end - _STOP_SECONDS

    def texts(self) -> dict[str, Path]:
        """Unpacked texts by name; archives that are not unpacked yet are."""
        home = self.work / "texts"
        home.mkdir(parents=True, exist_ok=True)
        for first in sorted(self.archives.glob("*.tar.xz*")) if self.archives.is_dir() else []:
            text, _, part = first.name.partition(".tar.xz")
            if part in ("", ".00") and not (home / text).exists():
                _unpack(self.archives, text, home)
        return {path.name: path for path in sorted(home.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def work_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Folder on the GPU machine that outlives a command."""
    return Path(environment.get("PHD_EVIDENCE_WORK", "/tmp/phd_evidence")).resolve()


def open_piece(environment: Mapping[str, str] = os.environ) -> Piece:
    """The piece that the environment describes, begun by an earlier command or now.

    Raises:
        UserError: for a value that is no number.
    """
    now = time.time()
    seconds = _number(environment, "SECONDS", 540)
    work = work_folder(environment)
    name, end = time.strftime("%Y-%m-%d-%H%M", time.gmtime(now)), now + _number(environment, "PIECE", seconds)
    previous = ""
    with contextlib.suppress(OSError, ValueError, KeyError):
        kept = json.loads((work / _FILE).read_text("utf-8"))
        previous = str(kept["name"])
        if kept["end"] > now + _LEAST_SECONDS:
            name, end = previous, float(kept["end"])
    if name != previous:
        for folder in OF_A_PIECE:  # its records have left the machine with its last command
            shutil.rmtree(work / folder, ignore_errors=True)
    write(work / _FILE, json.dumps({"name": name, "end": end}) + "\n")
    return Piece(
        name=name,
        queue=Path(environment.get("PHD_EVIDENCE_QUEUE", ROOT / "docs/results/trained/queue.yaml")),
        work=work,
        out=Path(environment.get("OUT", "runs/gpu")),
        archives=Path(environment.get("PHD_EVIDENCE_ARCHIVES", ROOT / ".corpus/ship")),
        command_end=now + seconds,
        piece_end=max(end, now + seconds),
        parallel=int(_number(environment, "PARALLEL", 5)),
        flops=_number(environment, "FLOPS", 2.5e14),
        filled_by=_number(environment, "FILLED_BY", 3),
        start_seconds=_number(environment, "START_SECONDS", 60),
        only=environment.get("PHD_EVIDENCE_ONLY", ""),
        anchor=environment.get("PHD_EVIDENCE_ANCHOR", "1") != "0",
    )


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(f"PHD_EVIDENCE_{name}", "")
    try:
        return float(text) if text else default
    except ValueError:
        raise UserError(f"PHD_EVIDENCE_{name}={text!r} is no number; leave it out for {default:g}") from None


def _unpack(archives: Path, text: str, home: Path) -> None:
    """Into a folder of its own first, so that half an archive is never taken for a text."""
    partial = home / f".{text}"
    try:
        with open_parts(archives, text) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(partial, filter="data")
    except (EOFError, lzma.LZMAError, tarfile.TarError) as error:
        parts = ", ".join(path.name for path in parts_of(archives, text))
        raise UserError(
            f"{parts} in {archives} are not a whole archive ({error}); bring all parts of it, made by one `pack`"
        ) from None
    os.replace(partial, home / text)
