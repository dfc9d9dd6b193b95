"""A run writes where it was told to at its own start, and nowhere that a checkpoint names."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from phd_megatron.checkpoint.run_file import RunFile, write_run
from phd_megatron.cli.main import main
from phd_megatron.training.pretrain import Trainer

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(600)


def contents(directory: Path) -> dict[str, str]:
    """Every file with its checksum; the lock is an empty file that a run may leave."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def first(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 2 and 4 that says where everything goes."""
    root = tmp_path_factory.mktemp("first")
    options: dict[str, object] = {
        **TINY_MODEL,
        "data-path": documents,
        "micro-batch-size": 2,
        "global-batch-size": 4,
        "train-iters": 4,
        "eval-iters": 0,
        "log-interval": 1,
        "lr": 1e-2,
        "device": "cpu",
        "save": root / "A",
        "save-interval": 2,
        "keep-last": 2,
        "metrics-file": root / "metrics.jsonl",
        "dump-gradients-dir": root / "gradients",
        "data-cache-path": root / "cache",
    }
    assert main(["pretrain", *flags(options)]) == 0
    return root


def start(*words: object) -> int:
    return main(["pretrain", *map(str, words)])


def test_finetuning_without_save_leaves_its_source_alone(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(first)
    assert start("--load", first / "A", "--finetune", "--lr", "2e-4", "--train-iters", 3) == 0
    assert contents(first) == before
    said = capsys.readouterr().out
    notes = said[: said.index("resolved configuration")]
    assert "without save nothing of this run is kept; give --save" in notes
    for word in ("not taken over", f"save='{first / 'A'}'", "keep_last=2", f"metrics_file='{first / 'metrics.jsonl'}'"):
        assert word in notes
    assert "stopped at iteration 3" in said


def test_a_copy_of_a_run_leaves_the_run_alone(first: Path, tmp_path: Path) -> None:
    before = contents(first)
    shutil.copytree(first / "A", tmp_path / "B")
    copied = contents(tmp_path / "B")
    assert start("--load", tmp_path / "B", "--train-iters", 6) == 0
    assert contents(first) == before and contents(tmp_path / "B") == copied


def test_another_place_to_save_has_its_own_metrics_and_keeps_all(first: Path, tmp_path: Path) -> None:
    before = contents(first)
    new = tmp_path / "M2"
    words = ("--load", first / "A", "--save", new, "--metrics-file", new / "metrics.jsonl", "--train-iters", 10)
    assert start(*words, "--save-interval", 2) == 0
    assert contents(first) == before
    assert [line["iteration"] for line in read_metrics(new / "metrics.jsonl")] == [5, 6, 7, 8, 9, 10]
    assert sorted(path.name for path in new.glob("iter_*")) == ["iter_0000006", "iter_0000008", "iter_0000010"]


def test_nothing_is_written_beside_what_was_named(first: Path, tmp_path: Path, documents: Path) -> None:
    """A configuration from elsewhere names places of its own; none of them appears."""
    copy, elsewhere = tmp_path / "foreign", tmp_path / "elsewhere"
    shutil.copytree(first / "A", copy)
    for config in copy.glob("iter_*/run_config.yaml"):
        config.write_text(config.read_text("utf-8").replace(str(first), str(elsewhere)), "utf-8")
    assert start("--load", copy, "--no-verify-checkpoint", "--train-iters", 6, "--data-path", documents) == 0
    assert main(["evaluate", "--checkpoint", str(copy), "--data-path", str(documents), "--no-verify-checkpoint"]) == 0
    assert not elsewhere.exists()


@pytest.mark.parametrize(("batch", "iterations"), [(2, 8), (8, 8), (2, 20), (4, 8)])
def test_another_batch_goes_on_to_the_last_iteration(
    first: Path, tmp_path: Path, batch: int, iterations: int, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    words = ("--load", first / "A", "--global-batch-size", batch, "--train-iters", iterations)
    assert start(*words, "--metrics-file", metrics) == 0
    lines = read_metrics(metrics)
    assert [line["iteration"] for line in lines] == list(range(5, iterations + 1))
    assert lines[-1]["consumed_samples"] == 16 + (iterations - 4) * batch
    said = capsys.readouterr().out
    assert f"plan: iterations 5 to {iterations}, {batch} samples a step" in said
    assert [int(step) for step in re.findall(r"iteration +(\d+)/", said)] == list(range(5, iterations + 1))
    assert f"stopped at iteration {iterations}" in said


def test_no_rate_jumps_with_another_batch(first: Path, tmp_path: Path) -> None:
    rates = {}
    for batch in (2, 4, 8):
        metrics = tmp_path / f"{batch}.jsonl"
        words = ("--load", first / "A", "--global-batch-size", batch, "--train-iters", 8, "--metrics-file", metrics)
        assert start(*words, "--lr-warmup-iters", 6) == 0
        rates[batch] = [line["learning_rate"] for line in read_metrics(metrics)]
    assert rates[2] == pytest.approx(rates[4]) and rates[8] == pytest.approx(rates[4])
    assert len(set(rates[4])) == 4


def test_samples_and_ramp_up_go_on_in_samples(documents: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {
        **TINY_MODEL,
        "data-path": documents,
        "micro-batch-size": 1,
        "global-batch-size": 4,
        "rampup-batch-size": [1, 1, 8],
        "train-samples": 32,
        "eval-iters": 0,
        "log-interval": 1,
        "device": "cpu",
        "metrics-file": tmp_path / "first.jsonl",
        "save": tmp_path / "A",
        "exit-interval": 5,
    }
    assert main(["pretrain", *flags(options)]) == 0
    done = read_metrics(tmp_path / "first.jsonl")[-1]
    for batch in (3, 4, 8):
        metrics = tmp_path / f"{batch}.jsonl"
        words = ("--load", tmp_path / "A", "--global-batch-size", batch, "--metrics-file", metrics)
        assert start(*words) == 0
        lines = read_metrics(metrics)
        assert lines[0]["iteration"] == done["iteration"] + 1
        taken = [int(line["global_batch_size"]) for line in lines]
        assert done["consumed_samples"] + sum(taken) == lines[-1]["consumed_samples"]
        assert 32 - batch < lines[-1]["consumed_samples"] <= 32 and max(taken) == batch
        for before, after in zip([done, *lines], lines, strict=False):
            assert after["learning_rate"] <= before["learning_rate"] * (1 + 1e-12), "no rate jumps up"


def test_a_start_that_trains_nothing_saves_over_nothing(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(first / "A", tmp_path / "A")
    iteration = tmp_path / "A" / "iter_0000004"
    before = contents(iteration)
    assert start("--load", tmp_path / "A", "--save", tmp_path / "A", "--no-load-optim", "--train-iters", 3) == 0
    assert contents(iteration) == before
    said = capsys.readouterr().out
    assert "nothing is left to train: 4 iterations and 16 samples are done, and train_iters=3 asks for no more" in said
    assert start("--load", tmp_path / "A", "--save", tmp_path / "C", "--train-iters", 3) == 0
    assert (tmp_path / "C" / "iter_0000004").is_dir(), "elsewhere it is a copy that was asked for"


@pytest.mark.parametrize("words", [("--finetune", "--train-iters", "6"), ("--train-iters", "9")])
def test_the_same_words_again_go_on_with_what_they_began(
    first: Path, tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchrun, Slurm and Kubernetes start a job again."""
    before = contents(first)
    command = ("--load", first / "A", "--save", tmp_path / "F", *words, "--exit-interval", 2)
    done = 0 if "--finetune" in words else 4
    for _ in range(2):
        assert start(*command) == 0
        done += 2
        said = capsys.readouterr().out
        assert f"stopped at iteration {done}" in said
    assert "began with this very start" in said and contents(first) == before
    assert start("--load", first / "A" / "iter_0000002", "--save", tmp_path / "F", *words) == 2, "another start"


def test_a_rewind_is_not_repeated_by_a_restart(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "A"
    shutil.copytree(first / "A", run)
    command = ("--load", run / "iter_0000002", "--save", run, "--rewind", "--train-iters", 8, "--exit-interval", 1)
    for done in (3, 4, 5):
        assert start(*command) == 0
        assert f"stopped at iteration {done}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("load", "words", "said"),
    [
        ("A/iter_0000099", (), "there is no checkpoint"),
        ("misspelt", ("--finetune",), "--finetune is set"),
        ("misspelt", ("--rewind",), "--rewind is set"),
    ],
)
def test_a_checkpoint_that_was_named_and_is_not_there_is_an_error(
    first: Path,
    tmp_path: Path,
    documents: Path,
    load: str,
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {**TINY_MODEL, "data-path": documents, "train-iters": 1, "eval-iters": 0, "device": "cpu"}
    assert start("--load", first / load, "--save", tmp_path / "N", *flags(options), *words) == 2
    assert said in capsys.readouterr().err


def test_a_change_of_unit_moves_the_schedule_to_where_the_run_is(first: Path, tmp_path: Path) -> None:
    for words in (("--train-samples", 64), ("--train-iters", 12)):
        metrics = tmp_path / f"{words[0]}.jsonl"
        more = ("--load", first / "A", "--global-batch-size", 8, "--metrics-file", metrics)
        assert start(*more, *words) == 0
        assert read_metrics(metrics)[-1]["learning_rate"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_validations_are_spread_over_iterations_whatever_the_batch(first: Path, tmp_path: Path, batch: int) -> None:
    metrics = tmp_path / "metrics.jsonl"
    words = ("--load", first / "A", "--global-batch-size", batch, "--micro-batch-size", 1, "--train-iters", 8)
    assert start(*words, "--evals-per-run", 4, "--eval-iters", 1, "--metrics-file", metrics) == 0
    lines = read_metrics(metrics)
    assert [line["iteration"] for line in lines if line["validation_loss"] is not None] == [6, 8]


@pytest.mark.parametrize("name", [".metadata", "common.pt", "training_state.json", "run_config.yaml", "checksums.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(
    first: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(first / "A", tmp_path / "A")
    path = tmp_path / "A" / "iter_0000004" / name
    path.unlink()
    os.mkfifo(path)
    for words in (["evaluate", "--checkpoint"], ["export", "--output", str(tmp_path / "hf"), "--checkpoint"]):
        assert main([*words, str(path.parent)]) == 2
        assert name in capsys.readouterr().err
    assert start("--load", path.parent, "--no-verify-checkpoint", "--train-iters", 6) == 2
    assert f"{path}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["save", "load", "data-path", "metrics-file", "tokenizer", "tensorboard-dir"])
def test_an_empty_word_is_no_place(
    first: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert start("--load", first / "A", f"--{name}", "") == 2
    said = capsys.readouterr()
    assert f"{name.replace('-', '_')}=" in said.err + said.out and "is empty" in said.err + said.out
    assert not list(tmp_path.iterdir())


def test_a_run_whose_place_another_has_taken_writes_nothing_more(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, genuine = tmp_path / "A", Trainer._save_in_between

    def save_in_between(trainer: Trainer, last: bool) -> None:
        if trainer.state.counters.iteration == 2:
            write_run(save, RunFile("another"))
        genuine(trainer, last)

    monkeypatch.setattr(Trainer, "_save_in_between", save_in_between)
    options: dict[str, object] = {**TINY_MODEL, "data-path": documents, "micro-batch-size": 2, "train-iters": 3}
    options |= {"eval-iters": 0, "device": "cpu", "save": save, "save-interval": 1}
    assert main(["pretrain", *flags(options)]) == 2
    assert f"another run has begun to save into {save}" in capsys.readouterr().err
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000001"]
