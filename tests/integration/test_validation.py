"""Validation in training: on which samples, where in the run, and what it says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.cli.main import main

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(600)

TOLERANCE = 1e-5  # float32, summed in another order
ALL = 103  # samples of the validation split
SAMPLES, PLACES = 40, 3
STILL: dict[str, dict[str, object]] = {
    "one": {"seed": 1, "eval_iters": 100},
    "two": {"seed": 2, "eval_iters": 100, "global_batch_size": 4, "num_workers": 1},
    "beyond": {"seed": 3, "eval_iters": 1, "global_batch_size": 128},
    "few": {"seed": 4, "eval_iters": 3, "micro_batch_size": 4},
    "cp": {"seed": 5, "eval_iters": 3, "context_parallel_size": 2},
}
EVALUATED = {"one": ALL, "beyond": ALL, "few": 24, "cp": 24}  # samples


def arguments(data: Path, root: Path, name: str, **more: object) -> list[str]:
    options = {
        **TINY_MODEL,
        **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 6, "data-path": data},
        **{"split": "90,10,0", "device": "cpu", "micro-batch-size": 2, "global-batch-size": 8, "log-interval": 1},
        **{"lr": 1e-2, "train-samples": SAMPLES, "metrics-file": root / f"{name}.jsonl"},
        **{key.replace("_", "-"): value for key, value in more.items()},
    }
    return ["pretrain", *flags(options)]


def validations(path: Path) -> dict[int, float]:
    """Consumed samples -> validation loss."""
    lines = read_metrics(path)
    return {
        int(line["consumed_samples"]): line["validation_loss"]
        for line in lines
        if line.get("validation_loss") is not None
    }


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    spread = {"evals_per_run": PLACES, "eval_iters": 2}
    half = {**spread, "save": root / "half"}
    run_cases(
        2,
        [
            arguments(documents, root, "whole", **spread, save=root / "save"),
            arguments(documents, root, "small-batch", **{**spread, "eval_iters": 4}, global_batch_size=4),
            arguments(documents, root, "half", **half, exit_interval=2),
        ],
    )
    # It goes on one step a start. Then steps that change nothing, so that one model is validated by runs of different
    # seeds, batches and workers.
    half_again = {"load": root / "half", "save": root / "half", "metrics-file": root / "half.jsonl"}
    resume = ["pretrain", *flags({**half_again, "exit-interval": 1})]
    start = {"load": root / "save", "finetune": True, "lr": 1e-30, "train_samples": 128, "eval_interval": 1000}
    runs = [
        arguments(documents, root, name, **{**start, "save": root / name, "save_interval": 10, **more})
        for name, more in STILL.items()
    ]
    (root / "said.txt").write_text(run_cases(2, [*[resume] * 3, *runs]))
    run_cases(
        1,
        [
            [
                *("evaluate", "--checkpoint", str(root / name), "--device", "cpu", "--num-samples", str(samples)),
                *("--json", str(root / f"{name}.json")),
            ]
            for name, samples in EVALUATED.items()
        ],
    )
    return root


def test_neither_seed_nor_batch_nor_workers_change_the_samples(root: Path) -> None:
    losses = {name: [*validations(root / f"{name}.jsonl").values()][-1] for name in ("one", "two", "beyond")}
    assert losses["two"] == pytest.approx(losses["one"], rel=TOLERANCE)
    assert losses["beyond"] == pytest.approx(losses["one"], rel=TOLERANCE)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluate_gives_the_validation_loss(root: Path, name: str) -> None:
    found = json.loads((root / f"{name}.json").read_text())
    assert found["samples"] == EVALUATED[name]
    assert [*validations(root / f"{name}.jsonl").values()][-1] == pytest.approx(found["loss"], rel=TOLERANCE)


def test_a_pass_that_is_shorter_than_asked_is_said(root: Path) -> None:
    said = [line for line in (root / "said.txt").read_text().splitlines() if "a validation reads" in line]
    assert [line.split("; ")[1] for line in said] == [
        "eval_iters=100 x global_batch_size=8 are 800",
        "eval_iters=100 x global_batch_size=4 are 400",
        "eval_iters=1 x global_batch_size=128 are 128",
    ]
    assert all(f"reads {ALL} samples, which is all that the validation split has" in line for line in said)


def test_validations_are_spread_over_the_run(root: Path) -> None:
    assert [*validations(root / "whole.jsonl")] == [16, 32, 40]  # from 13.3, 26.7 and 40 samples on
    assert [*validations(root / "small-batch.jsonl")] == [16, 28, 40]


def test_a_resume_neither_repeats_nor_misses_one(root: Path) -> None:
    lines = read_metrics(root / "half.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    assert validations(root / "half.jsonl") == validations(root / "whole.jsonl")


def test_more_validations_than_steps_are_refused(documents: Path, tmp_path: Path) -> None:
    done = run_program(*arguments(documents, tmp_path, "x", evals_per_run=6))
    assert done.returncode == 2 and "would reach two of them; ask for at most 5" in done.stdout
    done = run_program(*arguments(documents, tmp_path, "x", evals_per_run=2, eval_interval=1000))
    assert done.returncode == 2 and "exclude each other" in done.stdout


def test_a_validation_sees_the_step_before_it_when_parameters_are_gathered_late(
    documents: Path, run_cases: Any, tmp_path: Path
) -> None:
    """With overlap_param_gather a step leaves new parameters on the rank that updates them, until the next forward.

    A run of the plain optimizer holds all of them at once.
    """
    each = {"eval_interval": 1, "eval_iters": 1}
    late = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}
    run_cases(
        2,
        [
            arguments(documents, tmp_path, "late", **each, **late),
            arguments(documents, tmp_path, "plain", **each, no_use_distributed_optimizer=True, peak_tflops=1e-3),
        ],
    )
    assert main(arguments(documents, tmp_path, "alone", **each)) == 0
    names = ("late", "plain", "alone")
    found, expected, alone = (validations(tmp_path / f"{name}.jsonl") for name in names)
    trained = [[line["lm_loss"] for line in read_metrics(tmp_path / f"{name}.jsonl")] for name in names]
    assert expected == pytest.approx(alone, rel=TOLERANCE), "two ranks read other samples each, together those of one"
    assert trained[0] == pytest.approx(trained[2], rel=TOLERANCE)
    assert trained[1] == pytest.approx(trained[2], rel=TOLERANCE)
    assert [*found] == [*expected] == [8, 16, 24, 32, 40]
    assert found == pytest.approx(expected, rel=TOLERANCE)
    losses = [*expected.values()]
    assert all(abs(after - before) > 1e-2 for before, after in itertools.pairwise(losses)), "a stale one would show"
    for line in read_metrics(tmp_path / "plain.jsonl"):  # two ranks share the work
        flops = line["consumed_flops"] / line["consumed_samples"]
        assert line["tflops_per_gpu"] == pytest.approx(8 * flops / line["iteration_seconds"] / 2 / 1e12)
        assert line["mfu"] == pytest.approx(line["tflops_per_gpu"] / 1e-3)
        assert line["tokens_per_second"] == pytest.approx(8 * 24 / line["iteration_seconds"])
