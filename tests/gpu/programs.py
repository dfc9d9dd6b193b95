"""The real program as a process of its own on a GPU, and what it said: shared by the tests that train whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    """What a process printed, and the numbers of its steps."""

    code: int
    text: str
    steps: tuple[dict, ...]

    def series(self, name: str) -> list[float]:
        return [step[name] for step in self.steps if step.get(name) is not None]


def program(*words: str, metrics: Path | None = None, ranks: int = 1) -> Done:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    report = ["--metrics-file", str(metrics)] if metrics else []
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, "-m", "phd_megatron", *words, *report],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    lines = metrics.read_text().splitlines() if metrics and metrics.exists() else []
    return Done(done.returncode, done.stdout, tuple(map(json.loads, lines)))


def succeeded(done: Done) -> Done:
    assert done.code == 0, done.text[-6000:]
    return done


def documentation_as_bytes(directory: Path) -> Path:
    """Prefix of this package's own documentation, prepared as bytes in ``directory``."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        (directory / f"{page.stem}.txt").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    succeeded(program("prepare", "--input", str(directory), "--output-prefix", str(directory / "data")))
    return directory / "data"


def worst(found: list[float], expected: list[float], count: int) -> float:
    """Largest relative difference of two series of ``count`` numbers."""
    assert len(found) == len(expected) == count
    return max(abs(one - two) / abs(two) for one, two in zip(found, expected, strict=True))
