"""Data, a tiny model, and the real program under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TINY_MODEL = {
    "num-layers": 4,
    "hidden-size": 32,
    "ffn-hidden-size": 48,
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "seq-length": 24,
    "make-vocab-size-divisible-by": 16,
}


def flags(values: dict[str, object]) -> list[str]:
    """``{"a": 1, "b": True}`` to ``["--a", "1", "--b"]``."""
    words: list[str] = []
    for name, value in values.items():
        items = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, items)]
    return words


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of byte-tokenised data made by the real ``prepare``."""
    directory = tmp_path_factory.mktemp("corpus")
    text = directory / "text.txt"
    text.write_text("\n".join(f"{i} times {i} is {i * i}; " + "lorem ipsum dolor " * (i % 5) for i in range(800)))
    prefix = directory / "data"
    command = [sys.executable, "-m", "phd_megatron", "prepare", "--input", text, "--output-prefix", prefix]
    subprocess.run([*map(str, command), "--tokenizer", "byte"], check=True, cwd=ROOT, capture_output=True, timeout=400)
    return prefix


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of byte-tokenised data of many documents, so that it can be split: 24 thousand tokens."""
    directory = tmp_path_factory.mktemp("documents")
    texts = (f"{i} times {i} is {i * i}; " + "lorem ipsum dolor " * (i % 5) for i in range(400))
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = directory / "data"
    done = run_program("prepare", "--input", directory / "text.jsonl", "--output-prefix", prefix)
    assert done.returncode == 0, done.stdout
    return prefix


def program_environment() -> dict[str, str]:
    """Variables of the real program as a world of one with one thread."""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    return {**variables, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def run_program(*args: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """``python -m phd_megatron args...`` as a process of its own; ``stdout`` holds both streams."""
    return subprocess.run(
        [sys.executable, "-m", "phd_megatron", *map(str, args)],
        cwd=ROOT,
        env=program_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a ``--metrics-file``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def run_cases(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """``run_cases(nproc, [argv, ...])``: every command in one launch of ``nproc`` processes. What they printed.

    ``python=`` names another interpreter than this one.
    """

    def run(nproc: int, cases: list[list[str]], timeout: float = 420, **launch: str) -> str:
        path = tmp_path_factory.mktemp("cases") / "cases.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        return torchrun(nproc, Path(__file__).parent / "run_cases.py", path, timeout=timeout, **launch).stdout

    return run
