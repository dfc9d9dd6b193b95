"""Every layout gives the single-rank numbers: losses and gradient norms of three steps, every gradient of the first.

Tolerance (all cases): 1e-5 relative in float32. A gradient's error is the Frobenius norm of the difference over
max(norm of the reference, 1e-6 of the global gradient norm).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from phd_megatron.training.gradient_dump import load_gradients

from .conftest import TINY_MODEL, flags

TOLERANCE = 1e-5
MODELS = {f"{scheme}-k{repeat}": (scheme, repeat) for scheme in ("pre", "hybrid_star") for repeat in (1, 2, 3)}
EXTRA_MODELS = {"post-k2": ("post", 2), "pre_qk-k2": ("pre_qk", 2), "hybrid-k2": ("hybrid", 2)}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "tp2": (2, {"tensor-model-parallel-size": 2}),
    "tp2+sp": (2, {"tensor-model-parallel-size": 2, "sequence-parallel": True}),
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
    "dp2": (2, {}),
    "dp2+overlap": (
        2,
        {"overlap-grad-reduce": True, "overlap-param-gather": True, "ddp-bucket-size": 3000},
    ),
    "dp2+no-distopt": (2, {"no-use-distributed-optimizer": True}),
    "tp2+pp2": (4, {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}),
    "tp2+sp+pp2": (
        4,
        {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2, "sequence-parallel": True},
    ),
    "tp2+sp+dp2+overlap": (
        4,
        {
            "tensor-model-parallel-size": 2,
            "sequence-parallel": True,
            "overlap-grad-reduce": True,
            "overlap-param-gather": True,
        },
    ),
    "tp4": (4, {"tensor-model-parallel-size": 4}),  # num_query_groups = 2 < TP
    "tp4+sp": (4, {"tensor-model-parallel-size": 4, "sequence-parallel": True}),
}


def covered(layout: str) -> dict[str, tuple[str, int]]:
    """Which models a layout is run with: the issue's six everywhere, the other schemes where norms are split."""
    if layout in ("dp2+overlap", "dp2+no-distopt", "tp2+sp+dp2+overlap", "tp4", "tp4+sp"):
        return {name: MODELS[name] for name in ("pre-k1", "hybrid_star-k3")}
    if layout in ("single", "tp2", "tp2+sp", "pp2"):
        return MODELS | EXTRA_MODELS
    return MODELS


@pytest.fixture(scope="module")
def results(corpus: Path, run_cases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``<layout>/<model>/{metrics.jsonl,gradients/}`` of every case; one launch a world size."""
    root = tmp_path_factory.mktemp("parity")
    for world_size in (1, 2, 4):
        cases = []
        for layout, (ranks, options) in LAYOUTS.items():
            if ranks != world_size:
                continue
            for name, (scheme, repeat) in covered(layout).items():
                directory = root / layout / name
                cases.append(
                    [
                        "pretrain",
                        *flags(
                            {
                                **TINY_MODEL,
                                "norm-scheme": scheme,
                                "phd-repeat": repeat,
                                "phd-window": 5,
                                "phd-chunk": 8,
                                "data-path": str(corpus),
                                "micro-batch-size": 2,
                                "global-batch-size": 8,
                                "train-iters": 3,
                                "lr": 1e-2,
                                "eval-iters": 0,
                                "log-interval": 1,
                                "metrics-file": str(directory / "metrics.jsonl"),
                                "dump-gradients-dir": str(directory / "gradients"),
                                "device": "cpu",
                                **options,
                            }
                        ),
                    ]
                )
        run_cases(world_size, cases)
    return root


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "model"),
    [(layout, model) for layout in LAYOUTS if layout != "single" for model in covered(layout)],
)
def test_layout_gives_the_numbers_of_one_rank(results: Path, layout: str, model: str) -> None:
    reference, other = results / "single" / model, results / layout / model
    expected, found = metrics(reference), metrics(other)
    assert len(expected) == len(found) == 3
    for one, two in zip(expected, found, strict=True):
        assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=TOLERANCE)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=TOLERANCE)
    gradients, others = (load_gradients(d / "gradients" / "iter_0000001") for d in (reference, other))
    assert gradients.keys() == others.keys()
    total = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    assert total == pytest.approx(expected[0]["grad_norm"], rel=1e-5)
    errors = {
        key: float((others[key] - gradient).double().norm() / max(gradient.double().norm(), 1e-6 * total))
        for key, gradient in gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.2e}"
    if "hybrid" in model:
        head_norms = [key for key in errors if "self_attention" in key and "layernorm" in key]
        assert len(head_norms) == 12 and all(gradients[key].norm() > 0 for key in head_norms)


def test_models_differ(results: Path) -> None:
    """The cases are different models: no two have the same loss, so a flag that is ignored would show."""
    losses = {model: metrics(results / "single" / model)[1]["lm_loss"] for model in MODELS | EXTRA_MODELS}
    assert len({f"{loss:.6f}" for loss in losses.values()}) == len(losses)
