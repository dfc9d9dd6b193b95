"""``phd-megatron average``: the mean of saved checkpoints to the last bit, from any layout, and what it is good for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from phd_megatron.checkpoint.reader import CheckpointReader

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(1200)

COPIES: dict[str, object] = {"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 8}
EXPERTS: dict[str, object] = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"},
    **{"moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True, "moe-layer-freq": [0, 1, 1, 1]},
    **{"moe-token-dispatcher-type": "alltoall", "moe-aux-loss-coeff": 0.05},
}
TP = {"tensor-model-parallel-size": 2, "sequence-parallel": True, "expert-tensor-parallel-size": 1}
#: run -> (ranks, model, layout)
RUNS: dict[str, tuple[int, dict[str, object], dict[str, object]]] = {
    "experts": (1, {**COPIES, **EXPERTS}, {}),
    "experts, tp2": (2, {**COPIES, **EXPERTS}, TP),
    "half, pp2": (
        2,
        {**COPIES, "bf16": True, "phd-copy-embedding": "vector"},
        {
            **{"pipeline-model-parallel-size": 2, "recompute-granularity": "full", "recompute-method": "uniform"},
            "recompute-num-layers": 2,
        },
    ),
    "other": (1, {**COPIES, "phd-window": 7, **EXPERTS}, {}),
}
STEPS = 4


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that saved after every step."""
    root = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2):
        cases = []
        for name, (of, model, layout) in RUNS.items():
            options = {**TINY_MODEL, **model, **layout, "data-path": documents, "device": "cpu", "lr": 1e-2}
            options |= {"micro-batch-size": 2, "global-batch-size": 4, "train-iters": STEPS, "eval-iters": 1}
            options |= {"save": root / name, "save-interval": 1, "keep-last": STEPS, "log-interval": 1}
            cases += [["pretrain", *flags(options)]] if of == ranks else []
        run_cases(ranks, cases)
    return root


def average(run: Path, output: Path, *more: object, code: int = 0) -> str:
    done = run_program("average", "--checkpoint", run, "--output", output, *more)
    assert done.returncode == code, done.stdout
    return " ".join(done.stdout.split())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint has beside the optimizer, read by torch."""
    reader = CheckpointReader(directory)
    entries = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if hasattr(entry, "size") and not key.startswith("optimizer.")
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def newest(directory: Path) -> Path:
    (found,) = directory.glob("iter_*")
    return found


@pytest.mark.parametrize("name", ["experts", "experts, tp2", "half, pp2"])
def test_every_parameter_is_the_mean(root: Path, tmp_path: Path, name: str) -> None:
    said = average(root / name, tmp_path / "mean", "--last", 3)
    assert "averaged 3 checkpoints" in said and "iterations 2, 3, 4" in said
    made = newest(tmp_path / "mean")
    assert made.name == "iter_0000004"
    found = tensors(made)
    sources = [tensors(root / name / f"iter_{step:07d}") for step in (2, 3, 4)]
    assert found.keys() == sources[-1].keys() and len(found) > 20
    for key, value in found.items():
        expected = torch.stack([source[key].double() for source in sources]).mean(0).to(value.dtype)
        assert value.dtype == sources[-1][key].dtype
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert any(not torch.equal(found[key], sources[-1][key]) for key in found)
    state = json.loads((made / "training_state.json").read_text())
    assert state["averaged"] == [2, 3, 4] and state["consumed_samples"] == 16


def test_layouts_give_one_mean(root: Path, tmp_path: Path) -> None:
    """Those of a run over two ranks and of one rank, within what the runs differ by."""
    for name in ("experts", "experts, tp2"):
        average(root / name, tmp_path / name, "--iterations", 3, 1)
    one, other = (tensors(newest(tmp_path / name)) for name in ("experts", "experts, tp2"))
    for key, value in one.items():
        assert float((value - other[key]).norm()) <= 1e-5 * float(value.norm()), key


def test_what_takes_it(root: Path, documents: Path, tmp_path: Path) -> None:
    """Export compares logits; evaluate and a run that goes on start from it, and a resume does not."""
    mean = tmp_path / "mean"
    average(root / "half, pp2", mean, "--last", 2)
    done = run_program("export", "--checkpoint", mean, "--output", tmp_path / "hf")
    assert done.returncode == 0 and "logits" in done.stdout, done.stdout
    done = run_program("evaluate", "--checkpoint", mean, "--device", "cpu", "--num-samples", 4)
    assert done.returncode == 0 and "loss" in done.stdout, done.stdout
    going_on = ["pretrain", "--load", mean, "--save", tmp_path / "on", "--data-path", documents, "--device", "cpu"]
    going_on += ["--train-iters", 2, "--eval-iters", 1, "--metrics-file", tmp_path / "on.jsonl"]
    done = run_program(*going_on)
    assert done.returncode == 2 and "--finetune" in done.stdout, done.stdout
    done = run_program(*going_on, "--finetune")
    assert done.returncode == 0, done.stdout
    assert len(read_metrics(tmp_path / "on.jsonl")) >= 2


def test_refusals(root: Path, tmp_path: Path) -> None:
    run, output = root / "experts", tmp_path / "mean"
    for words, why in (
        (("--last", 1), "a mean is of two checkpoints or more"),
        (("--iterations", 3), "a mean is of two checkpoints or more"),
        (("--last", 9), "has 4 complete checkpoints (1, 2, 3, 4); ask for fewer"),
        (("--iterations", 2, 2), "a checkpoint counts once"),
        (("--iterations", 2, 7), "--iterations 7: "),
    ):
        assert why in average(run, output, *words, code=2), words
    assert "is read; choose another --output" in average(run, run, "--last", 2, code=2)
    mixed = tmp_path / "mixed"
    shutil.copytree(run / "iter_0000003", mixed / "iter_0000003")
    shutil.copytree(root / "other/iter_0000004", mixed / "iter_0000004")
    assert "say different models" in average(mixed, output, "--last", 2, code=2)
    shutil.rmtree(mixed / "iter_0000004")
    shutil.copytree(root / "half, pp2/iter_0000004", mixed / "iter_0000004")
    assert "are not of one model: " in average(mixed, output, "--last", 2, code=2)
    shutil.rmtree(mixed / "iter_0000004")
    shutil.copytree(run / "iter_0000004", mixed / "iter_0000004")
    shard = sorted((mixed / "iter_0000004").glob("*.distcp"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert shard.name in average(mixed, output, "--last", 2, code=2)
    assert not output.exists() and not list(tmp_path.glob(".*"))
    output.mkdir()
    (output / "mine").touch()
    assert "not empty" in average(run, output, "--last", 2, code=2)
