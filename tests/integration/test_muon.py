"""Muon in every layout gives the numbers of one rank, and its states move between layouts.

Products of Newton-Schulz are in float32 here: in bfloat16, the default, layouts agree to that precision alone. It is
collected where Megatron-Core has muon (tests/conftest.py); `bash tests/run.sh --mcore 0.19.2` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(1500)

STEPS, INTERRUPTED = 4, 2
MUON = {"optimizer": "muon", "muon-fp32-matmul-prec": "highest", "muon-extra-scale-factor": 0.2}
PHD = {"phd-repeat": 2, "phd-window": 5, "phd-chunk": 8, "phd-copy-embedding": "vector"}
MOE = {"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"}
FIRST_HALF = {"moe-layer-freq": [1, 1, 0, 0]}
MODELS: dict[str, dict[str, object]] = {
    "phd": {"norm-scheme": "hybrid_star", **PHD},
    "bf16": {"norm-scheme": "hybrid_star", **PHD, "bf16": True, "muon-fp32-matmul-prec": "medium"},
    "pre": {"norm-scheme": "pre", "untie-embeddings-and-output-weights": True, "muon-nesterov": True},
    "moe": {"norm-scheme": "hybrid_star", **PHD, **MOE, **FIRST_HALF, "moe-token-dispatcher-type": "alltoall"},
}
TP2 = {"tensor-model-parallel-size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "dp2": (2, {"overlap-grad-reduce": True}),
    "tp2+sp": (2, {**TP2, "sequence-parallel": True}),
    "tp2-distributed": (2, {**TP2, "muon-tp-mode": "distributed"}),
    "pp2+vpp2": (2, {"pipeline-model-parallel-size": 2, "virtual-pipeline-model-parallel-size": 2}),
    # A stage that has no matrix for muon, or none of the experts'.
    "lone-head": (2, {"pipeline-model-parallel-size": 2, "pipeline-model-parallel-layout": "Etttt|L"}),
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
    "ep2": (2, {"expert-model-parallel-size": 2}),
}
NEUTRAL = {"tensor-model-parallel-size": 1, "pipeline-model-parallel-size": 1, "expert-model-parallel-size": 1}
#: model -> layouts that it is trained in; checkpoints go from each to the next, and round
TRAINED = {
    "phd": ("single", "dp2", "tp2+sp", "lone-head", "tp2-distributed", "pp2+vpp2"),
    "pre": ("single", "tp2+sp", "pp2+vpp2"),
    "moe": ("single", "ep2", "pp2", "tp2+sp"),
}
CASES = [(model, layout) for model, layouts in TRAINED.items() for layout in layouts]
#: what goes on in its own layout, bit for bit
RESUMED = [("bf16", "single"), ("bf16", "lone-head"), ("bf16", "tp2+sp")]


def words(model: str, layout: str, data: Path, metrics: Path, **places: object) -> list[str]:
    run = {
        **{"data-path": data, "device": "cpu", "micro-batch-size": 2, "global-batch-size": 8, "train-iters": STEPS},
        **{"lr": 1e-2, "weight-decay": 0.1, "eval-iters": 0, "log-interval": 1, "metrics-file": metrics},
    }
    layouts = {name: value for name, value in NEUTRAL.items() if name not in LAYOUTS[layout][1]}
    return [
        "pretrain",
        *flags({**TINY_MODEL, **MUON, **MODELS[model], **run, **layouts, **LAYOUTS[layout][1], **places}),
    ]


def following(model: str, layout: str) -> str:
    if (model, layout) in RESUMED:
        return layout
    layouts = TRAINED[model]
    return layouts[(layouts.index(layout) + 1) % len(layouts)]


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<model>-<layout>.jsonl`` of whole runs, ``<model>-<layout>-on.jsonl`` of what the next layout makes of half."""
    root = tmp_path_factory.mktemp("muon")
    first: dict[int, list[list[str]]] = {1: [], 2: []}
    second: dict[int, list[list[str]]] = {1: [], 2: []}
    for model, layout in CASES + RESUMED:
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


@pytest.mark.parametrize(("model", "layout"), RESUMED)
def test_a_resumed_run_equals_the_whole_one(root: Path, model: str, layout: str) -> None:
    whole = numbers(root / f"{model}-{layout}.jsonl")
    assert numbers(root / f"{model}-{layout}-on.jsonl") == whole[INTERRUPTED:]
    assert whole[-1][0] == pytest.approx(numbers(root / "phd-single.jsonl")[-1][0], rel=2e-2)


def test_a_model_trained_with_adam_is_fine_tuned_with_muon_and_evaluated(documents: Path, tmp_path: Path) -> None:
    """How AdamW's states were shared does not come along; its own states are refused."""
    start = {**MODELS["phd"], "optimizer": "adam", "save": tmp_path / "adam", "train-iters": 2}
    run = {"data-path": documents, "device": "cpu", "micro-batch-size": 2, "global-batch-size": 8, "eval-iters": 0}
    assert run_program("pretrain", *flags({**TINY_MODEL, **run, **start})).returncode == 0
    again = ["pretrain", "--load", tmp_path / "adam", "--optimizer", "muon", "--train-iters", 4, "--device", "cpu"]
    refused = run_program(*again)
    assert refused.returncode == 2 and "has the states of optimizer=adam; add --no-load-optim" in refused.stdout
    tuned = run_program(*again, "--finetune", "--save", tmp_path / "muon")
    assert tuned.returncode == 0 and "use_distributed_optimizer=False: muon works on whole" in tuned.stdout, (
        tuned.stdout
    )
    words = ("--checkpoint", tmp_path / "muon", "--data-path", documents, "--device", "cpu")
    evaluated = run_program("evaluate", *words, "--micro-batch-size", 2)
    assert evaluated.returncode == 0 and "perplexity" in evaluated.stdout, evaluated.stdout
