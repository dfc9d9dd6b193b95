"""The MoE preset at tiny size: trained under expert parallelism with and without tensor parallelism, then exported."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import flags, read_metrics, run_program

LAYOUTS: dict[str, dict[str, object]] = {
    "EP2": {"expert-model-parallel-size": 2},
    "TP2+SP+EP2": {
        "tensor-model-parallel-size": 2,
        "sequence-parallel": True,
        "expert-model-parallel-size": 2,
        "expert-tensor-parallel-size": 1,
    },
}


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_moe_preset_trains_and_exports(
    layout: str, torchrun: Callable[..., subprocess.CompletedProcess[str]], documents: Path, tmp_path: Path
) -> None:
    options: dict[str, object] = {
        "preset": "tiny-moe",
        "seq-length": 32,
        "train-iters": 4,
        "eval-iters": 0,
        "log-interval": 1,
        "data-path": documents,
        "save": tmp_path / "checkpoints",
        "metrics-file": tmp_path / "metrics.jsonl",
        **LAYOUTS[layout],
    }
    torchrun(2, "-m", "phd_megatron", "pretrain", *flags(options))
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4]
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
    done = run_program("export", "--checkpoint", tmp_path / "checkpoints", "--output", tmp_path / "hf")
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "hf/config.json").is_file()
