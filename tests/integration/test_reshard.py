"""A checkpoint saved under any layout goes on under any other as if nothing had happened.

Each layout of ``SAVED`` trains three steps and saves; each of ``LOADED`` takes each of those checkpoints, optimizer
state included, and trains three more. Their losses, gradient norms and learning rates are those of one run of six steps
on one rank: so the order of the samples goes on too, whatever the number of data-parallel ranks was and is.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(1200)

STEPS, INTERRUPTED = 6, 3
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
PP2: dict[str, object] = {"pipeline-model-parallel-size": 2}
SP: dict[str, object] = {"sequence-parallel": True}
OVERLAP: dict[str, object] = {"overlap-grad-reduce": True, "overlap-param-gather": True, "ddp-bucket-size": 3000}
PLAIN_OPTIMIZER: dict[str, object] = {"use-distributed-optimizer": False}
#: every option of a layout or of saving that a table below may change. A load takes from the checkpoint what is not
#: given, so it is given all.
DEFAULTS: dict[str, object] = {
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "sequence-parallel": False,
    "overlap-grad-reduce": False,
    "overlap-param-gather": False,
    "ddp-bucket-size": "null",
    "use-distributed-optimizer": True,
    "save": "null",
    "save-interval": "null",
    "async-save": False,
}
Layouts = dict[str, tuple[int, dict[str, object]]]
#: layout -> ranks, options
SAVED: Layouts = {
    "single": (1, {}),
    "tp2+sp": (2, {**TP2, **SP}),
    "dp2+overlap+async": (2, {**OVERLAP, "save-interval": 3, "async-save": True}),
    "dp2+no-distopt": (2, PLAIN_OPTIMIZER),
    "tp2+pp2": (4, {**TP2, **PP2}),
}
LOADED: Layouts = {
    "single+no-distopt": (1, PLAIN_OPTIMIZER),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, {}),
    "dp4+overlap": (4, OVERLAP),
    "tp2+sp+dp2": (4, {**TP2, **SP}),
}
WORLDS = (1, 2, 4)
NAMES = ("iteration", "consumed_samples", "learning_rate", "global_batch_size")


def start(root: Path, data: Path, case: str, **changes: object) -> list[str]:
    options: dict[str, object] = {
        **TINY_MODEL,
        "norm-scheme": "hybrid_star",
        "phd-repeat": 2,
        "phd-window": 5,
        "phd-chunk": 8,
        "data-path": data,
        "micro-batch-size": 2,
        "global-batch-size": 8,
        "train-iters": STEPS,
        "lr": 1e-2,
        "eval-iters": 0,
        "log-interval": 1,
        "device": "cpu",
        "metrics-file": root / f"{case}.jsonl",
        **DEFAULTS,
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    switched_off = {f"no-{name}": True for name, value in options.items() if value is False}
    return ["pretrain", *flags({name: value for name, value in options.items() if value is not False} | switched_off)]


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the metrics of every case; two launches of each world size."""
    root = tmp_path_factory.mktemp("reshard")
    for world in WORLDS:
        cases = [
            start(root, documents, name, save=root / name, **{"exit-interval": INTERRUPTED, **options})
            for name, (ranks, options) in SAVED.items()
            if ranks == world
        ]
        run_cases(world, cases + ([start(root, documents, "whole")] if world == 1 else []))
    for world in WORLDS:
        cases = [
            start(root, documents, f"{source}-to-{name}", load=root / source, **options)
            for name, (ranks, options) in LOADED.items()
            if ranks == world
            for source in SAVED
        ]
        run_cases(world, cases)
    return root


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("source", SAVED)
def test_run_goes_on_under_another_layout(root: Path, source: str, name: str) -> None:
    whole = read_metrics(root / "whole.jsonl")[INTERRUPTED:]
    continued = read_metrics(root / f"{source}-to-{name}.jsonl")
    assert [line["iteration"] for line in continued] == [*range(INTERRUPTED + 1, STEPS + 1)]
    for expected, found in zip(whole, continued, strict=True):
        assert {key: found[key] for key in NAMES} == {key: expected[key] for key in NAMES}
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=LOSS_TOLERANCE)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=GRADIENT_TOLERANCE)


def test_the_tolerance_would_show_lost_moments_or_another_order(root: Path) -> None:
    """Losses of two steps differ by far more than the tolerance, and so do two orders of the samples."""
    losses = [line["lm_loss"] for line in read_metrics(root / "whole.jsonl")]
    assert all(abs(one / two - 1) > 1e3 * LOSS_TOLERANCE for one, two in itertools.pairwise(losses))


def test_layouts_are_what_their_names_say(root: Path) -> None:
    """No two checkpoints come from the same layout, so an option that is ignored would show."""
    facts = []
    for name, (ranks, _) in SAVED.items():
        (path,) = (root / name).glob("iter_*/training_state.json")
        layout = json.loads(path.read_text("utf-8"))["layout"]
        assert layout["world_size"] == ranks
        facts.append(tuple(layout.values()))
    assert len(set(facts)) == len(facts)
