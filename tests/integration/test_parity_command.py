"""``phd-megatron parity`` as a program: what it says about good, broken, unfitting and unknown layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT, TINY_MODEL, program_environment, run_program

DEFECTS = Path(__file__).with_name("parity_with_defects.py")


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's own file, with places that parity must leave alone."""
    directory = tmp_path_factory.mktemp("parity")
    content: dict[str, Any] = {
        "model": {name.replace("-", "_"): value for name, value in TINY_MODEL.items()},
        "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "device": "cpu"},
        "data": {"data_path": [str(corpus)]},
        "training": {"micro_batch_size": 1, "train_iters": 1000, "eval_iters": 3},
        "optimizer": {"lr": 0.01, "lr_warmup_iters": 100},
        "checkpoint": {"save": str(directory / "save"), "load": str(directory / "save"), "save_interval": 1},
        "logging": {"metrics_file": str(directory / "metrics.jsonl")},
    }
    content["model"] |= {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 5, "phd_chunk": 8}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.timeout(600)
def test_broken_layouts_are_named_with_their_worst_parameter(config: Path, tmp_path: Path) -> None:
    """Among others: without the sum of the v norm's gradients over tensor-parallel ranks, parity fails."""
    layouts = "tp2,pp2,dp2,pp2+vpp2,pp3,tp3+sp"
    command = [sys.executable, str(DEFECTS), "--config", str(config), "--layouts", layouts]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "result.json"), "--markdown", str(tmp_path / "result.md")],
        cwd=ROOT,
        env=program_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1, done.stdout
    rows = {row["layout"]: row for row in json.loads((tmp_path / "result.json").read_text())["layouts"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        **{"tp2": "differs", "dp2": "differs", "pp2": "failed", "pp2+vpp2": "equal"},
        **{"pp3": "refused", "tp3+sp": "refused"},
    }, done.stdout
    assert "self_attention" in rows["tp2"]["comparison"]["parameter"]
    assert "_layernorm" in rows["tp2"]["comparison"]["parameter"]
    assert rows["dp2"]["comparison"]["parameter"] == "decoder.layers.1.mlp.linear_fc1.weight"
    assert rows["dp2"]["comparison"]["gradient"] == pytest.approx(1e-3, rel=0.01)
    assert rows["dp2"]["comparison"]["loss"] < 1e-3, "a loss alone would have hidden it"
    assert "exitcode" in rows["pp2"]["note"]
    assert "num_layers 4 is not divisible by pipeline 3" in rows["pp3"]["note"]
    assert "num_attention_heads 4 is not divisible" in rows["tp3+sp"]["note"]
    for text in (done.stdout, (tmp_path / "result.md").read_text()):
        assert "decoder.layers.1.mlp.linear_fc1.weight" in text and "pipeline 3" in text
    assert [path.name for path in config.parent.iterdir()] == ["run.yaml"], "the run's own files are not touched"


@pytest.mark.timeout(600)
def test_what_may_depend_on_the_layout_is_marked_and_no_failure(config: Path) -> None:
    done = run_program(
        "parity", "--config", config, "--layouts", "tp2+sp", "--hidden-dropout", "0.2", "--load", "null", timeout=500
    )
    assert done.returncode == 0, done.stdout
    assert "layout-dependent: hidden_dropout=0.2 draws from a stream of each rank" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "tp2,tpp2"], "layout 'tpp2': 'tpp2' is no layout word; did you mean tp2?"),
        (["--layouts", "pp3,tp3"], "no layout could be run"),
        (["--layouts", "dp2", "--hidden-sise", "64"], "did you mean --hidden-size?"),
        (["--layouts", "dp2", "--num-attention-heads", "3"], "hidden_size=32 is not a multiple of"),
        (["--max-ranks", "0"], "--max-ranks 0"),
    ],
)
def test_bad_input_is_refused(config: Path, words: list[str], message: str) -> None:
    done = run_program("parity", "--config", config, *words)
    assert done.returncode == 2, done.stdout
    assert message in done.stdout and "Traceback" not in done.stdout


def test_a_process_keeps_no_model_of_the_run_before(config: Path, tmp_path: Path) -> None:
    """Many runs share a process here: one that stays would take its memory and its process groups' threads along."""
    script = tmp_path / "twice.py"
    words = ["--config", str(config), "--tensor-model-parallel-size", "1", "--save", "null", "--load", "null"]
    words += ["--save-interval", "null", "--train-iters", "1", "--eval-iters", "0", "--lr-warmup-iters", "0"]
    script.write_text(
        f"""
import gc, os
from phd_megatron.cli import pretrain

for run in ("first", "second"):
    pretrain.run([*{words!r}, "--metrics-file", {str(tmp_path)!r} + "/" + run])
    gc.collect()
    kept = [type(x).__name__ for x in gc.get_objects() if type(x).__name__ in ("PHDGPTModel", "DistributedOptimizer")]
    print("KEPT", kept)
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=program_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("KEPT")] == ["KEPT []"] * 2, done.stdout
