"""A sample of what ``python tests/faults`` draws: eight kills, a damaged file and a full disk in two layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="audit of another process and /proc are Linux's"),
]


def test_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--kills", "8", "--others", "2", "--jobs", "2", "--seed", "214"]
    chosen = ["--layouts", "1 rank, K=2", "DP2, async save", "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [*command, *chosen, "--out", str(tmp_path / "out.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["lost"] == report["failed"] == 0
    tried = [outcome for outcome in report["outcomes"] if outcome["fault"]["moment"] != "-"]
    assert len(tried) == 10
    assert any(outcome["resumed_from"] for outcome in tried), "a start went on from a checkpoint"


def test_the_same_seed_draws_the_same_faults() -> None:
    code = (
        f"import json, sys; sys.path.insert(0, {str(PROGRAM)!r}); from plan import plan; from layouts import LAYOUTS\n"
        "every = [*LAYOUTS.values()]; drawn = [plan(seed, 200, 40, every, 8) for seed in (1, 1, 2)]\n"
        "faults = [fault for _, chain in drawn[0] for fault in chain]\n"
        "kills, background = (sum(row) for row in (\n"
        "    [fault.is_kill for fault in faults], [layout.background for layout, _ in drawn[0]]))\n"
        "same = [drawn[0] == drawn[1], drawn[0] == drawn[2]]\n"
        "print(json.dumps([same, kills, len(faults), len(drawn[0]), background]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[True, False], 200, 240, 8, 2]
