"""The real ``phd-megatron sweep``: members that finish, diverge, fail and are killed; its report; ``compare``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.sweep.process import present_status
from phd_megatron.sweep.store import Store, open_store

from .conftest import ROOT, program_environment, read_metrics, run_program

pytestmark = pytest.mark.timeout(600)

PATIENCE = 400.0  # seconds for anything to happen on a busy machine

BASE = """
title: Micro
unit: nats per byte
base:
  preset: tiny-moe
  model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, kv_channels: 8, seq_length: 24, moe_ffn_hidden_size: 16}
  training: {micro_batch_size: 4, global_batch_size: 4, eval_interval: 6, eval_iters: 1}
  logging: {log_interval: 1, log_layer_statistics: 4}
"""

MIXED = f"""{BASE}
  tokens: 1100
grid:
  norm_scheme: [pre, hybrid_star]
  seed: [1]
members:
  - {{name: shorter, norm_scheme: pre, seed: 1, tokens: 500}}
  - {{name: diverges, norm_scheme: pre, seed: 1, lr: 1.0e+30}}
  - {{name: broken, norm_scheme: pre, seed: 2, phd_repeat: 2}}
baseline: {{norm_scheme: pre}}
launcher: {{parallel: 2}}
"""

LONG = f"""{BASE.replace("micro_batch_size: 4, global_batch_size: 4", "micro_batch_size: 4, global_batch_size: 8")}
  parallel: {{expert_model_parallel_size: 2}}
  tokens: 1920000
grid: {{seed: [1]}}
launcher: {{ranks: 2}}
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> tuple[Path, Any]:
    """A sweep after its first start. ``broken`` cannot save, since a file lies where its checkpoints go."""
    directory = tmp_path_factory.mktemp("sweep")
    (directory / "sweep.yaml").write_text(MIXED)
    obstacle = directory / "out/members/broken/checkpoints"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    return directory, start(directory, documents)


