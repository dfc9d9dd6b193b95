"""``--log-layer-statistics`` through the real program: one rank's numbers in every layout, and no other losses.

Tolerance (all cases): 1e-5 relative in float32, Frobenius norm over the layers, as in ``test_layout_parity.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.parity.compare import FLOAT32, HALF
from phd_megatron.parity.runs import ADAM_EPS
from phd_megatron.training.observers.gradient_dump import load_gradients
from phd_megatron.training.observers.layer_statistics import ATTENDED, STATISTICS

from .conftest import TINY_MODEL, flags, read_metrics

Options = dict[str, object]
LENGTH = 48  # slices of 12 tokens with two context-parallel ranks; windows reach across them
LAYERS = int(TINY_MODEL["num-layers"])
EXPERTS: Options = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"},
    **{"moe-token-dispatcher-type": "alltoall", "moe-router-load-balancing-type": "aux_loss"},
    **{"moe-aux-loss-coeff": 0.1, "moe-layer-freq": [0, 1, 1, 1]},
    # With the default one, two scores of a token are equal to the last bit in the second step on some machines, and
    # which of the two experts the balancing loss counts is a matter of rounding. Here no two come closer than 1e-5.
    "seed": 7,
}
MODELS: dict[str, Options] = {
    "k1": {"norm-scheme": "hybrid_star"},
    "k2": {"norm-scheme": "hybrid_star", "phd-repeat": 2},
    "k2-apart": {"norm-scheme": "hybrid_star", "phd-repeat": 2, "reset-attention-mask": True},
    "moe-k1": EXPERTS,
    "moe-k2": {**EXPERTS, "norm-scheme": "hybrid_star", "phd-repeat": 2},
}
TP: Options = {"tensor-model-parallel-size": 2}
SP: Options = {**TP, "sequence-parallel": True}
PP: Options = {"pipeline-model-parallel-size": 2}
CP: Options = {"context-parallel-size": 2}
EP: Options = {"expert-model-parallel-size": 2}
FULL: Options = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
CORE: Options = {"recompute-granularity": "selective", "recompute-modules": "core_attn"}
OFF: Options = {"log-layer-statistics": 0}
DENSE, MOE = ("k1", "k2"), ("moe-k1", "moe-k2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...], Options]] = {
    "single": (1, tuple(MODELS), {}),
    "single off": (1, ("k2", "moe-k2"), OFF),
    "recompute": (1, ("k2", "moe-k2"), FULL),
    "core recompute": (1, ("k2",), CORE),
    "bf16": (1, ("k2",), {"bf16": True}),
    "fp16": (1, ("k2",), {"fp16": True, "initial-loss-scale": 2**32, "train-iters": 40, "log-layer-statistics": 1}),
    "tp2": (2, ("k2",), TP),
    "tp2+sp": (2, DENSE, SP),
    "tp2+sp off": (2, ("k2",), {**SP, **OFF}),
    "pp2": (2, DENSE, PP),
    "pp2+vpp2+recompute": (2, ("k2",), {**PP, **FULL, "num-layers-per-virtual-pipeline-stage": 1}),
    "cp2": (2, (*DENSE, "k2-apart"), CP),
    "cp2 off": (2, ("k2",), {**CP, **OFF}),
    "dp2+no-distopt": (2, ("k2",), {"no-use-distributed-optimizer": True}),
    "ep2": (2, MOE, EP),
    "ep2 off": (2, ("moe-k2",), {**EP, **OFF}),
    "tp2+sp+etp1": (2, ("moe-k2",), {**SP, "expert-tensor-parallel-size": 1}),
}
BIGGER: dict[str, tuple[int, tuple[str, ...], Options]] = {
    "cp2+tp2+sp": (4, DENSE, {**CP, **SP}),
    "cp2+tp2": (4, ("k2",), {**CP, **TP}),
    "cp2+pp2+p2p": (4, ("k2",), {**CP, **PP, "cp-comm-type": "p2p"}),
    "tp4 beyond the KV heads": (4, ("k2",), {"tensor-model-parallel-size": 4, "sequence-parallel": True}),
    "lone head": (4, ("k2",), {"pipeline-model-parallel-size": 4, "pipeline-model-parallel-layout": "Et|tt|t|L"}),
    "tp2+sp+ep2": (4, MOE, {**SP, **EP}),
    "pp2+ep2+overlap": (4, MOE, {**PP, **EP, "overlap-grad-reduce": True, "overlap-param-gather": True}),
    "dp2+pp2, buckets": (4, DENSE, {**PP, "overlap-grad-reduce": True, "ddp-bucket-size": 3000}),
}
OTHER_NUMBERS = ("bf16", "fp16")


def run_layouts(layouts: dict[str, Any], root: Path, corpus: Path, documents: Path, run_cases: Any) -> None:
    """``root/<layout>/<model>/{metrics.jsonl,gradients/}``; one launch a world size."""
    for world_size in sorted({ranks for ranks, _, _ in layouts.values()}):
        cases = []
        for layout, (ranks, models, options) in layouts.items():
            for name in models if ranks == world_size else ():
                directory = root / layout / name
                run: Options = {
                    **{"seq-length": LENGTH, "phd-window": 5, "phd-chunk": 32},
                    "data-path": str(documents if "apart" in name else corpus),
                    **{"micro-batch-size": 2, "global-batch-size": 8, "train-iters": 3, "lr": 1e-2, "eval-iters": 0},
                    **{"log-interval": 1, "metrics-file": str(directory / "metrics.jsonl"), "device": "cpu"},
                    # Else the first update multiplies the rounding of gradients near 0, and the second step shows it.
                    "adam-eps": ADAM_EPS,
                    **{"log-layer-statistics": 2, "dump-gradients-dir": str(directory / "gradients")},
                }
                cases.append(["pretrain", *flags({**TINY_MODEL, **run, **MODELS[name], **options})])
        run_cases(world_size, cases)


@pytest.fixture(scope="module")
def results(corpus: Path, documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layer_statistics")
    run_layouts(LAYOUTS, root, corpus, documents, run_cases)
    return root


def statistics(directory: Path, lone_head: bool = False) -> dict[int, dict[str, list[float]]]:
    """By step and name, from the first layer to the last; every layer has each value that there is for it."""
    has_copies = "phd-repeat" in MODELS[directory.name]
    found = {}
    for step in read_metrics(directory / "metrics.jsonl"):
        if "layer_statistics" in step:
            tables: Any = step["layer_statistics"]
            assert list(tables) == list(STATISTICS if has_copies else STATISTICS[:5])
            for name, table in tables.items():
                missing = name == "copy_cosine" and not lone_head  # the last layer drops the copies
                assert list(table) == [str(n) for n in range(1, LAYERS + 1 - missing)]
            found[int(step["iteration"])] = {name: list(table.values()) for name, table in tables.items()}
    return found


def worst(reference: Path, other: Path) -> float:
    """Largest relative error of a statistic of any step."""
    expected, found = statistics(reference), statistics(other, lone_head=other.parent.name == "lone head")
    assert list(expected) == list(found) == [1, 2]
    errors = []
    for step, tables in expected.items():
        for name, values in tables.items():
            one = torch.tensor(values, dtype=torch.float64)
            two = torch.tensor(found[step][name][: len(one)], dtype=torch.float64)
            errors.append(float((one - two).norm() / one.norm()))
    assert all(map(math.isfinite, errors))
    return max(errors)


SAME = [
    (layout, model)
    for layout, (_, models, _) in LAYOUTS.items()
    for model in models
    if layout != "single" and not layout.endswith("off") and layout not in OTHER_NUMBERS
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("layout", "model"), SAME)
def test_layout_gives_the_statistics_of_one_rank(results: Path, layout: str, model: str) -> None:
    error = worst(results / "single" / model, results / layout / model)
    print(f"{layout}, {model}: {error:.1e}")
    assert error < FLOAT32.value


@pytest.mark.parametrize("model", MODELS)
def test_gradient_norms_are_those_of_all_parameters_of_a_layer(results: Path, model: str) -> None:
    """From the gradients that the run wrote; and the values are of a kind that they can be."""
    directory = results / "single" / model
    gradients = load_gradients(directory / "gradients" / "iter_0000001")
    tables = statistics(directory)[1]
    for layer, norm in enumerate(tables["gradient_norm"]):
        parts = [g.double().norm() for key, g in gradients.items() if key.startswith(f"decoder.layers.{layer}.")]
        assert norm == pytest.approx(float(torch.stack(parts).norm()), rel=1e-6)
    assert len(set(tables["gradient_norm"])) == LAYERS
    assert all(0 < share <= 1 for share in tables["attention_entropy_share"])
    assert all(-1 / (LENGTH - 1) <= cosine <= 1 for cosine in tables["cosine_similarity"])
    if "phd-repeat" in MODELS[model]:
        shares = [tables[name] for name in ATTENDED]
        assert all(0 < share < 1 for values in shares for share in values)
        assert [sum(values) for values in zip(*shares, strict=True)] == pytest.approx([1] * LAYERS, rel=1e-6)
        assert all(0 < cosine < 1 for cosine in tables["copy_cosine"])


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.endswith("off")])
def test_training_is_bit_equal_without(results: Path, layout: str) -> None:
    for model in LAYOUTS[layout][1]:
        off = read_metrics(results / layout / model / "metrics.jsonl")
        on = read_metrics(results / layout.removesuffix(" off") / model / "metrics.jsonl")
        assert not any("layer_statistics" in step for step in off)
        assert [(s["lm_loss"], s["grad_norm"]) for s in on] == [(s["lm_loss"], s["grad_norm"]) for s in off]


def test_bfloat16_is_close(results: Path) -> None:
    assert worst(results / "single" / "k2", results / "bf16" / "k2") < HALF.value


def test_float16_gradients_are_without_the_loss_scale(results: Path) -> None:
    """Steps are skipped until the scale fits; then the layers' norms are parts of the whole model's."""
    steps = read_metrics(results / "fp16" / "k2" / "metrics.jsonl")
    tables = statistics(results / "fp16" / "k2")
    applied = [step for step in steps if not step["skipped_iterations"]]
    assert 0 < len(applied) < len(steps)
    for step in applied:
        norm = math.hypot(*tables[int(step["iteration"])]["gradient_norm"])
        assert 0.1 * step["grad_norm"] < norm <= step["grad_norm"] * (1 + HALF.value)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_bigger_layouts(results: Path, corpus: Path, documents: Path, run_cases: Any, tmp_path: Path) -> None:
    run_layouts(BIGGER, tmp_path, corpus, documents, run_cases)
    for layout, (_, models, _) in BIGGER.items():
        for model in models:
            error = worst(results / "single" / model, tmp_path / layout / model)
            print(f"{layout}, {model}: {error:.1e}")
            assert error < FLOAT32.value, (layout, model)
