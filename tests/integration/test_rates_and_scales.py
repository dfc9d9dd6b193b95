"""Options of rates, decay and loss scale reach the optimizer by value; a run that changes nothing is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phd_megatron.cli.main import main

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(300)


def options(documents: Path, **more: object) -> list[str]:
    common: dict[str, object] = {
        **TINY_MODEL,
        "data-path": documents,
        "micro-batch-size": 2,
        "global-batch-size": 4,
        "train-iters": 4,
        "eval-iters": 0,
        "log-interval": 1,
        "lr": 1e-2,
        "device": "cpu",
    }
    return ["pretrain", *flags({**common, **{name.replace("_", "-"): value for name, value in more.items()}})]


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The optimizer of each run, as the real trainer built it, and what its groups were at each step."""
    from phd_megatron.training import megatron_engine

    found: list[Any] = []
    build = megatron_engine.build_optimizer

    def keep(*args: Any) -> Any:
        built = build(*args)
        found.append(built)
        return built

    monkeypatch.setattr(megatron_engine, "build_optimizer", keep)
    return found


def test_embedding_and_head_have_a_rate_of_their_own(documents: Path, optimizers: list[Any]) -> None:
    words = options(documents, decoupled_lr=5e-3, decoupled_min_lr=1e-3, min_lr=1e-4, lr_decay_style="linear")
    assert main([*words, "--untie-embeddings-and-output-weights", "--decay-norms"]) == 0
    (optimizer,) = optimizers
    rates = {(group["max_lr"], group["min_lr"]): group for group in optimizer.param_groups}
    assert rates.keys() == {(1e-2, 1e-4), (5e-3, 1e-3)}
    apart = rates[5e-3, 1e-3]
    assert apart["lr"] == pytest.approx(1e-3) and rates[1e-2, 1e-4]["lr"] == pytest.approx(1e-4), "at the end"
    assert all(group["wd_mult"] == 1.0 for group in optimizer.param_groups), "decay_norms"


def test_the_rate_that_is_logged_is_not_the_decoupled_one(documents: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert main(options(documents, decoupled_lr=5e-3, lr_decay_style="constant", metrics_file=metrics)) == 0
    assert {line["learning_rate"] for line in read_metrics(metrics)} == {1e-2}


def test_weight_decay_grows_from_start_to_end(documents: Path, optimizers: list[Any]) -> None:
    words = options(documents, start_weight_decay=0.0, end_weight_decay=0.4, weight_decay_incr_style="linear")
    assert main([*words, "--exit-interval", "2"]) == 0
    decayed = {group["wd_mult"]: group["weight_decay"] for group in optimizers[0].param_groups}
    assert decayed == {1.0: pytest.approx(0.2), 0.0: 0.0}


def test_half_precision_trains_from_its_first_step(documents: Path, tmp_path: Path, optimizers: list[Any]) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert main([*options(documents, metrics_file=metrics), "--fp16"]) == 0
    lines = read_metrics(metrics)
    assert sum(line["skipped_iterations"] for line in lines) == 0
    assert len({line["lm_loss"] for line in lines}) == 4 and lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    tokens = 2 * TINY_MODEL["seq-length"]  # of a micro-batch
    assert float(optimizers[0].get_loss_scale()) == pytest.approx(65536 / int(tokens))


def test_a_given_loss_scale_is_of_the_mean(documents: Path, optimizers: list[Any]) -> None:
    assert main([*options(documents, loss_scale=480.0), "--fp16"]) == 0
    assert float(optimizers[0].get_loss_scale()) == pytest.approx(10.0)


def test_a_run_without_one_update_is_an_error(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = options(documents, loss_scale=1e9, save=tmp_path / "save")
    assert main([*words, "--fp16"]) == 2
    said = capsys.readouterr()
    assert "none of 4 steps changed the model" in said.err + said.out and "loss_scale" in said.err + said.out
    assert not list((tmp_path / "save").glob("iter_*"))


@pytest.mark.parametrize("name", ["loss_scale", "initial_loss_scale", "min_loss_scale", "decoupled_min_lr"])
def test_an_option_without_what_it_needs_is_refused(
    documents: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(documents, **{name: 0.5})) == 2
    assert f"{name}=0.5 without" in capsys.readouterr().err


def test_the_checkpoints_schedule_wins_when_asked_for(documents: Path, tmp_path: Path) -> None:
    save = tmp_path / "A"
    assert main([*options(documents, save=save, lr_decay_style="linear"), "--exit-interval", "2"]) == 0
    resumed = {}
    for name, word in (("given", "--override-opt_param-scheduler"), ("saved", "--use-checkpoint-opt_param-scheduler")):
        metrics = tmp_path / f"{name}.jsonl"
        words = ["pretrain", "--load", str(save), "--metrics-file", str(metrics), "--lr", "1.0", "--train-iters", "8"]
        assert main([*words, word]) == 0
        resumed[name] = [line["learning_rate"] for line in read_metrics(metrics)]
    assert resumed["saved"] == pytest.approx([0.0025, 0, 0, 0, 0, 0])
    assert resumed["given"] == pytest.approx([0.625, 0.5, 0.375, 0.25, 0.125, 0])
