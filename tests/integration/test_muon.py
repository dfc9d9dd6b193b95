"""Muon in every layout gives the numbers of one rank, and its states move between layouts.

Products of Newton-Schulz are in float32 here: in bfloat16, the default, layouts agree to that precision alone. It is
collected where Megatron-Core has muon (tests/conftest.py); `bash tests/run.sh --mcore 0.19.2` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(1500)

STEPS, INTERRUPTED = 4, 2
MUON = {"optimizer": "muon", "muon-fp32-matmul-prec": "highest", "muon-extra-scale-factor": 0.2}
PHD = {"phd-repeat": 2, "phd-window": 5, "phd-chunk": 8, "phd-copy-embedding": "vector"}
MOE = {"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"}
MODELS: dict[str, dict[str, object]] = {
    "phd": {"norm-scheme": "hybrid_star", **PHD},
    "pre": {"norm-scheme": "pre", "untie-embeddings-and-output-weights": True, "muon-nesterov": True},
    "moe": {"norm-scheme": "hybrid_star", **PHD, **MOE, "moe-token-dispatcher-type": "alltoall"},
}
TP2 = {"tensor-model-parallel-size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "dp2": (2, {"overlap-grad-reduce": True}),
    "tp2+sp": (2, {**TP2, "sequence-parallel": True}),
    "tp2-distributed": (2, {**TP2, "muon-tp-mode": "distributed"}),
    "pp2+vpp2": (2, {"pipeline-model-parallel-size": 2, "virtual-pipeline-model-parallel-size": 2}),
    "ep2": (2, {"expert-model-parallel-size": 2}),
}
NEUTRAL = {"tensor-model-parallel-size": 1, "pipeline-model-parallel-size": 1, "expert-model-parallel-size": 1}
#: model -> layouts that it is trained in; checkpoints go from each to the next, and round
TRAINED = {
    "phd": ("single", "dp2", "tp2+sp", "tp2-distributed", "pp2+vpp2"),
    "pre": ("single", "tp2+sp", "pp2+vpp2"),
    "moe": ("single", "ep2", "tp2+sp"),
}
CASES = [(model, layout) for model, layouts in TRAINED.items() for layout in layouts]


def words(model: str, layout: str, data: Path, metrics: Path, **places: object) -> list[str]:
    run = {
        **{"data-path": data, "device": "cpu", "micro-batch-size": 2, "global-batch-size": 8, "train-iters": STEPS},
        **{"lr": 1e-2, "weight-decay": 0.1, "eval-iters": 0, "log-interval": 1, "metrics-file": metrics},
    }
    layouts = {name: value for name, value in NEUTRAL.items() if name not in LAYOUTS[layout][1]}
    return [
        "pretrain",
        *flags({**TINY_MODEL, **MODELS[model], **MUON, **run, **layouts, **LAYOUTS[layout][1], **places}),
    ]


def following(model: str, layout: str) -> str:
    layouts = TRAINED[model]
    return layouts[(layouts.index(layout) + 1) % len(layouts)]


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<model>-<layout>.jsonl`` of whole runs, ``<model>-<layout>-on.jsonl`` of what the next layout makes of half."""
    root = tmp_path_factory.mktemp("muon")
    first: dict[int, list[list[str]]] = {1: [], 2: []}
    second: dict[int, list[list[str]]] = {1: [], 2: []}
    for model, layout in CASES:
        name = f"{model}-{layout}"
        half = {"save": root / name, "exit-interval": INTERRUPTED}
        first[LAYOUTS[layout][0]] += [
            words(model, layout, documents, root / f"{name}.jsonl"),
            words(model, layout, documents, root / f"{name}-half.jsonl", **half),
        ]
        other = following(model, layout)
        second[LAYOUTS[other][0]].append(words(model, other, documents, root / f"{name}-on.jsonl", load=root / name))
    for part in (first, second):
        for ranks, cases in part.items():
            run_cases(ranks, cases)
    return root


def numbers(path: Path) -> list[tuple[float, float]]:
    return [(line["lm_loss"], line["grad_norm"]) for line in read_metrics(path)]


def assert_close(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert len(found) == len(expected)
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_layout_trains_as_one_rank(root: Path, model: str, layout: str) -> None:
    single = numbers(root / f"{model}-single.jsonl")
    assert single[-1][0] < single[0][0] - 0.2, "it trains"
    assert_close(numbers(root / f"{model}-{layout}.jsonl"), single)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_another_layout_goes_on_as_one_rank(root: Path, model: str, layout: str) -> None:
    assert_close(numbers(root / f"{model}-{layout}-on.jsonl"), numbers(root / f"{model}-single.jsonl")[INTERRUPTED:])
