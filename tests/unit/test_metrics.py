"""What is said of a step: the line of the log, the line of the metrics file, and the routers of all layers."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import LoggingConfig, ModelConfig, ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import Runtime
from phd_megatron.training import metrics
from phd_megatron.training.metrics import Reporter, StepMetrics, flat, log_line, make_directory, run_of_rows
from phd_megatron.training.metrics_reader import read_run


def step(**more: Any) -> StepMetrics:
    """No two numbers are alike."""
    values = {
        **{"iteration": 7, "consumed_samples": 56, "consumed_tokens": 1344, "consumed_flops": 9e9, "lm_loss": 2.5},
        **{"grad_norm": 1.25, "learning_rate": 3e-4, "global_batch_size": 8, "iteration_seconds": 0.5},
        **{"tokens_per_second": 384.0, "processed_tokens_per_second": 768.0, "tflops_per_gpu": 12.5, "mfu": 0.4},
        **{"skipped_iterations": 2},
    }
    return StepMetrics(**{**values, **more})


def test_the_line_of_the_log() -> None:
    fields = log_line(step(observed={"z_loss": 0.125, "tokens_per_expert": {1: [2, 3]}}), 90).split(" | ")
    assert re.fullmatch(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration        7/      90", fields[0])
    said = {name: value.split(" |")[0].strip() for name, value in (field.split(":", 1) for field in fields[1:])}
    assert said == {
        "consumed samples": "56",
        "elapsed time per iteration (ms)": "500.0",
        "throughput per GPU (TFLOP/s/GPU)": "12.5",
        "learning rate": "3.000000E-04",
        "global batch size": "8",
        "lm loss": "2.500000E+00",
        "grad norm": "1.250",
        "number of skipped iterations": "2",
        "tokens/s": "384",
        "processed tokens/s": "768",
        "z loss": "1.250000E-01",
        "MFU": "40.0%",
    }
    assert "MFU" not in log_line(step(mfu=None), 90)


def reporter(enabled: bool = True, **options: Any) -> Reporter:
    return Reporter(LoggingConfig(progress="off", **options), enabled, 90, {}, None)


def test_the_line_of_the_metrics_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for _ in range(2):  # a second start goes on with the same file
        opened = reporter(metrics_file=str(path))
        opened.report(step(observed={"z_loss": 0.125}, validation_loss=3.5))
        opened.report(step(observed={"layer_statistics": {"residual_rms": {1: 0.5}}}))
        opened.close()
    reporter(enabled=False, metrics_file=str(path)).report(step())
    first, second, *again = map(json.loads, path.read_text().splitlines())
    assert again == [first, second]
    assert first == {
        **{"iteration": 7, "consumed_samples": 56, "consumed_tokens": 1344, "consumed_flops": 9e9, "lm_loss": 2.5},
        **{"grad_norm": 1.25, "learning_rate": 3e-4, "global_batch_size": 8, "iteration_seconds": 0.5},
        **{"tokens_per_second": 384.0, "processed_tokens_per_second": 768.0, "tflops_per_gpu": 12.5, "mfu": 0.4},
        **{"skipped_iterations": 2, "validation_loss": 3.5, "z_loss": 0.125},
    }
    assert second["layer_statistics"] == {"residual_rms": {"1": 0.5}} and second["validation_loss"] is None
    assert capsys.readouterr().out.count("iteration        7/      90") == 4


OWN, OTHER = "a" * 32, "b" * 32
ROW, NO_ID = f'{{"iteration": 1, "run": "{OTHER}", "lm_loss": 2.0}}', '{"iteration": 1, "lm_loss": 2.0}'
#: what is there -> the id of the next rows, of a start at iteration 0 and of one from a checkpoint; None is a refusal
THERE = {
    "": (OWN, OWN),
    "\n": (OWN, OWN),
    f"{ROW}\n": (None, OTHER),
    f"{ROW}\n{ROW.replace(OTHER, OWN)}\n": (None, OTHER),
    f"{ROW.replace(OTHER, OWN)}\n": (OWN, OWN),
    ROW.replace(OTHER, OWN)[:60]: (OWN, OWN),  # cut by a full disk
    ROW[:60]: (None, OTHER),
    ROW[:40]: (None, OWN),
    f"{NO_ID}\n": (None, OWN),  # of a release before
}


def test_a_run_that_begins_leaves_the_metrics_of_another_alone(tmp_path: Path) -> None:
    """Two runs in one file would be drawn as one."""
    path = tmp_path / "metrics.jsonl"
    assert run_of_rows(path, OWN, begins=True) == OWN and run_of_rows("/dev/null", OWN, begins=True) == OWN
    for text, wanted in THERE.items():
        for begins, run in zip((True, False), wanted, strict=True):
            path.write_text(text)
            if run is None:
                with pytest.raises(UserError, match=r"metrics of another run.*choose another --metrics-file, or move"):
                    run_of_rows(path, OWN, begins=begins)
            else:
                assert run_of_rows(path, OWN, begins=begins) == run, (text, begins)
            assert path.read_text() == text


def test_a_row_says_whose_it_is_where_it_is_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    opened = Reporter(LoggingConfig(progress="off", metrics_file=str(path)), True, 90, {}, None, OWN)
    opened.report(step())
    opened.close()
    assert run_of_rows(path, OTHER, begins=False) == OWN
    assert json.loads(path.read_text())["run"] == OWN


def rows_file(path: Path, *rows: tuple[int, str | None]) -> Path:
    lines = [
        {"iteration": number, **({} if run is None else {"run": run}), "consumed_samples": number, "place": place}
        for place, (number, run) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_two_runs_in_one_file_are_not_read_as_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first, second in ((OWN, OTHER), (OTHER, OWN)):
        rows_file(path, (1, first), (2, first), (1, second), (2, second))
        with pytest.raises(ValueError, match=r"jsonl:3 goes back from iteration 2 to 1, and is of another run"):
            read_run("x", path)
    rows_file(path, (2, OWN), (2, OTHER))
    with pytest.raises(ValueError, match="from iteration 2 to 2"):
        read_run("x", path)
    for first, second in ((OWN, OWN), (None, OWN), (None, None)):  # killed, and the steps repeated
        run = read_run("x", rows_file(path, (1, first), (2, first), (2, second), (3, second)))
        assert [(row["iteration"], row["place"]) for row in run.steps] == [(1, 0), (2, 2), (3, 3)]


def test_a_full_disk_ends_the_metrics_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened, kept = reporter(metrics_file=str(tmp_path / "m.jsonl")), []

    def full(values: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    opened._sinks += [full, kept.append]
    opened.report(step())
    opened.report(step(iteration=8))
    opened.close()
    assert [values["iteration"] for values in kept] == [7, 8], "other places still get them"
    assert (tmp_path / "m.jsonl").read_text().count("\n") == 2
    assert capsys.readouterr().out.count("warning: metrics cannot be written any more") == 1


@pytest.mark.parametrize("text", ["notes\n", "[1]\n", '{"loss": 1}\n', '"iteration"\x00'])
def test_a_file_of_something_else_gets_no_metrics(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no metrics of a run"):
        reporter(metrics_file=str(path))
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["", "\n", '{"iteration": 1}\n{"it', '{"iteration": 1, "lm_lo'])
def test_a_file_that_is_empty_or_was_cut_is_gone_on_with(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    opened = reporter(metrics_file=str(path))
    opened.report(step())
    opened.close()
    assert path.read_text().startswith(text) and path.read_text().endswith("}\n")


@pytest.mark.timeout(60)
def test_places_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    for place, said in (("pipe", "it is a pipe"), ("file/m", "cannot be written"), (".", "cannot be written")):
        with pytest.raises(UserError, match=said):
            reporter(metrics_file=str(tmp_path / place))
    with pytest.raises(UserError, match=r"profile_dir=.*cannot be written"):
        make_directory("profile_dir", str(tmp_path / "file" / "p"))
    make_directory("profile_dir", str(tmp_path / "a" / "b"))
    assert (tmp_path / "a/b").is_dir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorboard is not installed"):
        reporter(tensorboard_dir=str(tmp_path / "t"))
    with pytest.raises(UserError, match="wandb is not installed"):
        reporter(wandb_project="p")
    Reporter(LoggingConfig(progress="off"), True, 90, {}, tmp_path / "t").close()  # nobody asked for it


def test_a_table_by_layer_is_a_value_for_each() -> None:
    assert flat({"a": 1, "b": {"c": {2: 3.0, 5: 4.0}}}) == {"a": 1, "b/c/2": 3.0, "b/c/5": 4.0}


@pytest.fixture(scope="module")
def runtime() -> Any:
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def model_with(**transformer: Any) -> tuple[Any, ModelConfig]:
    from phd_megatron.model.build import build_model

    run = RunConfig(
        model=ModelConfig(
            **{"num_layers": 3, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2, "seq_length": 8},
            transformer=transformer,
        )
    )
    run.training.train_iters = 3
    resolve(run)
    return build_model(run, 50, torch.device("cpu"))[0], run.model


def test_what_is_said_of_routers(runtime: Any) -> None:
    """Two layers with four experts behind a dense one; what the routers have counted is given, the rest by hand."""
    from phd_megatron.model.moe import PHDRouter
    from phd_megatron.training.observers.router_metrics import collect_router_metrics

    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1, 1]}
    losses = {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.2, "moe_router_load_balancing_type": "aux_loss"}
    model, options = model_with(**experts, **losses, moe_token_dispatcher_type="alltoall")
    counted = {
        2: ({"load_balancing_loss": 6.0, "z_loss": 3.0}, [10.0, 20.0, 30.0, 20.0], [4.0, 8.0]),
        3: ({"load_balancing_loss": 2.0, "z_loss": 1.0}, [5.0, 5.0, 5.0, 65.0], [6.0, 8.0]),
    }
    routers = [module for module in model.modules() if isinstance(module, PHDRouter)]
    assert [router.layer_number for router in routers] == [2, 3]
    for router in routers:
        given = {name: torch.tensor(value) for name, value in counted[router.layer_number][0].items()}
        load, entropy = (torch.tensor(values) for values in counted[router.layer_number][1:])
        router.take_statistics = lambda found=(given, load, entropy): found
    found = collect_router_metrics([model], options, 4, torch.device("cpu"))
    assert found == {
        "load_balancing_loss": (6.0 + 2.0) / 2 / 4,  # over layers and micro-batches
        "z_loss": (3.0 + 1.0) / 2 / 4,
        "max_expert_load": 65.0 / 20.0,
        "tokens_per_expert": {2: [10, 20, 30, 20], 3: [5, 5, 5, 65]},
        "router_entropy": {2: 0.5, 3: 0.75},
    }
    dense, options = model_with()
    assert collect_router_metrics([dense], options, 4, torch.device("cpu")) == {}


def test_how_threads_tell_of_errors_is_as_before_in_the_end() -> None:
    before = threading.excepthook
    undo = metrics._without_tracebacks_of("tensorboard")
    assert threading.excepthook is not before
    undo()
    assert threading.excepthook is before


def test_a_display_that_can_show_nothing_is_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(metrics, "say", said.append)
    shown = Reporter(LoggingConfig(progress="on"), True, 90, {}, None)
    asked: list[str] = []
    display = shown._progress
    assert display is not None

    def no_room(message: str = "", **options: object) -> None:
        asked.extend([message] if message else [])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(display.console, "print", no_room)
    shown.log("one")
    shown.log("two")
    shown.advance(3)
    assert (asked, said) == (["one"], ["one", "two"])
    monkeypatch.undo()
    shown.close()