def start(directory: Path, documents: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--config", directory / "sweep.yaml", "--output", directory / "out", "--data-path", documents)
    return run_program("sweep", *arguments, *more)


def states(directory: Path) -> dict[str, str]:
    store = open_store(directory / "out")
    return {entry.name: store.status(entry.name).state for entry in store.entries}


def test_one_members_trouble_is_not_the_others(mixed: tuple[Path, Any]) -> None:
    directory, done = mixed
    assert done.returncode == 1, done.stdout
    assert states(directory) == {
        "pre-seed1": "finished",
        "hybrid_star-seed1": "finished",
        "shorter": "finished",
        "diverges": "diverged",
        "broken": "failed",
    }
    assert "3 of 5 members finished" in done.stdout
    assert re.search(r"^diverges: diverged: .*gradient norm of iteration \d+ is (nan|inf)", done.stdout, re.MULTILINE)
    assert re.search(r"^broken: failed: .*checkpoints", done.stdout, re.MULTILINE)


def test_members_are_ordinary_runs_on_the_same_samples(mixed: tuple[Path, Any]) -> None:
    import yaml

    home = mixed[0] / "out/members"
    configs = {path.name: yaml.safe_load((path / "run.yaml").read_text()) for path in home.iterdir()}
    assert {config["data"]["data_horizon_samples"] for config in configs.values()} == {48}  # 1100 tokens, 12 batches
    assert configs["shorter"]["training"]["train_samples"] == 24
    steps = read_metrics(home / "pre-seed1/metrics.jsonl")
    assert steps[-1]["consumed_samples"] == 48
    assert steps[-1]["consumed_tokens"] == 48 * 24
    plan = open_store(mixed[0] / "out").entry("pre-seed1").plan
    assert steps[-1]["consumed_flops"] == plan["flops"]
    # Before the first update the models are equal, so equal losses are equal samples.
    assert read_metrics(home / "shorter/metrics.jsonl")[0]["lm_loss"] == steps[0]["lm_loss"]
    other = read_metrics(home / "hybrid_star-seed1/metrics.jsonl")
    assert other[0]["lm_loss"] != steps[0]["lm_loss"]


def test_report_and_comparison(mixed: tuple[Path, Any]) -> None:
    directory = mixed[0]
    done = run_program("sweep", "report", directory / "out")
    assert done.returncode == 0, done.stdout
    text = (directory / "out/report/report.md").read_text()
    for heading in ("Members", "Loss curves", "Final losses", "Differences from the baseline", "Statistics by layer"):
        assert f"## {heading}" in text
    assert "## Experts" in text
    assert "at steps 1, 4; mean over seeds" in text  # the shorter member has 6 steps
    last = read_metrics(directory / "out/members/hybrid_star-seed1/metrics.jsonl")[-1]
    assert f"| hybrid_star | 1 | {last['validation_loss']:.4f} | one seed |" in text
    assert "diverges has not finished (diverged" in text
    assert "one seed: no statement" in text
    page = (directory / "out/report/report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == len(list((directory / "out/report").glob("*.svg"))) == 9
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    home = directory / "out/members"
    done = run_program(
        "compare", home / "pre-seed1", f"other={home / 'hybrid_star-seed1/metrics.jsonl'}", "--output", directory / "c"
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"original tokens +1152 ", done.stdout)
    assert (directory / "c/compare.png").stat().st_size > 5000


def test_a_second_start_trains_what_is_left_here_in_the_script_for_slurm(
    mixed: tuple[Path, Any], documents: Path
) -> None:
    directory = mixed[0]
    (directory / "out/members/broken/checkpoints").unlink()
    before = {path: path.stat().st_mtime_ns for path in directory.glob("out/members/*/metrics.jsonl")}
    done = start(directory, documents, "--launcher", "slurm", "--print")
    assert "4 of 5 members have ended and are skipped" in done.stdout
    script = directory / "out/slurm.sbatch"
    assert "#SBATCH --array=0-0%2" in script.read_text()
    environment = {**program_environment(), "SLURM_ARRAY_TASK_ID": "0"}
    task = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert task.returncode == 0, task.stdout + task.stderr
    assert states(directory)["broken"] == "finished"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_member_that_began_keeps_its_configuration(mixed: tuple[Path, Any], documents: Path) -> None:
    done = start(mixed[0], documents, "--weight-decay", "0.2")
    assert done.returncode == 2
    assert "has begun with another configuration (weight_decay: 0.1 -> 0.2)" in done.stdout


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "nothing happened"
        assert process.poll() is None, "it has ended"
        time.sleep(0.1)


def steps_of(store: Store, name: str) -> list[int]:
    path = store.home(name) / "metrics.jsonl"
    return [int(step["iteration"]) for step in read_metrics(path)] if path.exists() else []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a child that follows its parent is Linux's")
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path, documents: Path) -> None:
    """Two ranks under torchrun; the sweep is killed, and refused to a rival before that."""
    (tmp_path / "sweep.yaml").write_text(LONG)
    arguments = ["sweep", "--config", tmp_path / "sweep.yaml", "--output", tmp_path / "out", "--data-path", documents]
    process = subprocess.Popen(
        [sys.executable, "-m", "phd_megatron", *map(str, arguments)],
        cwd=ROOT,
        env=program_environment(),
    )
    out = tmp_path / "out"
    try:
        wait_for(lambda: (out / "plan.json").exists() and len(steps_of(open_store(out), "seed1")) > 5, process)
        rival = run_program(*arguments)
        assert rival.returncode == 2
        assert "a sweep is already at work" in rival.stdout
    finally:
        process.kill()
        process.wait()
    store = open_store(out)
    deadline = time.monotonic() + PATIENCE
    saved = store.home("seed1") / "checkpoints/latest_checkpointed_iteration.txt"
    while not saved.exists():
        assert time.monotonic() < deadline, (store.home("seed1") / "log.txt").read_text()
        time.sleep(0.1)
    assert store.status("seed1").state == "running"  # what a killed sweep leaves behind
    assert present_status(store, "seed1").state == "stopped"
    begun = steps_of(store, "seed1")

    process = subprocess.Popen(
        [sys.executable, "-m", "phd_megatron", *map(str, arguments)], cwd=ROOT, env=program_environment()
    )
    try:
        wait_for(lambda: len(steps_of(store, "seed1")) > len(begun) + 5, process)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    assert store.status("seed1").state == "stopped"
    everything = steps_of(store, "seed1")
    assert everything == sorted(set(everything))  # no step was trained twice
    log = (store.home("seed1") / "log.txt").read_text()
    assert len(re.findall(r"received SIGTERM: saving", log)) >= 2
    assert json.loads((store.home("seed1") / "status.json").read_text())["starts"] == 2
