"""A checkpoint that another layout loads and saves again without a step exports byte for byte the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.huggingface.export import export_checkpoint

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(600)

STEPS = 2
MODELS: dict[str, dict[str, object]] = {
    "dense": {"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 6},
    "experts": {
        **{"norm-scheme": "pre", "num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24},
        **{"moe-token-dispatcher-type": "alltoall", "moe-router-score-function": "sigmoid"},
        **{"moe-router-enable-expert-bias": True, "moe-shared-expert-intermediate-size": 16},
    },
}
LAYOUTS: dict[str, tuple[int, str, dict[str, object]]] = {
    "tp2+pp2": (4, "dense", {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}),
    "cp2": (2, "dense", {"context-parallel-size": 2}),
    "ep2": (2, "experts", {"expert-model-parallel-size": 2}),
    "tp2+sp+pp2": (
        4,
        "experts",
        {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2, "sequence-parallel": True},
    ),
}


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<model>`` as one rank saved it, and ``<layout>`` as saved again; metrics of all."""
    root = tmp_path_factory.mktemp("export-layouts")
    cases: dict[int, list[list[str]]] = {1: [], 2: [], 4: []}
    for name, model in MODELS.items():
        options: dict[str, object] = {
            **{"data-path": documents, "device": "cpu", "micro-batch-size": 2, "lr": 1e-2, "global-batch-size": 4},
            **{"train-iters": STEPS, "eval-iters": 0, "log-interval": 1},
            **{"save": root / name, "metrics-file": root / f"{name}.jsonl"},
        }
        cases[1].append(["pretrain", *flags({**TINY_MODEL, **model, **options})])
    for name, (ranks, model_name, layout) in LAYOUTS.items():
        places = {"load": root / model_name, "save": root / name, "metrics-file": root / f"{name}.jsonl"}
        cases[ranks].append(["pretrain", *flags({**places, **layout})])
    for ranks, words in cases.items():
        run_cases(ranks, words)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_byte_for_byte_that_of_one_rank(root: Path, tmp_path: Path, layout: str) -> None:
    ranks, model, _ = LAYOUTS[layout]
    assert len(read_metrics(root / f"{model}.jsonl")) == STEPS
    assert not (root / f"{layout}.jsonl").exists() or not read_metrics(root / f"{layout}.jsonl"), "no step was taken"
    (state,) = (root / layout).glob("iter_*/training_state.json")
    assert json.loads(state.read_text())["layout"]["world_size"] == ranks
    exports = [
        export_checkpoint(root / name, tmp_path / name / "hf", verify="tensors").output for name in (model, layout)
    ]
    names = [sorted(path.name for path in directory.iterdir()) for directory in exports]
    assert names[0] == names[1] and "model.safetensors" in names[0]
    for name in names[0]:
        one, two = ((directory / name).read_bytes() for directory in exports)
        assert one == two or name == "README.md", name  # the card tells how it was trained
