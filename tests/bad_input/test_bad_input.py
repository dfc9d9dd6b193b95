"""Every kind of bad input ends in one message with value, reason and cure: the table is in the files ``rows_*.py``.

A row calls the program in this process, where an exception that is no refusal shows its traceback; some are programs of
their own. Nothing may be written: not in the working directory, not beside what was named.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phd_megatron.cli.main import main

from .rows import Row
from .rows_commands import COMMANDS
from .rows_config import CONFIGS
from .rows_data import DATA_SETS, KINDS
from .rows_fields import FIELDS
from .rows_files import FILES

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # of the processor's time, which no other program takes from it
ROWS = [*CONFIGS, *FIELDS, *FILES, *KINDS, *DATA_SETS, *COMMANDS]


def tree(*roots: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, length and time of change of everything below; of a directory the kind alone."""
    found = {}
    for root in roots:
        for directory, subdirectories, names in os.walk(root):
            for name in (*subdirectories, *names):
                state = os.lstat(os.path.join(directory, name))
                is_directory = name in subdirectories
                found[os.path.join(directory, name)] = (
                    state.st_mode,
                    0 if is_directory else state.st_size,
                    0 if is_directory else state.st_mtime_ns,
                )
    return found


def parameters() -> list[object]:
    return [pytest.param(row, id=row.title) for row in ROWS]


def test_there_are_many_and_each_has_its_own_name() -> None:
    titles = [row.title for row in ROWS]
    assert len(titles) >= 150
    assert len(set(titles)) == len(titles), {title for title in titles if titles.count(title) > 1}
    assert all(len(row.said) >= 2 for row in ROWS), "value and cure at least"


@pytest.mark.timeout(90, func_only=True)  # a pipe would be waited for without end
@pytest.mark.parametrize("row", parameters())
def test_refused(
    row: Row,
    kit: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    row.make_files(here)
    before = tree(here, kit["data"].parent)
    argv = row.argv(kit)
    if row.process:
        code, out, err, seconds = as_program(argv)
    else:
        began = time.process_time()
        code = ended(argv)
        seconds = time.process_time() - began
        out, err = capfd.readouterr()
    assert code == 2, f"{code}\n{out}\n{err}"
    assert err.startswith("error: ") and err.count("error: ") == 1, err
    assert "Traceback" not in out + err
    assert len(err) < 10_000, f"{len(err)} characters"
    for word in row.said:
        assert word in err, f"{word!r} is not in: {err}"
    assert seconds < SECONDS
    assert tree(here, kit["data"].parent) == before


def test_a_refusal_of_a_checkpoint_leaves_no_connections(
    kit: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model was built then, and holds process groups; the process that calls the program may go on."""
    row = next(row for row in FILES if row.title.startswith("pretrain RUN --load @stock --finetune --norm-scheme"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    row.make_files(here)
    left = []
    for _ in range(3):
        assert ended(row.argv(kit)) == 2
        left.append(len(os.listdir("/dev/fd")))
    assert left[0] == left[1] == left[2]


def ended(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def as_program(argv: list[str]) -> tuple[int, str, str, float]:
    """The same through the interpreter; the time is the processor's, since importing torch waits for a busy disk."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "phd_megatron", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds
