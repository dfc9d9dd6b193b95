"""Every parameter of every kind that a norm scheme has under tensor parallelism, through the real program.

For each: the same initial values, a gradient that is one rank's, one place in the norm that clips, one main replica in
the checkpoint, and the right weight-decay group. Tolerances are those of test_layout_parity.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phd_megatron.training.observers.gradient_dump import load_gradients

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(1200)

TOLERANCE = 1e-5
TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
ONE_GROUP: dict[str, object] = {"num-query-groups": 1}  # fewer KV heads than tensor-parallel ranks
MODELS: dict[str, dict[str, object]] = {
    **{
        scheme: {"norm-scheme": scheme}
        for scheme in ("pre", "post", "hybrid_star", "hybrid_star_7b", "post_pre", "pre_qkvc_post", "embed_norm")
    },
    "olmo2": {"norm-scheme": "olmo2", "normalization": "LayerNorm"},
    "biases": {
        "norm-scheme": "hybrid_star",
        "normalization": "LayerNorm",
        "add-bias-linear": True,
        "untie-embeddings-and-output-weights": True,
    },
    "decay_norms": {"norm-scheme": "hybrid_star", "decay-norms": True, "phd-copy-embedding": "vector"},
    "told apart": {"norm-scheme": "pre", "phd-copy-positions": "repeated", "phd-copy-embedding": "vector"},
}
#: layout -> ranks, options, and the layout whose numbers it must give
LAYOUTS: dict[str, tuple[int, dict[str, object], str]] = {
    "single": (1, {}, "single"),
    "single, 1 group": (1, ONE_GROUP, "single, 1 group"),
    "tp2": (2, TP2, "single"),
    "tp2+sp": (2, {**TP2, "sequence-parallel": True}, "single"),
    "tp2, 1 group": (2, {**TP2, **ONE_GROUP}, "single, 1 group"),
    "tp2+sp, 1 group": (2, {**TP2, **ONE_GROUP, "sequence-parallel": True}, "single, 1 group"),
}


@pytest.fixture(scope="module")
def root(documents: Path, torchrun: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``<layout>/<model>/`` of every case; one launch a world size."""
    root = tmp_path_factory.mktemp("audit")
    for world in (1, 2):
        cases = []
        for layout, (ranks, options, _) in LAYOUTS.items():
            for name, model in MODELS.items() if ranks == world else ():
                directory = root / layout / name
                run: dict[str, object] = {
                    **TINY_MODEL,
                    "phd-repeat": 2,
                    "phd-window": 5,
                    "phd-chunk": 8,
                    "data-path": documents,
                    "micro-batch-size": 2,
                    "global-batch-size": 4,
                    "train-iters": 1,
                    "eval-iters": 0,
                    "log-interval": 1,
                    "device": "cpu",
                    "metrics-file": directory / "metrics.jsonl",
                    "dump-gradients-dir": directory / "gradients",
                }
                cases.append([str(directory), ["pretrain", *flags({**run, **model, **options})]])
        path = root / f"cases-{world}.json"
        path.write_text(json.dumps(cases), encoding="utf-8")
        torchrun(world, Path(__file__).with_name("audit_cases.py"), path, timeout=600)
    return root


@dataclass
class Whole:
    """One parameter put together from the slices of all ranks; the counts are per element."""

    value: torch.Tensor
    main_replicas: torch.Tensor
    in_clip_norm: torch.Tensor
    decayed: set[bool]
    dimensions: int


def read(directory: Path) -> dict[str, Whole]:
    """Checkpoint name -> the parameter; slices that lie on several ranks must have one value."""
    whole: dict[str, Whole] = {}
    for path in sorted(directory.glob("rank_*.json")):
        values = load_file(path.with_suffix(".safetensors"))
        for number, row in enumerate(json.loads(path.read_text("utf-8"))):
            value = values[str(number)]
            prepended = len(row["shape"]) - value.dim()
            empty = torch.zeros(row["shape"])
            entry = whole.setdefault(
                row["key"],
                Whole(torch.full_like(empty, torch.nan), empty.clone(), empty.clone(), set(), value.dim()),
            )
            sizes = [1] * prepended + list(value.shape)
            place = tuple(slice(o, o + n) for o, n in zip(row["offset"], sizes, strict=True))
            there = entry.value[place]
            assert bool(torch.isnan(there).all()) or torch.equal(there, value.view(sizes)), row["key"]
            entry.value[place] = value.view(sizes)
            entry.main_replicas[place] += row["main"]
            entry.in_clip_norm[place] += row["counted"]
            entry.decayed.add(row["decayed"])
    return whole


CASES = [(layout, model) for layout in LAYOUTS for model in MODELS]


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_parameters_are_initialised_saved_and_counted_once(root: Path, layout: str, model: str) -> None:
    reference = read(root / LAYOUTS[layout][2] / model)
    found = read(root / layout / model)
    assert found.keys() == reference.keys() and len(found) > 20
    for key, parameter in found.items():
        assert torch.equal(parameter.value, reference[key].value), f"{key} starts elsewhere than on one rank"
        assert bool((parameter.main_replicas == 1).all()), f"{key} is not saved exactly once"
        assert bool((parameter.in_clip_norm == 1).all()), f"{key} is not counted exactly once in the clip norm"
        decays = (parameter.dimensions > 1 or model == "decay_norms") and key != "copy_embedding.weight"
        assert parameter.decayed == {decays}, f"{key} is in the wrong weight-decay group"


@pytest.mark.parametrize(("layout", "model"), [(layout, model) for layout, model in CASES if LAYOUTS[layout][0] > 1])
def test_gradients_and_clip_norm_are_those_of_one_rank(root: Path, layout: str, model: str) -> None:
    reference, other = root / LAYOUTS[layout][2] / model, root / layout / model
    gradients, others = (load_gradients(path / "gradients" / "iter_0000001") for path in (reference, other))
    assert gradients.keys() == others.keys() == read(other).keys()
    norms = {key: gradient.double().norm() for key, gradient in gradients.items()}
    assert all(norm > 0 for norm in norms.values()), "a gradient of zero shows nothing"
    total = torch.stack([*norms.values()]).norm()
    for path in (reference, other):
        assert read_metrics(path / "metrics.jsonl")[0]["grad_norm"] == pytest.approx(float(total), rel=TOLERANCE)
    errors = {
        key: float((others[key] - gradient).double().norm() / max(norms[key], 1e-6 * total))
        for key, gradient in gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.2e}"
