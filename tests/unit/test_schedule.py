"""Lengths of runs and schedules, and what another batch size on resume does to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign, dump_yaml
from phd_megatron.errors import UserError
from phd_megatron.training.optimizer import build_scheduler
from phd_megatron.training.schedule import Batches, Position, describe_plan, plan_schedule


def run(**values: Any) -> RunConfig:
    config = RunConfig()
    for name, value in values.items():
        assign(config, name, value)
    return config


class Groups:
    """What a scheduler needs of an optimizer."""

    def __init__(self, config: RunConfig) -> None:
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0, "wd_mult": 1.0, "lr_mult": 1.0}]
        self.param_groups[0] |= {"max_lr": config.optimizer.lr, "min_lr": config.optimizer.min_lr}


def rates(config: RunConfig, batch: int, position: Position, steps: int, done: int = 0) -> list[tuple[float, float]]:
    """Learning rate and weight decay of each of the next steps of a run that stands there."""
    schedule = plan_schedule(config, batch, position)
    optimizer = Groups(config)
    scheduler = build_scheduler(optimizer, config, schedule)  # type: ignore[arg-type]
    scheduler.num_steps = 0
    scheduler.step(increment=done)
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["weight_decay"]))
        scheduler.step(batch if schedule.step is None else schedule.step)
    return found


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 32])
def test_a_run_in_iterations_ends_with_its_iterations_whatever_the_batch(batch: int) -> None:
    position = Position(iteration=4, consumed_samples=16, first_batch_size=4)
    schedule = plan_schedule(run(train_iters=8), batch, position)
    assert (schedule.samples - 16) / batch == 4
    assert (schedule.total, schedule.decay, schedule.step) == (32, 32, 4)
    assert plan_schedule(run(train_iters=20), batch, position).samples == 16 + 16 * batch


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 32])
def test_a_run_in_samples_ends_with_its_samples_whatever_the_batch(batch: int) -> None:
    position = Position(iteration=4, consumed_samples=16)
    schedule = plan_schedule(run(train_samples=48), batch, position)
    assert (schedule.samples, schedule.total, schedule.decay, schedule.step) == (48, 48, 48, None)


STYLES: list[dict[str, Any]] = [
    {"lr_decay_style": "cosine", "lr_warmup_iters": 2},
    {"lr_decay_style": "cosine", "lr_warmup_iters": 6},  # the change falls into the warm-up
    {"lr_decay_style": "linear", "lr_decay_iters": 6, "lr_warmup_samples": 7},
    {"lr_decay_style": "linear", "lr_warmup_tokens": 5 * 1024},
    {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.5},
    {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 1},
    {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_warmup_iters": 1},
    {
        "lr_decay_style": "constant",
        "start_weight_decay": 0.0,
        "end_weight_decay": 0.2,
        "weight_decay_incr_style": "linear",
    },
]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: "-".join(map(str, style.values())))
@pytest.mark.parametrize("batch", [2, 4, 8, 12])
def test_no_rate_jumps_when_the_batch_of_a_run_in_iterations_changes(style: dict[str, Any], batch: int) -> None:
    config = run(train_iters=10, lr=1e-2, min_lr=1e-4, **style)
    whole = rates(config, 4, Position(), 10)
    rest = rates(config, batch, Position(4, 16, 4), 6, done=16)
    assert [*sum(rest, ())] == pytest.approx([*sum(whole[4:], ())], rel=1e-12)


@pytest.mark.parametrize("batch", [2, 8])
def test_the_rate_of_a_run_in_samples_follows_its_samples(batch: int) -> None:
    config = run(train_samples=48, lr=1e-2, min_lr=0.0, lr_warmup_samples=8)
    for index, (rate, _) in enumerate(rates(config, batch, Position(4, 16), 32 // batch, done=16)):
        at = 16 + index * batch
        expected = 1e-2 * 0.5 * (1 + math.cos(math.pi * (at - 8) / 40))
        assert rate == pytest.approx(expected, rel=1e-9), at


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ({"lr_decay_style": "constant"}, [1.0] * 5),
        ({"lr_decay_style": "linear"}, [1.0, 0.775, 0.55, 0.325, 0.1]),
        ({"lr_decay_style": "cosine"}, [1.0, 0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1 + 0.9 * (2 - 2**0.5) / 4, 0.1]),
        ({"lr_decay_style": "linear", "lr_warmup_iters": 2}, [0.0, 0.5, 1.0, 0.55, 0.1]),
        ({"lr_decay_style": "linear", "lr_warmup_iters": 2, "lr_warmup_init": 0.4}, [0.4, 0.7, 1.0, 0.55, 0.1]),
        ({"lr_decay_style": "linear", "lr_decay_iters": 2}, [1.0, 0.55, 0.1, 0.1, 0.1]),
        ({"lr_decay_style": "cosine", "lr_decay_samples": 16, "min_lr": 0.0}, [1.0, 0.5, 0.0, 0.0, 0.0]),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 1}, [0.0, 1.0, 0.5**0.5, 3**-0.5, 0.5]),
        ({"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 1, "min_lr": 0.6}, [0, 1, 0.5**0.5, 0.6, 0.6]),
        *(
            ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, **style}, [1, 1, 1, half_way, 0.1])
            for style, half_way in (
                ({}, 0.1 + 0.9 * (2**0.5 - 1)),  # the default is exponential: 2 * 0.5^x - 1
                ({"lr_wsd_decay_style": "linear"}, 0.55),
                ({"lr_wsd_decay_style": "cosine"}, 0.55),
                ({"lr_wsd_decay_style": "minus_sqrt"}, 0.1 + 0.9 * (1 - 0.5**0.5)),
            )
        ),
        # a quarter of the annealing, where a cosine is not a line
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "cosine"},
            [1.0, 0.1 + 0.9 * (2 + 2**0.5) / 4, 0.55, 0.1 + 0.9 * (2 - 2**0.5) / 4, 0.1],
        ),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear", "lr_wsd_decay_samples": 8}, [1, 1, 1, 1, 0.1]),
    ],
)
def test_the_rate_at_five_steps(style: dict[str, Any], expected: list[float]) -> None:
    found = [rate for rate, _ in rates(run(**{"train_iters": 4, "lr": 1.0, "min_lr": 0.1, **style}), 8, Position(), 5)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ({}, [0.1] * 5),
        (
            {"start_weight_decay": 0.0, "end_weight_decay": 0.4, "weight_decay_incr_style": "linear"},
            [0, 0.1, 0.2, 0.3, 0.4],
        ),
        (
            {"start_weight_decay": 0.0, "end_weight_decay": 1.0, "weight_decay_incr_style": "cosine"},
            [0.0, (2 - 2**0.5) / 4, 0.5, (2 + 2**0.5) / 4, 1.0],
        ),
    ],
)
def test_the_weight_decay_at_five_steps(style: dict[str, Any], expected: list[float]) -> None:
    found = [decay for _, decay in rates(run(train_iters=4, **style), 8, Position(), 5)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_position_is_read_from_checkpoints_new_and_old(tmp_path: Path) -> None:
    state = {"iteration": 4, "consumed_samples": 16}
    (tmp_path / "training_state.json").write_text(
        json.dumps(state | {"first_batch_size": 4, "counted_in": "iterations", "schedule_total": 32})
    )
    assert Position.of_checkpoint(tmp_path) == Position(4, 16, 4, "iterations", 32)
    (tmp_path / "training_state.json").write_text(json.dumps(state))
    for unit, length in (("iterations", {"train_iters": 8}), ("samples", {"train_samples": 64})):
        dump_yaml(run(**length, global_batch_size=4), tmp_path / "run_config.yaml")
        assert Position.of_checkpoint(tmp_path) == Position(4, 16, 4, unit, None)
    odd = '{"iteration": 1, "consumed_samples": 1, "first_batch_size": "x"}'
    for text in ("", "[]", '{"iteration": "x"}', '{"iteration": null, "consumed_samples": 1}', odd):
        (tmp_path / "training_state.json").write_text(text)
        with pytest.raises(UserError, match=r"training_state\.json is damaged"):
            Position.of_checkpoint(tmp_path)


def test_the_plan_is_told() -> None:
    config = run(train_iters=8, lr=1e-2, lr_warmup_iters=2, global_batch_size=2)
    position = Position(4, 16, 4)
    schedule = plan_schedule(config, 2, position)
    text = describe_plan(config, schedule, position, 8, now=5e-3, peak=1e-2)
    assert "iterations 5 to 8, 2 samples a step: 8 samples, 8192 tokens; 16 samples are done" in text
    assert "now 0.005, peak 0.01; warm-up 2, cosine until 8 iterations" in text
    assert "nothing is left" in describe_plan(config, schedule, Position(8, 32, 4), 8)
    assert "train_iters=8 asks for no more" in describe_plan(config, schedule, Position(9, 32, 4), 9)


def test_lengths_in_iterations_stay_those_of_the_first_batch_in_a_run_of_samples() -> None:
    config = run(train_samples=64, lr_decay_iters=16, lr_warmup_iters=2)
    first = plan_schedule(config, 4)
    assert (first.decay, first.warmup, first.iteration) == (64, 8, 4)
    for batch in (2, 8):
        later = plan_schedule(config, batch, Position(4, 16, first.iteration, "samples"))
        assert (later.decay, later.warmup, later.iteration) == (64, 8, 4)


def test_a_kept_schedule_keeps_the_length_that_decay_of_weights_goes_by() -> None:
    config = run(train_iters=20, use_checkpoint_opt_param_scheduler=True, lr_decay_iters=8)
    assert plan_schedule(config, 4, Position(4, 16, 4, "iterations", 32)).total == 32
    config.checkpoint.use_checkpoint_opt_param_scheduler = False
    assert plan_schedule(config, 4, Position(4, 16, 4, "iterations", 32)).total == 80


def test_a_finished_run_with_a_larger_batch_is_no_error() -> None:
    assert plan_schedule(run(train_iters=1), 8, Position(1, 4, 4, "iterations")).samples == 4


def test_loss_scales_are_of_the_mean_over_tokens() -> None:
    from phd_megatron.training.optimizer import _loss_scale

    config = run(fp16=True, micro_batch_size=4, seq_length=512)
    scales = _loss_scale(config)
    assert (scales["initial_loss_scale"], scales["min_loss_scale"]) == (32.0, 1 / 2048)
    config = run(
        fp16=True, micro_batch_size=4, seq_length=512, loss_scale=4096.0, initial_loss_scale=8192.0, hysteresis=3
    )
    scales = _loss_scale(config)
    assert (scales["loss_scale"], scales["initial_loss_scale"], scales["hysteresis"]) == (2.0, 4.0, 3)
    assert _loss_scale(run(bf16=True)) == {}


def test_a_batch_grows_by_equal_steps_after_equal_numbers_of_samples() -> None:
    """By hand, after Megatron-LM's ``--rampup-batch-size 4 4 20``: to 12 in two steps, after 10 samples each."""
    config = run(train_iters=None, train_samples=96, rampup_batch_size=[4, 4, 20], global_batch_size=12)
    config.training.micro_batch_size = 2
    batches = Batches(config, plan_schedule(config, 12, Position()), ranks=2)
    steps, consumed = [], 0
    while samples := batches.at(consumed):
        steps.append((consumed, samples, batches.microbatches(samples)))
        consumed += samples
    assert steps == [(0, 4, 1), (4, 4, 1), (8, 4, 1), (12, 8, 2), *((at, 12, 3) for at in range(20, 92, 12))]
    assert batches.run_length(Position()) == (len(steps), consumed) and consumed == 92
    assert batches.run_length(Position(iteration=3, consumed_samples=12)) == (len(steps), consumed)
    assert batches.at(92) == 0, "four samples are no batch"
