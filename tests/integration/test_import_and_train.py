"""A Llama that transformers wrote is imported as a PHD model, and goes on in training alike under two layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(400)
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "tp2": (2, {"tensor-model-parallel-size": 2, "sequence-parallel": True}),
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
}


@pytest.mark.parametrize(
    "changes", [["--phd-repeat", "2", "--phd-window", "5", "--phd-chunk", "8"], ["--upcycle-experts", "4"]]
)
def test_training_goes_on(documents: Path, run_cases: Any, tmp_path: Path, changes: list[str]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.1, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    done = run_program("import", "--hf-dir", tmp_path / "llama", "--output", tmp_path / "start", *changes)
    assert done.returncode == 0 and "verified" in done.stdout, done.stdout
    cases: dict[int, list[list[str]]] = {1: [], 2: []}
    for name, (ranks, options) in LAYOUTS.items():
        run: dict[str, object] = {
            **{"load": tmp_path / "start", "finetune": True, "data-path": documents, "device": "cpu", "lr": 1e-3},
            **{"micro-batch-size": 2, "global-batch-size": 4, "train-iters": 2, "eval-iters": 0, "log-interval": 1},
            "metrics-file": tmp_path / f"{name}.jsonl",
        }
        cases[ranks].append(["pretrain", *flags({**run, **options})])
    for ranks, words in cases.items():
        run_cases(ranks, words)
    expected = read_metrics(tmp_path / "single.jsonl")
    assert len(expected) == 2 and expected[0]["lm_loss"] < 7
    for name in ("tp2", "pp2"):
        for one, two in zip(expected, read_metrics(tmp_path / f"{name}.jsonl"), strict=True):
            assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-5)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
