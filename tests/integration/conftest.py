"""Data, a tiny model, and the real program under torchrun."""

from __future__ import annotations

import json
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
        words += [f"--{name}"] if value is True else [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of byte-tokenised data made by the real ``prepare``."""
    directory = tmp_path_factory.mktemp("corpus")
    text = directory / "text.txt"
    text.write_text("\n".join(f"{i} times {i} is {i * i}; " + "lorem ipsum dolor " * (i % 5) for i in range(800)))
    prefix = directory / "data"
    command = [sys.executable, "-m", "phd_megatron", "prepare", "--input", text, "--output-prefix", prefix]
    subprocess.run([*map(str, command), "--tokenizer", "byte"], check=True, cwd=ROOT, capture_output=True, timeout=120)
    return prefix


@pytest.fixture(scope="session")
def run_cases(torchrun: Callable[..., object], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """``run_cases(nproc, [argv, ...])``: every command in one launch of ``nproc`` processes."""

    def run(nproc: int, cases: list[list[str]], timeout: float = 420) -> None:
        path = tmp_path_factory.mktemp("cases") / "cases.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        torchrun(nproc, Path(__file__).parent / "run_cases.py", path, timeout=timeout)

    return run
