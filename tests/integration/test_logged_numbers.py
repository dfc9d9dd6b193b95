"""What a run logs, against numbers worked out by hand, on a clock that only the test moves.

A step takes 2 s, a validation 100 s and a save 1000 s, so that whatever is counted as training time shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phd_megatron.cli.main import main

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(300)

STEPS, BATCH, LENGTH, VOCAB = 6, 4, 24, 272
#: Forward operations of one sample of TINY_MODEL, a multiply-add being two: 4 layers of 24 tokens through query, key
#: and value (width 32 to 32 + 2 * 16), projection and the three matrices of the FFN; 300 visible pairs in each layer,
#: for scores and for the weighted sum; the head.
FORWARD = (
    4 * LENGTH * 2 * (32 * 64 + 32 * 32 + 3 * 32 * 48) + 4 * (LENGTH * (LENGTH + 1) // 2) * 2 * 2 * 32
) + LENGTH * 2 * 32 * VOCAB
FLOPS = 3 * FORWARD  # backward costs twice as much


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    from phd_megatron.training import interval, pretrain
    from phd_megatron.training.step import Stepper

    now = [0.0]
    monkeypatch.setattr(interval, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds: float, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    takes(2.0, Stepper, "train")
    takes(100.0, Stepper, "evaluate")
    takes(1000.0, pretrain.Trainer, "save")


def logged(data: Path, path: Path, **more: object) -> list[dict[str, Any]]:
    """The lines of a run whose rate falls to nothing in a line."""
    options = {
        **TINY_MODEL,
        **{"data-path": data, "device": "cpu", "micro-batch-size": 2, "global-batch-size": BATCH, "eval-iters": 0},
        **{"lr": 1e-2, "lr-decay-style": "linear", "train-iters": STEPS, "log-interval": 1, "metrics-file": path},
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    assert main(["pretrain", *flags({name: value for name, value in options.items() if value is not None})]) == 0
    return read_metrics(path)


def test_every_number_of_a_step(documents: Path, tmp_path: Path, clock: None) -> None:
    lines = logged(documents, tmp_path / "a.jsonl", peak_tflops=1e-4, eval_iters=1, eval_interval=2)
    for step, line in enumerate(lines, 1):
        found = {name: value for name, value in line.items() if name not in ("lm_loss", "grad_norm", "run")}
        validated = found.pop("validation_loss")
        assert (validated is not None) is (step % 2 == 0)
        assert found == {
            "iteration": step,
            "consumed_samples": step * BATCH,
            "consumed_tokens": step * BATCH * LENGTH,
            "consumed_flops": step * BATCH * FLOPS,
            "learning_rate": pytest.approx(1e-2 * (1 - step / STEPS), abs=1e-12),  # of the next step
            "global_batch_size": BATCH,
            "iteration_seconds": 2.0,
            "tokens_per_second": BATCH * LENGTH / 2.0,
            "processed_tokens_per_second": BATCH * LENGTH / 2.0,
            "tflops_per_gpu": pytest.approx(BATCH * FLOPS / 2.0 / 1e12),
            "mfu": pytest.approx(BATCH * FLOPS / 2.0 / 1e12 / 1e-4),
            "skipped_iterations": 0,
        }
    assert len(lines) == STEPS and 0.1 < lines[0]["mfu"] < 0.2


def test_an_interval_is_the_mean_of_its_steps(documents: Path, tmp_path: Path, clock: None) -> None:
    """Intervals of three; of four, so that the last has two steps; and cut by a validation after step 3."""
    copies = {"phd_repeat": 2, "phd_window": 5, "phd_chunk": 8}
    each = logged(documents, tmp_path / "1.jsonl", **copies)
    losses = [line["lm_loss"] for line in each]
    assert max(losses) - min(losses) > 0.1, "else a mean says nothing"
    saving = {"save": tmp_path / "save", "save_interval": 2}
    cut = {"eval_iters": 1, "eval_interval": 3}
    for name, more, ends in (("3", saving, (3, 6)), ("4", {}, (4, 6)), ("10", cut, (3, 6))):
        lines = logged(documents, tmp_path / f"{name}.jsonl", log_interval=name, **copies, **more)
        assert [line["iteration"] for line in lines] == [*ends]
        for begin, end, line in zip((0, *ends), ends, lines, strict=False):
            assert line["lm_loss"] == pytest.approx(sum(losses[begin:end]) / (end - begin), rel=1e-6), (name, end)
            assert line["grad_norm"] == pytest.approx(each[end - 1]["grad_norm"], rel=1e-5)
            assert line["iteration_seconds"] == 2.0 and line["tokens_per_second"] == BATCH * LENGTH / 2.0
            assert line["processed_tokens_per_second"] == 2 * BATCH * LENGTH / 2.0
            assert line["global_batch_size"] == BATCH and line["consumed_samples"] == end * BATCH
            assert line["tflops_per_gpu"] == pytest.approx(each[0]["tflops_per_gpu"])


def test_a_skipped_step_is_counted_and_moves_no_rate(documents: Path, tmp_path: Path, clock: None) -> None:
    """With a loss scale of 2^30 per token the first steps of fp16 overflow, each of which halves it."""
    scale = {"fp16": True, "initial_loss_scale": 2.0**30, "hysteresis": 1}
    lines = logged(documents, tmp_path / "f.jsonl", **scale, train_iters=24)
    skipped = sum(line["skipped_iterations"] for line in lines)
    assert 2 <= skipped < 20 and {line["skipped_iterations"] for line in lines} == {0, 1}
    assert all(line["skipped_iterations"] for line in lines[:skipped])
    for step, line in enumerate(lines, 1):
        assert line["learning_rate"] == pytest.approx(1e-2 * (1 - max(0, step - skipped) / 24), abs=1e-12)
    (line,) = logged(documents, tmp_path / "g.jsonl", **scale, train_iters=24, log_interval=100)
    assert line["skipped_iterations"] == skipped


def test_the_rate_is_of_the_steps_that_are_done_when_the_batch_grows(
    documents: Path, tmp_path: Path, clock: None
) -> None:
    """The steps grow as in Megatron-LM, which is what a run counted in samples goes by."""
    ramp = {"rampup_batch_size": [2, 1, 8], "train_samples": 26, "micro_batch_size": 1, "train_iters": None}
    lines = logged(documents, tmp_path / "r.jsonl", **ramp)
    sizes = [line["global_batch_size"] for line in lines]
    assert sizes == [2, 2, 3, 3, 4, 4, 4, 4]  # one more after each 4 samples, of which there are 8 / 2
    consumed = 0
    for size, line in zip(sizes, lines, strict=True):
        consumed += size
        assert line["consumed_samples"] == consumed and line["tokens_per_second"] == size * LENGTH / 2.0
        assert line["learning_rate"] == pytest.approx(1e-2 * (1 - consumed / 26), abs=1e-12)
