"""Checkpoints of models with experts: bit-exact on the same layout, the same numbers on another one.

The router's expert bias, shared experts and layers without experts travel too; ``test_reshard.py`` has more layouts.
Experts are stacked in one run and single in the next, with the states of either optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.huggingface.checkpoint import MegatronCheckpoint

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(1200)

RATE = 0.05
MODEL: dict[str, object] = {
    **TINY_MODEL,
    **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 8},
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"},
    **{"moe-router-load-balancing-type": "seq_aux_loss", "moe-aux-loss-coeff": 0.05, "moe-z-loss-coeff": 0.01},
    **{"moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True},
    **{"moe-router-bias-update-rate": RATE, "moe-token-dispatcher-type": "alltoall", "moe-layer-freq": [0, 0, 1, 1]},
    "moe-shared-expert-intermediate-size": 16,
}
TP = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
EP = {"expert-model-parallel-size": 2}
SINGLE = {"moe-experts-backend": "sequential"}
PLAIN = {"no-use-distributed-optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "single+sequential": (1, SINGLE),
    "plain": (1, PLAIN),
    "plain+sequential": (1, {**PLAIN, **SINGLE}),
    "ep2": (2, EP),
    "ep2+sequential": (2, {**EP, **SINGLE}),
    "tp2+sp+etp1": (2, {**TP, "expert-tensor-parallel-size": 1}),
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
}
SAVED = ("single", "ep2", "pp2", "single+sequential", "plain", "ep2+sequential")
# A stage without experts, and one without a matrix that is decayed: its first group of main parameters is empty.
PLAIN_BF16 = {"bf16": True, "no-use-distributed-optimizer": True}
EMPTY = {"pipeline-model-parallel-layout": "E|tttt|L", "no-decay-embeddings": True}
WITHOUT: dict[str, tuple[int, dict[str, object]]] = {
    "no-experts": (2, {"pipeline-model-parallel-size": 2, **PLAIN_BF16}),
    "no-decay": (3, {"pipeline-model-parallel-size": 3, **EMPTY, **PLAIN_BF16}),
}
# Each on its own layout, and on the next of all; more pairs are in test_reshard.py.
PAIRS = [(name, name) for name in SAVED] + [("single", "ep2"), ("ep2", "tp2+sp+etp1"), ("pp2", "single")]
PAIRS += [("single", "single+sequential"), ("ep2+sequential", "tp2+sp+etp1"), ("plain", "plain+sequential")]
PAIRS += [("single+sequential", "plain"), ("ep2", "ep2+sequential")]


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<saved>/save`` after two of four steps, ``<saved>-<loaded>.jsonl`` of the rest, ``whole.jsonl`` of all four."""
    root = tmp_path_factory.mktemp("moe-resume")
    first: dict[int, list[list[str]]] = {1: [], 2: [], 3: []}
    second: dict[int, list[list[str]]] = {1: [], 2: [], 3: []}
    run = {
        **{"data-path": str(documents), "device": "cpu", "micro-batch-size": 2, "global-batch-size": 8},
        **{"train-iters": 4, "lr": 1e-2, "eval-iters": 0, "log-interval": 1},
    }
    for name, (ranks, options) in {**LAYOUTS, **WITHOUT}.items():
        whole = {"metrics-file": str(root / f"{name}-whole.jsonl")}
        if name in (*SAVED, *WITHOUT):
            first[ranks].append(["pretrain", *flags({**MODEL, **run, **options, **whole})])
            save = {"save": str(root / name / "save"), "exit-interval": 2}
            first[ranks].append(["pretrain", *flags({**MODEL, **run, **options, **save})])
        layout = {key: 1 for key in (*EP, "tensor-model-parallel-size", "pipeline-model-parallel-size")}
        layout = {**layout, "moe-experts-backend": "auto", **options}
        for saved in [name] if name in WITHOUT else [saved for saved, loaded in PAIRS if loaded == name]:
            places = {
                "load": str(root / saved / "save"),
                "save": str(root / f"{saved}-{name}"),
                "metrics-file": str(root / f"{saved}-{name}.jsonl"),
            }
            second[ranks].append(["pretrain", *flags({**places, **layout}), *_off(options)])
    for launch in (first, second):
        for ranks, cases in launch.items():
            run_cases(ranks, cases, timeout=900)
    return root


def _off(options: dict[str, object]) -> list[str]:
    """Layout fields come from the checkpoint, so what the next layout lacks is switched off."""
    words = [] if "sequence-parallel" in options else ["--no-sequence-parallel"]
    words += [] if PLAIN.keys() <= options.keys() else ["--use-distributed-optimizer"]
    return words if "expert-tensor-parallel-size" in options else [*words, "--expert-tensor-parallel-size", "null"]


@pytest.mark.parametrize("layout", [*SAVED, *WITHOUT])
def test_resume_is_bit_exact_on_the_same_layout(root: Path, layout: str) -> None:
    whole, rest = (read_metrics(root / f"{layout}-{part}.jsonl") for part in ("whole", layout))
    assert len(rest) == 2
    names = ("iteration", "lm_loss", "grad_norm", "learning_rate", "z_loss", "tokens_per_expert")
    assert [[line[n] for n in names] for line in whole[2:]] == [[line[n] for n in names] for line in rest]


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_resume_under_another_layout(root: Path, saved: str, loaded: str) -> None:
    whole, rest = read_metrics(root / "single-whole.jsonl"), read_metrics(root / f"{saved}-{loaded}.jsonl")
    assert len(rest) == 2
    for one, two in zip(whole[2:], rest, strict=True):
        for name in ("lm_loss", "grad_norm", "seq_load_balancing_loss", "z_loss"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
        assert two["tokens_per_expert"] == one["tokens_per_expert"]


def test_expert_bias_is_updated_and_saved(root: Path) -> None:
    """Each step adds the rate for experts below the mean load and takes it from those above (arXiv 2408.15664)."""
    steps = read_metrics(root / "single-whole.jsonl")[:2]
    checkpoint = MegatronCheckpoint(root / "ep2" / "save")
    for layer in (3, 4):
        loads = torch.tensor([step["tokens_per_expert"][str(layer)] for step in steps], dtype=torch.float64)
        expected = RATE * torch.sign(loads.mean(dim=1, keepdim=True) - loads).sum(dim=0)
        key = f"decoder.layers.{layer - 1}.mlp.router.expert_bias"
        torch.testing.assert_close(checkpoint.read(key).double(), expected, atol=1e-7, rtol=0)
        assert expected.abs().max() > 0
