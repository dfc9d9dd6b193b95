"""``phd-megatron evaluate``: one number for a data set, from a checkpoint in any layout and from its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(600)

#: float32, summed in another order
TOLERANCE = 1e-5
STEPS, VALIDATED = 3, 8
MODELS: dict[str, dict[str, object]] = {
    "dense": {"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 6},
    "experts": {
        **{"norm-scheme": "pre", "phd-repeat": 2, "num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24},
        **{"moe-token-dispatcher-type": "alltoall"},
    },
}
LAYOUTS = {"dense": ("tp2+sp", "cp2", "pp2+vpp2", "dp2"), "experts": ("ep2",)}


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<model>/save``, trained on two ranks, and ``<model>-<layout>.json`` of its evaluations."""
    root = tmp_path_factory.mktemp("evaluate")
    train, evaluate = [], []
    for name, model in MODELS.items():
        options = {
            **{"data-path": documents, "split": "90,10,0", "device": "cpu", "micro-batch-size": 2, "lr": 1e-2},
            **{"global-batch-size": VALIDATED, "train-iters": STEPS, "eval-iters": 1, "save": root / name / "save"},
            "metrics-file": root / f"{name}.jsonl",
        }
        options |= {"tensor-model-parallel-size": 2, "sequence-parallel": True}
        train.append(["pretrain", *flags({**TINY_MODEL, **model, **options})])
        evaluate += [
            [
                *("evaluate", "--checkpoint", str(root / name / "save"), "--layout", layout, "--device", "cpu"),
                *("--json", str(root / f"{name}-{layout}.json")),
            ]
            for layout in LAYOUTS[name]
        ]
    run_cases(2, train)
    run_cases(2, evaluate)
    return root


def evaluate(*words: object) -> dict[str, float]:
    path = Path(str(words[words.index("--json") + 1]))
    done = run_program("evaluate", "--device", "cpu", *words)
    assert done.returncode == 0, done.stdout
    result: dict[str, float] = json.loads(path.read_text())
    assert f"loss {result['loss']:.6f} | perplexity {result['perplexity']:.4f}" in done.stdout
    return result


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_number_of_one_process(root: Path, tmp_path: Path, model: str) -> None:
    alone = evaluate("--checkpoint", root / model / "save", "--json", tmp_path / "alone.json", "--micro-batch-size", 3)
    assert alone["samples"] % 2, "an odd number, so that two ranks need a sample without loss"
    for layout in LAYOUTS[model]:
        found = json.loads((root / f"{model}-{layout}.json").read_text())
        assert (found["samples"], found["tokens"]) == (alone["samples"], alone["tokens"])
        assert found["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)


def test_the_first_samples_are_those_of_the_runs_validation(root: Path, tmp_path: Path) -> None:
    found = evaluate(
        "--checkpoint", root / "dense" / "save", "--num-samples", VALIDATED, "--json", tmp_path / "few.json"
    )
    assert found["loss"] == pytest.approx(read_metrics(root / "dense.jsonl")[-1]["validation_loss"], rel=TOLERANCE)
    assert found["tokens"] == VALIDATED * TINY_MODEL["seq-length"]


def test_export_gives_the_number_of_the_checkpoint(root: Path, documents: Path, tmp_path: Path) -> None:
    done = run_program("export", "--checkpoint", root / "dense" / "save", "--output", tmp_path / "hf")
    assert done.returncode == 0, done.stdout
    data = ("--data-path", documents, "--num-samples", 21, "--eod-mask-loss")
    one = evaluate("--checkpoint", root / "dense" / "save", *data, "--json", tmp_path / "one.json")
    two = evaluate("--checkpoint", tmp_path / "hf", *data, "--json", tmp_path / "two.json", "--micro-batch-size", 4)
    assert one["tokens"] == two["tokens"] < 21 * TINY_MODEL["seq-length"], "ends of documents carry no loss"
    assert two["loss"] == pytest.approx(one["loss"], rel=TOLERANCE)
    whole = evaluate("--checkpoint", root / "dense" / "save", *data[:2], "--json", tmp_path / "whole.json")
    assert whole["samples"] > 21 and whole["loss"] != one["loss"]

    done = run_program("evaluate", "--checkpoint", tmp_path / "hf", "--device", "cpu")
    assert done.returncode == 2 and "--data-path" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-samples", "0"], "--num-samples 0: give at least 1"),
        (["--subset", "test"], "gives the test split nothing"),
        (["--layout", "tp2"], "does not divide"),
        (["--seq-length", "25"], "--seq-length 25: the model was trained on 24 positions"),
        (["--seq-length", "0"], "--seq-length 0"),
    ],
)
def test_bad_input_is_refused(root: Path, words: list[str], message: str) -> None:
    done = run_program("evaluate", "--checkpoint", root / "dense" / "save", "--device", "cpu", *words)
    assert done.returncode == 2, done.stdout
    assert message in done.stdout and "Traceback" not in done.stdout


def test_a_place_without_a_model_is_refused(tmp_path: Path) -> None:
    done = run_program("evaluate", "--checkpoint", tmp_path)
    assert done.returncode == 2 and "neither a complete checkpoint nor a config.json" in done.stdout
