"""Checkpoints of runs with virtual pipeline stages load in any layout and continue the run, optimizer state included.

The reference is one uninterrupted run of one rank, with evaluations; tolerance of losses and gradient norms: 1e-5
relative, as between layouts without a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(900)

STEPS, INTERRUPTED = 6, 3
VPP = {"pipeline-model-parallel-size": 2, "virtual-pipeline-model-parallel-size": 2}
#: Megatron-LM's spelling of the same
VPP_BY_LAYERS = {"pipeline-model-parallel-size": 2, "num-layers-per-virtual-pipeline-stage": 1}
OVERLAP = {"overlap-grad-reduce": True, "overlap-param-gather": True, "ddp-bucket-size": 3000}
NO_OVERLAP = {"overlap-grad-reduce": False, "overlap-param-gather": False}
ONE_RANK = {"pipeline-model-parallel-size": 1}  # how the stages were cut is then not inherited from the checkpoint
TP2 = {"pipeline-model-parallel-size": 1, "tensor-model-parallel-size": 2, "sequence-parallel": True}
#: runs that stop half way: name -> world size and options
HALVES: dict[str, tuple[int, dict[str, object]]] = {
    "alone": (1, {}),
    "vpp": (2, VPP),
    "vpp+dp2+overlap": (4, {**VPP_BY_LAYERS, **OVERLAP}),
}
#: runs that continue: name -> world size, which half they load, options
CONTINUED: dict[str, tuple[int, str, dict[str, object]]] = {
    "vpp to itself": (2, "vpp", {}),
    "alone to vpp": (2, "alone", VPP),
    "vpp to tp2+sp": (2, "vpp", TP2),
    "vpp to uneven stages": (2, "vpp", {"pipeline-model-parallel-size": 2, "virtual-pipeline-model-parallel-size": None,
                                        "decoder-first-pipeline-num-layers": 3}),
    "vpp to one rank": (1, "vpp", ONE_RANK),
    "vpp+dp2+overlap to one rank": (1, "vpp+dp2+overlap", {**ONE_RANK, **NO_OVERLAP}),
    "alone to vpp+dp2+overlap": (4, "alone", {**VPP_BY_LAYERS, **OVERLAP}),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``<name>/{metrics.jsonl,save/}`` of all runs, and ``whole/`` of the uninterrupted one."""
    root = tmp_path_factory.mktemp("virtual")
    common: dict[str, object] = {**TINY_MODEL, "norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5}
    common |= {"phd-chunk": 8, "data-path": documents, "micro-batch-size": 1, "global-batch-size": 8, "lr": 1e-2}
    common |= {"eval-interval": 2, "eval-iters": 1, "log-interval": 1, "device": "cpu", "train-iters": STEPS}

    def start(name: str, options: dict[str, object]) -> list[str]:
        return ["pretrain", *flags({**common, **options, "metrics-file": root / name / "metrics.jsonl"})]

    def resume(name: str, source: str, options: dict[str, object]) -> list[str]:
        places: dict[str, object] = {"load": root / source / "save", "save": root / name / "save"}
        words = flags({**places, **options, "metrics-file": root / name / "metrics.jsonl"})
        return ["pretrain", *["null" if word == "None" else word for word in words]]

    for ranks in (1, 2, 4):
        cases = [start("whole", {})] if ranks == 1 else []
        for name, (size, options) in HALVES.items():
            if size == ranks:
                cases.append(start(name, {**options, "save": root / name / "save", "exit-interval": INTERRUPTED}))
        run_cases(ranks, cases)
    for ranks in (1, 2, 4):
        run_cases(
            ranks, [resume(n, source, options) for n, (size, source, options) in CONTINUED.items() if size == ranks]
        )
    return root


def assert_follows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["iteration"] for line in found] == [line["iteration"] for line in expected]
    for one, two in zip(expected, found, strict=True):
        for name in ("lm_loss", "grad_norm", "validation_loss"):
            if one[name] is None:
                assert two[name] is None
            else:
                assert two[name] == pytest.approx(one[name], rel=1e-5), (name, one["iteration"])
        assert two["learning_rate"] == one["learning_rate"]


@pytest.mark.parametrize("name", HALVES)
def test_half_runs_train_and_evaluate_as_one_rank(root: Path, name: str) -> None:
    whole = read_metrics(root / "whole" / "metrics.jsonl")
    assert sum(line["validation_loss"] is not None for line in whole) == STEPS // 2
    assert_follows(read_metrics(root / name / "metrics.jsonl"), whole[:INTERRUPTED])


@pytest.mark.parametrize("name", CONTINUED)
def test_checkpoint_continues_in_another_layout(root: Path, name: str) -> None:
    whole = read_metrics(root / "whole" / "metrics.jsonl")
    assert_follows(read_metrics(root / name / "metrics.jsonl"), whole[INTERRUPTED:])


def test_export_of_virtual_stages_is_the_export_of_one_rank(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    exports = {}
    for name in ("alone", "vpp"):
        (checkpoint,) = (root / name / "save").glob(f"iter_{INTERRUPTED:07d}")
        done = run_program("export", "--checkpoint", checkpoint, "--output", tmp_path / name)
        assert done.returncode == 0, done.stdout
        exports[name] = load_file(tmp_path / name / "model.safetensors")
    assert exports["alone"].keys() == exports["vpp"].keys()
    for key, tensor in exports["alone"].items():
        torch.testing.assert_close(exports["vpp"][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
