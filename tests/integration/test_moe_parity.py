"""Models with experts: every layout gives the single-rank numbers, router losses and per-expert load included.

The single rank multiplies its experts one after another; the layouts, but for those that say so, all at once.
Tolerance and method are those of ``test_layout_parity.py``. Coefficients are large, so that a router loss that weighs
differently in one layout shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.parity.compare import FLOAT32, GRADIENTS, compare
from phd_megatron.training.observers.gradient_dump import load_gradients

from .conftest import TINY_MODEL, flags

Options = dict[str, object]
EXPERTS: Options = {
    "num-experts": 4,
    "moe-router-topk": 2,
    "moe-ffn-hidden-size": 24,
    "moe-router-load-balancing-type": ["aux_loss", "seq_aux_loss"],
    "moe-aux-loss-coeff": [0.1, 0.2],
    "moe-z-loss-coeff": 0.05,
    "moe-router-dtype": "fp32",
}
BIASED: Options = {
    "moe-router-score-function": "sigmoid",
    "moe-router-enable-expert-bias": True,
    "moe-router-bias-update-rate": 0.05,
    "moe-router-load-balancing-type": "none",
    "moe-aux-loss-coeff": 0.0,
    "moe-layer-freq": [0, 0, 1, 1],  # a pipeline stage without experts
    "moe-shared-expert-intermediate-size": 16,
    "moe-shared-expert-gate": True,
}
ALLTOALL: Options = {"moe-token-dispatcher-type": "alltoall"}
MODELS: dict[str, Options] = {
    f"{scheme}-k{repeat}": {"norm-scheme": scheme, "phd-repeat": repeat}
    for scheme in ("pre", "hybrid_star")
    for repeat in (1, 2)
}
VARIANTS: dict[str, Options] = {
    "biased-k2": {"norm-scheme": "hybrid_star", "phd-repeat": 2, **BIASED},
    "presoftmax-k2": {
        "norm-scheme": "hybrid_star",
        "phd-repeat": 2,
        "moe-router-pre-softmax": True,
        "moe-router-topk": 1,
        "moe-shared-expert-intermediate-size": 16,
        "moe-layer-freq": 2,
        "no-phd-last-layer-pruning": True,
    },
    "topk8-k3": {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 3, "num-experts": 12, "moe-router-topk": 8},
        "moe-ffn-hidden-size": 12,
    },
    "gelu-k2": {"norm-scheme": "pre", "phd-repeat": 2, "no-gated-linear-unit": True},
    "told-apart-k2": {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 2},
        **{"phd-copy-positions": "repeated", "phd-copy-embedding": "vector"},
    },
}
#: a loss over the whole step is exact as long as the data-parallel and micro-batch sizes stay
GLOBAL: dict[str, Options] = {
    "global-k2": {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "recompute-granularity": "full"},
        **{"recompute-method": "uniform", "recompute-num-layers": 1},
        **{"moe-router-load-balancing-type": ["aux_loss", "global_aux_loss"], "moe-aux-loss-coeff": [0.1, 0.2]},
        **{"moe-router-num-groups": 2, "moe-router-group-topk": 1, "moe-shared-expert-intermediate-size": 16},
        **{**ALLTOALL, "moe-shared-expert-overlap": True},
    }
}
TP: Options = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
PP: Options = {"pipeline-model-parallel-size": 2}
EP: Options = {"expert-model-parallel-size": 2}
ETP1: Options = {"expert-tensor-parallel-size": 1}
ONE_BY_ONE: Options = {"moe-experts-backend": "sequential"}
LAYOUTS: dict[str, tuple[int, Options]] = {
    "single": (1, {**ALLTOALL, **ONE_BY_ONE}),
    "single+stacked": (1, ALLTOALL),
    "single+allgather+recompute": (1, {"recompute-granularity": "selective", "recompute-modules": ["moe"]}),
    "single+recompute moe_act": (1, {"recompute-granularity": "selective", "recompute-modules": ["moe_act"]}),
    "dp2": (2, ALLTOALL),
    "ep2": (2, {**EP, **ALLTOALL}),
    "ep2+sequential": (2, {**EP, **ALLTOALL, **ONE_BY_ONE}),
    "ep2+allgather": (2, EP),
    "ep2+no-distopt": (2, {**EP, **ALLTOALL, "no-use-distributed-optimizer": True}),
    "tp2+sp": (2, {**TP, **ALLTOALL}),
    "tp2+sp+allgather": (2, TP),
    "tp2+sp+etp1": (2, {**TP, **ETP1, **ALLTOALL}),
    "tp2+sp+ep2+etp1": (2, {**TP, **EP, **ETP1, **ALLTOALL}),
    "pp2": (2, {**PP, **ALLTOALL}),
    "pp2+ep2": (4, {**PP, **EP, **ALLTOALL}),
    "ep2+dp2": (4, {**EP, **ALLTOALL, "overlap-grad-reduce": True, "overlap-param-gather": True}),
    "tp2+sp+ep2": (4, {**TP, **EP, **ALLTOALL}),
    "tp2+sp+pp2+ep2+etp1": (4, {**TP, **PP, **EP, **ETP1}),
}
ONE_REPLICA = ("single", "single+stacked", "tp2+sp", "tp2+sp+ep2+etp1", "pp2")
ALL_VARIANTS = ("single", "single+stacked", "single+recompute moe_act", "ep2", "ep2+sequential", "tp2+sp")
ALL_VARIANTS += ("tp2+sp+etp1", "pp2", "tp2+sp+pp2+ep2+etp1")


def covered(layout: str) -> dict[str, Options]:
    models = MODELS | VARIANTS if layout in ALL_VARIANTS else MODELS
    return models | GLOBAL if layout in ONE_REPLICA else models


@pytest.fixture(scope="module")
def results(corpus: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``<layout>/<model>/{metrics.jsonl,gradients/}`` of every case; one launch a world size."""
    root = tmp_path_factory.mktemp("moe-parity")
    for world_size in (1, 2, 4):
        cases = []
        for layout, (ranks, options) in LAYOUTS.items():
            for name, model in covered(layout).items() if ranks == world_size else ():
                directory = root / layout / name
                run = {
                    **{"phd-window": 5, "phd-chunk": 8, "data-path": str(corpus), "device": "cpu"},
                    **{"micro-batch-size": 2, "global-batch-size": 8, "train-iters": 3, "lr": 1e-2, "eval-iters": 0},
                    **{"log-interval": 1, "metrics-file": str(directory / "metrics.jsonl")},
                    "dump-gradients-dir": str(directory / "gradients"),
                }
                cases.append(["pretrain", *flags({**TINY_MODEL, **run, **EXPERTS, **model, **options})])
        run_cases(world_size, cases, timeout=900)
    return root


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("layout", "model"), [(layout, model) for layout in LAYOUTS if layout != "single" for model in covered(layout)]
)
def test_layout_gives_the_numbers_of_one_rank(results: Path, layout: str, model: str) -> None:
    reference, other = results / "single" / model, results / layout / model
    expected, found = metrics(reference), metrics(other)
    assert len(expected) == len(found) == 3
    router = [name for name in expected[0] if name.endswith(("balancing_loss", "z_loss", "max_expert_load"))]
    assert len(router) == (2 if model.startswith("biased") else 4)
    for one, two in zip(expected, found, strict=True):
        for name in router:
            assert two[name] == pytest.approx(one[name], rel=FLOAT32.value), name
        assert two["tokens_per_expert"] == one["tokens_per_expert"]
        assert two["router_entropy"] == pytest.approx(one["router_entropy"], rel=FLOAT32.value)
    comparison = compare(reference, other, FLOAT32)
    assert comparison.within(FLOAT32), comparison
    gradients = load_gradients(reference / GRADIENTS / "iter_0000001")
    total = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    assert total == pytest.approx(expected[0]["grad_norm"], rel=FLOAT32.value)
    experts = [key for key in gradients if ".experts.experts." in key or key.endswith("router.weight")]
    assert len(experts) == 3 * len(expected[0]["tokens_per_expert"])
    assert all(gradients[key].norm() > 0 for key in experts)


def test_load_counts_processed_tokens(results: Path) -> None:
    """8 samples of 24 tokens, two experts a row: K times as many rows, but for the pruned last layer."""
    for model, repeat in (("pre-k1", 1), ("pre-k2", 2)):
        load = metrics(results / "single" / model)[0]["tokens_per_expert"]
        assert {int(layer): sum(counts) for layer, counts in load.items()} == {
            layer: 8 * 24 * 2 * (repeat if layer < 4 else 1) for layer in (1, 2, 3, 4)
        }
    load = metrics(results / "single" / "presoftmax-k2")[0]["tokens_per_expert"]
    assert {int(layer): sum(counts) for layer, counts in load.items()} == {1: 384, 3: 384}
