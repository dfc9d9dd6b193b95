"""A model that gives no numbers any more is no result: what is measured of it ends with an error."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from phd_megatron.checkpoint import health
from phd_megatron.cli.main import main

from .conftest import TINY_MODEL, flags


@pytest.fixture(scope="module")
def diverged(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose one step was so long that its parameters are finite and its outputs are not; and its metrics.

    Saved as releases did that had no look at the parameters.
    """
    save = tmp_path_factory.mktemp("diverged")
    options = {**TINY_MODEL, "data-path": documents, "split": "90,10,0", "micro-batch-size": 2, "train-iters": 1}
    options |= {"eval-iters": 0, "log-interval": 1, "device": "cpu", "lr": 1e15, "save": save / "run"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "LARGEST", math.inf)
        assert main(["pretrain", *flags({**options, "metrics-file": save / "metrics.jsonl"})]) == 0
    return save


def test_the_last_model_is_not_left_out_but_refused(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In between a run goes on without such a save, since the next one may be well; after the end there is none."""
    options = {**TINY_MODEL, "data-path": documents, "split": "90,10,0", "micro-batch-size": 2, "train-iters": 1}
    options |= {"eval-iters": 0, "device": "cpu", "lr": 1e15, "save": tmp_path / "run"}
    assert main(["pretrain", *flags(options)]) == 2
    assert "after iteration 1 parameter " in capsys.readouterr().err and not list(tmp_path.glob("run/iter_*"))


@pytest.fixture(scope="module")
def exported(diverged: Path) -> Path:
    output = diverged / "hf"
    words = ["export", "--checkpoint", diverged / "run", "--output", output, "--verify", "none"]
    assert main([*map(str, words)]) == 0
    return output


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_evaluate_ends_with_an_error_and_says_null(
    kind: str, diverged: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = diverged / "run" if kind == "checkpoint" else exported
    report = tmp_path / "report.json"
    words = ["evaluate", "--checkpoint", path, "--device", "cpu", "--num-samples", 2, "--json", report]
    assert main([*map(str, words)]) == 1
    out, err = capsys.readouterr()
    assert "loss nan | perplexity nan" in out
    assert err.startswith(f"error: the loss of {path} is nan: ") and "evaluate an earlier checkpoint" in err
    found = json.loads(report.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["loss"] is None and found["perplexity"] is None and found["tokens"] == 2 * TINY_MODEL["seq-length"]


def test_export_verifies_no_such_model(diverged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--checkpoint", diverged / "run", "--output", tmp_path / "hf"]
    assert main([*map(str, words)]) == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_export_refuses_values_that_the_type_cannot_hold(
    diverged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--checkpoint", diverged / "run", "--output", tmp_path / "hf", "--verify", "none"]
    assert main([*map(str, words), "--dtype", "float16"]) == 2
    err = capsys.readouterr().err
    assert "values beyond torch.float16; export with --dtype bfloat16 or float32" in err
    assert not (tmp_path / "hf").exists()


def test_import_refuses_parameters_that_are_no_numbers(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in exported.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    words = ["import", "--hf-dir", source, "--output", tmp_path / "out"]
    assert main([*map(str, words)]) == 2
    err = capsys.readouterr().err
    assert "model.norm.weight in" in err and "not finite" in err and "import another one" in err
    assert not (tmp_path / "out").exists()


def test_compare_says_which_run_has_diverged(
    diverged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = json.loads((diverged / "metrics.jsonl").read_text().splitlines()[0])
    steps = [{**step, "iteration": i, "consumed_tokens": i * 1000, "consumed_flops": i * 1e6} for i in range(1, 5)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    steps[2]["lm_loss"] = steps[3]["lm_loss"] = math.nan
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    output = tmp_path / "compare"
    words = ["compare", f"a={tmp_path}/good.jsonl", f"b={tmp_path}/bad.jsonl", "--output", output]
    assert main([*map(str, words)]) == 1
    out, err = capsys.readouterr()
    said = "b has diverged: from iteration 3 on its loss is not finite"
    assert said in out and err.startswith(f"error: {said}") and said in (output / "compare.md").read_text()
