"""Observers of training steps: one that a test adds sees every hook of a real run, in order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phd_megatron.cli.main import main
from phd_megatron.data.preprocess import prepare
from phd_megatron.runtime.context import install_backend
from phd_megatron.training.metrics_reader import read_run

MODEL = {
    **{"num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 4, "seq-length": 24},
    **{"make-vocab-size-divisible-by": 16, "device": "cpu", "micro-batch-size": 2, "global-batch-size": 4},
}
STEPS = 5


@pytest.fixture(scope="module", autouse=True)
def backend() -> None:
    install_backend("cpu")  # before Megatron is imported


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that stand still unless a test moves them."""
    from phd_megatron.training import interval

    now = [0.0]
    monkeypatch.setattr(interval, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def train(directory: Path, **more: object) -> list[dict[str, Any]]:
    """The rows of metrics of a small run."""
    (directory / "text.txt").write_text("some words of a text " * 200)
    prepare([directory / "text.txt"], directory / "data", progress=False)
    options = {
        **{**MODEL, "data-path": directory / "data", "train-iters": STEPS, "eval-iters": 0, "log-interval": 2},
        **{"metrics-file": directory / "metrics.jsonl"},
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["pretrain", *words]) == 0
    return read_run("run", directory / "metrics.jsonl").steps


def test_an_observer_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    """Rows are written after steps 2 and 4, after 3, which it asks for itself, and after the last one."""
    from phd_megatron.training.observers import registry
    from phd_megatron.training.observers.observer import Observer, Step

    seen: list[tuple[str, int]] = []
    norms: dict[int, float] = {}

    class Recorder(Observer):
        @classmethod
        def of_run(cls, run: Any, runtime: Any, first: int, last: int) -> Recorder:
            seen.extend([("first", first), ("last", last)])
            assert run.model.num_layers == 2 and runtime.world_size == 1
            return cls()

        @contextmanager
        def around_step(self, step: Step) -> Iterator[None]:
            seen.append(("enter", step.iteration))
            assert step.state.counters.iteration == step.iteration - 1 == len(norms)
            clock[0] += 3.0
            with step.interval.paused():
                clock[0] += 100.0
            yield
            assert step.state.counters.iteration == step.iteration and step.microbatches == 2
            seen.append(("leave", step.iteration))

        def on_gradients(self, step: Step) -> None:
            seen.append(("gradients", step.iteration))
            squares = [float(p.main_grad.square().sum()) for model in step.state.models for p in model.parameters()]
            norms[step.iteration] = math.sqrt(sum(squares))

        def after_step(self, step: Step) -> None:
            seen.append(("after", step.iteration))
            step.reported = step.iteration == 3

        def on_report(self, step: Step) -> Mapping[str, Any]:
            seen.append(("report", step.iteration))
            return {"own_norm": norms[step.iteration], "own_table": {1: step.iteration}}

        def close(self) -> None:
            seen.append(("close", 0))

    class Bystander(Observer):
        """Has no hook of its own."""

    class Absent(Recorder):
        @classmethod
        def of_run(cls, run: Any, runtime: Any, first: int, last: int) -> None:
            return None

    monkeypatch.setattr(registry, "OBSERVERS", [Bystander, *registry.OBSERVERS, Absent, Recorder])
    rows = train(tmp_path)

    assert seen[:2] == [("first", 1), ("last", STEPS)] and seen[-1] == ("close", 0)
    expected: list[tuple[str, int]] = []
    for step in range(1, STEPS + 1):
        expected += [(hook, step) for hook in ("enter", "gradients", "leave", "after")]
        expected += [("report", step)] if step > 1 else []
    assert seen[2:-1] == expected
    assert [row["iteration"] for row in rows] == [2, 3, 4, 5]
    for row in rows:
        assert row["own_norm"] == pytest.approx(row["grad_norm"], rel=1e-5), "gradients are final, and not clipped"
        assert row["own_table"] == {"1": row["iteration"]}
        assert row["iteration_seconds"] == 3.0, "a pause is no part of a step"
    said = capsys.readouterr().out
    assert [f"own norm: {row['own_norm']:.6E} |" in said for row in rows] == [True] * 4


def test_hooks_nest_in_the_order_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phd_megatron.training.observers import registry
    from phd_megatron.training.observers.observer import Observer, Step

    seen: list[str] = []

    def named(name: str) -> type[Observer]:
        class Named(Observer):
            @contextmanager
            def around_step(self, step: Step) -> Iterator[None]:
                seen.append(f"into {name}")
                yield
                seen.append(f"out of {name}")

            def on_gradients(self, step: Step) -> None:
                seen.append(f"gradients {name}")

            def after_step(self, step: Step) -> None:
                seen.append(f"after {name}")

        return Named

    monkeypatch.setattr(registry, "OBSERVERS", [named("a"), named("b")])
    train(tmp_path, train_iters=1)
    inside = ["into a", "into b", "gradients a", "gradients b", "out of b", "out of a"]
    assert seen == [*inside, "after a", "after b"]


def test_neither_starting_nor_writing_a_trace_is_time_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    from phd_megatron.training.interval import Interval
    from phd_megatron.training.observers import profiler
    from phd_megatron.training.observers.observer import Step

    class Slow:
        """In place of torch's profiler."""

        def __init__(self, **_: Any) -> None:
            self.start = self.stop = lambda: clock.__setitem__(0, clock[0] + 50.0)

        def export_chrome_trace(self, path: str) -> None:
            clock[0] += 1000.0

        def key_averages(self) -> list[Any]:
            return []

    monkeypatch.setattr(profiler, "profile", Slow)
    observer = profiler.StepProfiler(tmp_path, 0, 1, 3, log=False, on_cuda=False)
    interval, state, groups = Interval(), SimpleNamespace(), SimpleNamespace()
    for iteration in range(1, 5):
        step: Any = Step(iteration, 1, state, groups, interval, print)  # type: ignore[arg-type]
        with observer.around_step(step):
            clock[0] += 2.0
    observer.close()
    assert (tmp_path / "steps_2-3_rank_0.operations.json").is_file()
    assert clock[0] == 4 * 2.0 + 50.0 + 50.0 + 1000.0 and interval.seconds == 4 * 2.0


def test_a_step_with_statistics_has_a_row_of_its_own(tmp_path: Path) -> None:
    """Of the first step and every second one, whatever the log interval; the row of the others has none."""
    rows = train(tmp_path, log_interval=100, log_layer_statistics=2)
    assert {row["iteration"]: "layer_statistics" in row for row in rows} == {1: True, 2: True, 4: True, 5: False}
    assert set(rows[0]["layer_statistics"]["gradient_norm"]) == {"1", "2"}
