"""A step whose gradient norm is above ``grad_norm_skip_threshold`` changes nothing, in every layout.

Collected where Megatron-Core has it (tests/conftest.py); `bash tests/run.sh --mcore 0.19.2` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(600)

STEPS = 8
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "single": (1, {}),
    "plain optimizer": (1, {"no-use-distributed-optimizer": True}),
    "dp2": (2, {"overlap-grad-reduce": True, "overlap-param-gather": True}),
    "tp2+sp": (2, {"tensor-model-parallel-size": 2, "sequence-parallel": True}),
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
}


def words(data: Path, metrics: Path, **options: object) -> list[str]:
    run = {
        **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 8, "data-path": data},
        **{"device": "cpu", "micro-batch-size": 2, "global-batch-size": 4, "train-iters": STEPS, "lr": 1e-2},
        **{"lr-decay-style": "linear", "eval-iters": 0, "log-interval": 1, "metrics-file": metrics},
    }
    return ["pretrain", *flags({**TINY_MODEL, **run, **options})]


@pytest.fixture(scope="module")
def still(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """A run that leaves out every step, so that each shows its batch's norm at the initial parameters."""
    metrics = tmp_path_factory.mktemp("still") / "metrics.jsonl"
    done = run_program(*words(documents, metrics, **{"grad-norm-skip-threshold": 1e-6}))
    assert done.returncode == 2, done.stdout
    said = f"none of {STEPS} steps changed the model: every gradient norm was above grad_norm_skip_threshold=1e-06"
    assert said in done.stdout
    return read_metrics(metrics)


@pytest.fixture(scope="module")
def limit(still: list[dict[str, float]]) -> float:
    """The smallest norm of a batch that is not the first: those before it are above."""
    return 1.001 * min(line["grad_norm"] for line in still[1:-1])


@pytest.fixture(scope="module")
def runs(documents: Path, run_cases: Any, limit: float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("skipped")
    ever = {"grad-norm-skip-threshold": 1e6}
    cases = {1: [words(documents, root / "ever.jsonl", **ever), words(documents, root / "all.jsonl")], 2: []}
    for name, (ranks, layout) in LAYOUTS.items():
        cases[ranks].append(words(documents, root / f"{name}.jsonl", **{"grad-norm-skip-threshold": limit}, **layout))
    for ranks, argvs in cases.items():
        run_cases(ranks, argvs)
    return root


def test_a_step_is_left_out_if_its_norm_is_above(runs: Path, still: list[dict[str, float]], limit: float) -> None:
    lines = read_metrics(runs / "single.jsonl")
    left_out = [line["grad_norm"] > limit for line in lines]
    assert [bool(line["skipped_iterations"]) for line in lines] == left_out
    first = left_out.index(False)
    for line, of_initial in zip(lines[: first + 1], still[: first + 1], strict=True):
        assert (line["lm_loss"], line["grad_norm"]) == (of_initial["lm_loss"], of_initial["grad_norm"])
    assert any(left_out) and lines[first + 1]["lm_loss"] != still[first + 1]["lm_loss"]
    done = 0  # the schedule goes by the steps that were taken
    for line, out in zip(lines, left_out, strict=True):
        done += not out
        assert line["learning_rate"] == pytest.approx(1e-2 * (1 - done / STEPS), abs=1e-12)


def test_a_limit_that_nothing_reaches_changes_nothing(runs: Path) -> None:
    ever, everything = (read_metrics(runs / f"{name}.jsonl") for name in ("ever", "all"))
    names = ("lm_loss", "grad_norm", "skipped_iterations")
    assert [[line[n] for n in names] for line in ever] == [[line[n] for n in names] for line in everything]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_leaves_out_the_same_steps(runs: Path, layout: str) -> None:
    expected, found = read_metrics(runs / "single.jsonl"), read_metrics(runs / f"{layout}.jsonl")
    for one, two in zip(expected, found, strict=True):
        assert two["skipped_iterations"] == one["skipped_iterations"]
        assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
