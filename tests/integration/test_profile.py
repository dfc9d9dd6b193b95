"""``--profile`` in the real program: traces of the ranks and steps that were asked for, and the same losses."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from phd_megatron.cli.main import main

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(600)


def arguments(data: Path, directory: Path, **more: object) -> list[str]:
    options = {
        **TINY_MODEL,
        "phd-repeat": 2,
        "norm-scheme": "hybrid_star",
        "data-path": data,
        "global-batch-size": 4,
        "train-iters": 5,
        "eval-iters": 0,
        "log-interval": 1,
        "device": "cpu",
        "save": directory / "save",
        "metrics-file": directory / "metrics.jsonl",
    }
    return ["pretrain", *flags(options | {name.replace("_", "-"): value for name, value in more.items()})]


def names_in(trace: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}


def test_traces_of_two_ranks(run_cases: Callable[..., str], documents: Path, tmp_path: Path) -> None:
    """Steps 3 and 4 of five, on rank 1, then a stop within the steps, on both; against a run without the profiler."""
    traced = {"profile": True, "profile_step_start": 2, "profile_step_end": 4}
    both = {**traced, "profile_ranks": [0, 1], "profile_dir": tmp_path / "t", "exit_interval": 3}
    cases = [
        arguments(documents, tmp_path / "plain"),
        arguments(documents, tmp_path / "one", **traced, profile_ranks=1),
        arguments(documents, tmp_path / "both", **both),
    ]
    said = run_cases(2, cases)

    one = tmp_path / "one/save/profile"
    assert sorted(path.name for path in one.iterdir()) == [
        "steps_3-4_rank_1.operations.json",
        "steps_3-4_rank_1.pt.trace.json.gz",
    ]
    names = names_in(one / "steps_3-4_rank_1.pt.trace.json.gz")
    assert {name for name in names if name.startswith("training step")} == {"training step 3", "training step 4"}
    assert "aten::mm" in names and any("allreduce" in name or "reduce_scatter" in name for name in names)

    report = json.loads((one / "steps_3-4_rank_1.operations.json").read_text())
    rows = report["operations"]
    assert (report["rank"], report["steps"]) == (1, [3, 4])
    assert [row["self_cpu_ms"] for row in rows] == sorted((row["self_cpu_ms"] for row in rows), reverse=True)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert all(row["calls"] % 2 == 0 for row in rows if row["name"] == "aten::mm")
    assert f"traced steps 3 to 4 of rank 1: {one}" in said
    assert re.search(r"\d+\.\d\d +\d+\.\d% +\d+ +" + re.escape(rows[0]["name"]), said)

    assert {path.name for path in (tmp_path / "t").glob("*.gz")} == {
        f"steps_3-3_rank_{rank}.pt.trace.json.gz" for rank in (0, 1)
    }
    losses = {
        name: [(line["lm_loss"], line["grad_norm"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "one", "both")
    }
    assert losses["one"] == losses["plain"] and losses["both"] == losses["plain"][:3]
    assert len(losses["plain"]) == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "profile_step_end=12 is beyond train_iters=5; lower profile_step_start=10"),
        ({"train_samples": 20}, "profile_step_end=12 is beyond the 5 steps of the run"),
        ({"profile_step_start": 3, "profile_step_end": 3}, "profile_step_end=3 is not after profile_step_start=3"),
        ({"profile_step_end": 2, "profile_step_start": -1}, "profile_step_start=-1 is out of range"),
        ({"profile_step_start": 1, "profile_step_end": 2, "profile_ranks": 1}, "there is no rank 1, the run has 1"),
    ],
    ids=["train-iters", "train-samples", "order", "negative", "rank"],
)
def test_bad_input(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, object], message: str
) -> None:
    argv = arguments(documents, tmp_path, profile=True, **more)
    if "train_samples" in more:
        del argv[argv.index("--train-iters") : argv.index("--train-iters") + 2]
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_place_is_needed(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(documents, tmp_path, profile=True, profile_step_start=1, profile_step_end=2)
    del argv[argv.index("--save") : argv.index("--save") + 2]
    assert main(argv) == 2
    assert "profile=True without a place for the traces; set profile_dir, or save" in capsys.readouterr().err


def test_a_resume_behind_the_steps_says_so(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "save"
    traced = {"profile": True, "profile_step_start": 0, "profile_step_end": 1, "load": save}
    assert main(arguments(documents, tmp_path, **traced, exit_interval=2)) == 0
    report = save / "profile/steps_1-1_rank_0.operations.json"
    report.unlink()
    capsys.readouterr()
    assert main(arguments(documents, tmp_path, **traced)) == 0
    assert "nothing is profiled, step 1 (profile_step_end) was before iteration 2" in capsys.readouterr().out
    assert not report.exists()
    # Nothing of it is inherited: the checkpoint's configuration does not profile the next start.
    assert main(arguments(documents, tmp_path, load=save, train_iters=6)) == 0
    assert "profiled" not in capsys.readouterr().out
