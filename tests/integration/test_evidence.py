"""The queue of trained models at toy size: real trainings in two commands of one piece, kept, folded, reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from evidence.prepared import prepare_and_pack

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400
QUEUE = {
    "base": {
        "model": {
            **{"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2},
            **{"vocab_size": 16384, "seq_length": 64},
        },
        "parallel": {"device": "cpu"},
        "data": {"data_horizon_samples": 2 * STEPS},
        "training": {"micro_batch_size": 2, "global_batch_size": 2, "evals_per_run": 3, "eval_iters": 2},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"save_interval": 1_000_000},
        "logging": {"log_interval": 20},
    },
    "variants": {
        "pre": {"norm_scheme": "pre"},
        "star-2": {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_copy_embedding": "vector"},
    },
    "anchor": "anchor",
    "sections": [
        {
            **{"name": "anchor", "item": 0, "about": "Same", "texts": ["mine"], "tokens": 128.0 * STEPS},
            **{"variants": ["pre"], "seeds": [1]},
        },
        {
            **{"name": "head", "item": 1, "about": "Both", "texts": ["mine"], "tokens": 128.0 * STEPS},
            **{"variants": ["star-2"], "seeds": [1], "rates": "chosen", "folders": False},
        },
    ],
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A packed text, and a queue beside it."""
    text = tmp_path / "mine"
    text.mkdir()
    words = (ROOT / "docs/semantics.md").read_text("utf-8").split()
    parts = {}
    for number, part in enumerate(("train", "valid", "valid_folders")):
        lines = [json.dumps({"text": " ".join(words[number + i :: 3])}) for i in range(40 if part == "train" else 4)]
        (text / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        parts[part] = {"sha256": part}
    (text / "manifest.json").write_text(json.dumps({"text": "mine", "parts": parts}))
    assert [path.name for path in prepare_and_pack(text, tmp_path / "ship", 10**9, workers=1)] == ["mine.tar.xz"]
    results = tmp_path / "results"
    results.mkdir()
    (results / "queue.yaml").write_text(yaml.safe_dump(QUEUE))
    (results / "rates.yaml").write_text(yaml.safe_dump({"mine": {"star-2": {"lr": 2e-3}}}))
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    variables = {
        **{"OUT": str(home / "out"), "PHD_EVIDENCE_WORK": str(home / "work"), "PHD_EVIDENCE_PARALLEL": "2"},
        **{"PHD_EVIDENCE_QUEUE": str(home / "results/queue.yaml"), "PHD_EVIDENCE_ARCHIVES": str(home / "ship")},
        **{"PHD_EVIDENCE_SECONDS": "250", "PHD_EVIDENCE_PIECE": "500", "PHD_EVIDENCE_FLOPS": "1e10"},
    }
    path = os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    return {**os.environ, **variables, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def evidence(home: Path, *words: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "evidence", "--results", str(home / "results"), *words]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_piece_of_two_commands(home: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "evidence", "run"]
    first = subprocess.Popen(command, env=environment(home), stdout=subprocess.PIPE, text=True)
    metrics = home / "work/runs/mine-anchor/members/pre-seed1/metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)  # as the end of a command's time
    said = first.communicate(timeout=300)[0]
    assert "mine-anchor-pre-seed1: started" in said

    evidence(home, "run")
    content = json.loads((home / "out/evidence.json").read_text())
    assert content["failed"] == {}
    records = {record["name"]: record for record in content["records"]}
    assert list(records) == ["mine-anchor-pre-seed1", "mine-head-star-2-seed1"]
    assert records["mine-anchor-pre-seed1"]["starts"] == 2
    for record in records.values():
        assert record["state"] == "finished"
        assert record["steps"]["iteration"][-1] == STEPS
        assert len(set(record["steps"]["iteration"])) == len(record["steps"]["iteration"])
        assert sum(loss is not None for loss in record["steps"]["validation_loss"]) == 3
        assert record["config"]["lr"] == (2e-3 if "head" in record["name"] else 1e-3)
        assert record["text_made_of"]["tokens"]["train"] > 10_000
    assert records["mine-anchor-pre-seed1"]["evaluations"]["valid_folders"]["samples"] == 4
    assert records["mine-head-star-2-seed1"]["evaluations"] == {}
    assert not list((home / "work/runs").glob("*/members/*/checkpoints"))

    assert "mine-head-star-2-seed1.json: finished" in evidence(home, "fold", str(home / "out/evidence.json"))
    evidence(home, "report")
    text = (home / "results/README.md").read_text()
    assert "| 1. Both | mine | 0.0512 M | 1 of 1 |" in text
    assert "| mine, star-2 | 1 |" in text
