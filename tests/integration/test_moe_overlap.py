"""Experts' transfers of one micro-batch beside the products of another: the numbers of the schedule without that.

In bfloat16, for which alone Megatron-Core has it. Both schedules route alike in the first step, whose loss is the same
to the last bit; gradients differ by where sums of bfloat16 numbers are rounded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.parity.compare import GRADIENTS, HALF
from phd_megatron.training.observers.gradient_dump import load_gradients

from .conftest import TINY_MODEL, flags, read_metrics
from .test_moe_parity import ALLTOALL, EP, ETP1, EXPERTS, PP, TP, Options

MODELS: dict[str, Options] = {
    "pre-k1": {"norm-scheme": "pre", "phd-repeat": 1},
    "hybrid_star-k2": {"norm-scheme": "hybrid_star", "phd-repeat": 2},
    "some dense-k3": {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 3, "moe-layer-freq": [0, 1, 0, 1]},
        **{"moe-shared-expert-intermediate-size": 16, "moe-router-topk": 1, "moe-router-pre-softmax": True},
    },
}
LAYOUTS: dict[str, tuple[int, Options]] = {
    "ep2": (2, EP),
    "tp2+sp+ep2+etp1": (2, {**TP, **EP, **ETP1}),
    "pp2+vpp2+ep2": (4, {**PP, **EP, "virtual-pipeline-model-parallel-size": 2}),
}
OVERLAP: Options = {"overlap-moe-expert-parallel-comm": True}
STEPS = 3
PROGRAM = Path(__file__).with_name("count_plans.py")
GRADIENT, LATER = 5e-3, 2e-3  #: relative: of each gradient of the first step, and of losses of later steps


@pytest.fixture(scope="module")
def results(documents: Path, torchrun: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``<layout>/<model>/<plain or overlap>``; one launch a world size."""
    root = tmp_path_factory.mktemp("moe-overlap")
    for world_size in (2, 4):
        cases = []
        for layout, (ranks, options) in LAYOUTS.items():
            for name, model in MODELS.items() if ranks == world_size else ():
                for kind, overlap in (("plain", {}), ("overlap", OVERLAP)):
                    directory = root / layout / name / kind
                    run = {
                        **{"phd-window": 5, "phd-chunk": 8, "data-path": str(documents), "device": "cpu", "bf16": True},
                        **{"micro-batch-size": 2, "global-batch-size": 16, "train-iters": STEPS, "lr": 1e-2},
                        **{"eval-iters": 2, "eval-interval": 2, "log-interval": 1, "seed": 3},
                        "metrics-file": str(directory / "metrics.jsonl"),
                        "dump-gradients-dir": str(directory / GRADIENTS),
                    }
                    given = {**TINY_MODEL, **run, **EXPERTS, **ALLTOALL, **model, **options, **overlap}
                    cases.append(["pretrain", *flags(given)])
        (root / "cases.json").write_text(json.dumps(cases))
        torchrun(world_size, PROGRAM, str(root / "cases.json"), timeout=900)
    return root


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlapped_transfers_change_no_number(results: Path, layout: str, model: str) -> None:
    plain, overlap = (results / layout / model / kind for kind in ("plain", "overlap"))
    expected, found = read_metrics(plain / "metrics.jsonl"), read_metrics(overlap / "metrics.jsonl")
    assert len(expected) == len(found) >= STEPS
    first, other = expected[0], found[0]
    assert other["lm_loss"] == first["lm_loss"]
    assert other["tokens_per_expert"] == first["tokens_per_expert"]
    assert other["z_loss"] == pytest.approx(first["z_loss"], rel=1e-6)
    assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    for one, two in zip(expected, found, strict=True):
        for name in ("lm_loss", "validation_loss"):
            if one.get(name) is not None:
                assert two[name] == pytest.approx(one[name], rel=LATER), name
    gradients, others = (load_gradients(path / GRADIENTS / "iter_0000001") for path in (plain, overlap))
    assert gradients.keys() == others.keys()
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    for key, gradient in gradients.items():
        difference = float((others[key].double() - gradient.double()).norm())
        assert difference <= GRADIENT * max(float(gradient.double().norm()), HALF.floor * float(total)), key
    # In pieces ran every micro-batch of training on each chunk of the model, and none without the overlap.
    chunks, microbatches = (2 if layout.startswith("pp2") else 1), 16 // 2 // (1 if layout.startswith("tp2") else 2)
    plans = [int((path / "metrics.jsonl.plans").read_text()) for path in (plain, overlap)]
    assert plans == [0, STEPS * microbatches * chunks]
