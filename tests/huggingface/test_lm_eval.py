"""lm-evaluation-harness on exports gives the scores that transformers gives; skipped without the extra `eval`."""

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
def test_an_offline_task_scores_as_one_text_at_a_time(make_checkpoint, tmp_path):
    """The harness pads a batch on the left; here every text is computed alone, with transformers and no padding."""
    source = make_checkpoint(norm_scheme="hybrid_star", phd_repeat=2, phd_window=16, phd_chunk=32, seq_length=256)
    export_checkpoint(source, tmp_path / "hf", verify="tensors")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", str(TASKS)),
            *("--model_args", f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32"),
            *("--tasks", "copy_word", "--batch_size", "8", "--device", "cpu", "--log_samples"),
            *("--output_path", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (tmp_path / "out").glob("*/samples_copy_word_*.jsonl")
    rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
    found = torch.tensor([[float(score) for score, _ in row["filtered_resps"]] for row in rows])
    documents = [json.loads(line) for line in (TASKS / "copy_word.jsonl").read_text().splitlines()]
    assert found.shape == (48, 4) and [row["doc"] for row in rows] == documents

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    expected = torch.zeros(48, 4)
    for number, document in enumerate(documents):
        text = list(document["text"].encode())  # the tokenizer's ids are bytes
        for place, choice in enumerate(document["choices"]):
            answer = torch.tensor(list(choice.encode()))  # with the one space that it begins with
            with torch.no_grad():
                logits = model(torch.tensor([[*text, *answer]]), use_cache=False).logits[0, len(text) - 1 : -1]
            expected[number, place] = logits.log_softmax(-1).gather(1, answer[:, None]).sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    results = json.loads(next((tmp_path / "out").glob("*/results_*.json")).read_text())["results"]["copy_word"]
    right = expected.argmax(1) == torch.tensor([document["answer"] for document in documents])
    assert results["acc,none"] == pytest.approx(right.float().mean().item())


def test_task_files_name_their_data_and_the_papers_tasks():
    task = yaml.safe_load((TASKS / "copy_word.yaml").read_text())
    rows = [json.loads(line) for line in (ROOT / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert len(rows) == 48
    assert all(row["choices"][row["answer"]].strip() in row["text"] for row in rows)
    for name, count in (("phd_paper", 7), ("hybridnorm_paper", 13)):
        group = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
        assert group["group"] == name and len(set(group["task"])) == count
