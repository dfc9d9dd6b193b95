"""lm-evaluation-harness runs on exports, at any batch size alike; skipped where it is not installed (extra `eval`)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from phd_megatron.huggingface.export import export_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "examples" / "lm_eval"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install -e '.[eval]'")
@pytest.mark.timeout(600)
def test_offline_task_at_two_batch_sizes(make_checkpoint, tmp_path):
    source = make_checkpoint(norm_scheme="hybrid_star", phd_repeat=2, phd_window=16, phd_chunk=32, seq_length=256)
    export_checkpoint(source, tmp_path / "hf", verify="tensors")
    scores = []
    for size in (1, 8):
        subprocess.run(
            [
                *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", str(TASKS)),
                *("--model_args", f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32"),
                *("--tasks", "copy_word", "--batch_size", str(size), "--device", "cpu", "--log_samples"),
                *("--output_path", str(tmp_path / f"batch{size}")),
            ],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=280,
        )
        (path,) = (tmp_path / f"batch{size}").glob("*/samples_copy_word_*.jsonl")
        rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
        scores.append(torch.tensor([[float(score) for score, _ in row["filtered_resps"]] for row in rows]))
    assert scores[0].shape == (48, 4)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-4)


def test_task_files_name_their_data_and_the_papers_tasks():
    task = yaml.safe_load((TASKS / "copy_word.yaml").read_text())
    rows = [json.loads(line) for line in (ROOT / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert len(rows) == 48
    assert all(row["choices"][row["answer"]].strip() in row["text"] for row in rows)
    for name, count in (("phd_paper", 7), ("hybridnorm_paper", 13)):
        group = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        assert group["group"] == name and len(set(group["task"])) == count
