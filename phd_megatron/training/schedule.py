"""How long a run is, where it stands, and what its learning rate goes by.

A run that is given in iterations is counted in iterations: what remains is ``train_iters`` less those done, and its
schedule moves by one iteration a step, whatever the batch. A run that is given in samples is counted in samples.
Megatron-Core's scheduler counts samples, so an iteration is for it always the batch that the run began with
(``Position.first_batch_size``): another ``global_batch_size`` on resume neither skips nor repeats a part of the run,
and no learning rate jumps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.checkpoint.load import read_training_state
from phd_megatron.checkpoint.status import own_config
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import load_yaml
from phd_megatron.errors import UserError


@dataclass(frozen=True)
class Position:
    """Where a run stands when it starts, as its checkpoint says.

    Attributes:
        first_batch_size: ``global_batch_size`` of the run's first start; None before that.
        counted_in: what the run was counted in: ``iterations`` or ``samples``.
        schedule_total: how long it was to be, as the schedule counts.
    """

    iteration: int = 0
    consumed_samples: int = 0
    first_batch_size: int | None = None
    counted_in: str | None = None
    schedule_total: int | None = None

    @classmethod
    def of_checkpoint(cls, path: Path) -> Position:
        """Read a complete checkpoint's. Raises UserError for a file that is damaged."""
        state = read_training_state(path)
        first, counted, total = (state.get(n) for n in ("first_batch_size", "counted_in", "schedule_total"))
        if first is None and (saved := own_config(path)) is not None:  # of an earlier release
            training = load_yaml(saved).training
            first = training.global_batch_size
            counted = "samples" if training.train_samples is not None else "iterations"
        return cls(state["iteration"], state["consumed_samples"], first, counted, total)


@dataclass(frozen=True)
class Schedule:
    """Lengths of the run and of its schedule.

    Attributes:
        samples: training samples that are read by the end of the run, those before it started included.
        step: by how much the schedule moves with a step; None where it is the samples of that step.
        iteration: samples that an iteration is for the schedule.
        total: the run's length as the schedule counts, as are ``warmup``, ``decay`` and ``wsd_decay``; of a schedule
            that is kept the length that it had.
    """

    samples: int
    step: int | None
    iteration: int
    total: int
    decay: int
    warmup: int
    wsd_decay: int | None

    @property
    def counted_in(self) -> str:
        """What the run is counted in."""
        return "samples" if self.step is None else "iterations"

    def at(self, iteration: int, consumed_samples: int) -> int:
        """Where the schedule stands there, if no step was skipped."""
        return consumed_samples if self.step is None else iteration * self.step


def plan_schedule(run: RunConfig, global_batch_size: int, position: Position | None = None) -> Schedule:
    """Bring iterations, samples, tokens and fractions to what the schedule counts.

    Raises:
        UserError: when a warm-up does not fit into the decay, the run is shorter than one batch, or a ramp-up does not
            reach the global batch size.
    """
    training, position = run.training, position or Position()
    first_batch = _check_ramp_up(training.rampup_batch_size, global_batch_size)
    of_iteration = position.first_batch_size or global_batch_size
    step: int | None = None
    if training.train_samples is not None:
        total = samples_at_end = training.train_samples
    elif training.train_iters is not None:
        if training.rampup_batch_size is not None:
            raise UserError("rampup_batch_size with train_iters: the steps have no fixed size; give train_samples")
        step = of_iteration
        total = training.train_iters * step
        left = max(0, training.train_iters - position.iteration)
        samples_at_end = position.consumed_samples + left * global_batch_size
    else:
        raise UserError("train_iters and train_samples are both missing: set one of them")
    if samples_at_end < first_batch and not position.iteration:
        raise UserError(
            f"train_samples={samples_at_end} is less than one batch of {first_batch} samples; raise it to "
            f"{first_batch} or more"
        )
    kept = total
    if run.checkpoint.use_checkpoint_opt_param_scheduler and position.schedule_total is not None:
        kept = position.schedule_total
    return Schedule(samples_at_end, step, of_iteration, kept, *_plan_rates(run, total, of_iteration))


def _plan_rates(run: RunConfig, total: int, of_iteration: int) -> tuple[int, int, int | None]:
    """Samples of the decay, of the warm-up, and of WSD's decay where there is one."""
    optimizer = run.optimizer

    def length(iters: int | None, samples: int | None, default: int) -> int:
        return samples if samples is not None else iters * of_iteration if iters is not None else default

    decay = length(optimizer.lr_decay_iters, optimizer.lr_decay_samples, total)
    if optimizer.lr_warmup_fraction is not None:
        warmup = int(optimizer.lr_warmup_fraction * decay)
    else:
        warmup = (
            optimizer.lr_warmup_iters * of_iteration
            + optimizer.lr_warmup_samples
            + math.ceil(optimizer.lr_warmup_tokens / run.model.seq_length)
        )
    if warmup >= decay:
        raise UserError(
            f"the warm-up of {warmup} samples is not shorter than the decay of {decay} samples; shorten "
            "lr_warmup_iters / lr_warmup_samples / lr_warmup_tokens, or lengthen the run"
        )
    wsd = None
    if optimizer.lr_decay_style == "WSD":
        wsd = length(optimizer.lr_wsd_decay_iters, optimizer.lr_wsd_decay_samples, max(decay // 10, 1))
    return decay, warmup, wsd


def _check_ramp_up(ramp: list[int] | None, global_batch_size: int) -> int:
    """Samples of the first step."""
    if ramp is None:
        return global_batch_size
    start, increment, _ = ramp
    missing = global_batch_size - start
    if missing <= 0 or missing % increment:
        raise UserError(
            f"rampup_batch_size={ramp}: steps of {increment} from {start} do not end at "
            f"global_batch_size={global_batch_size}; start below it, with an increment that divides the difference"
        )
    return start


def describe_plan(run: RunConfig, schedule: Schedule, position: Position, last_iteration: int, **rates: float) -> str:
    """What this start of the run will do, in two lines.

    Args:
        last_iteration: the run's last step, ramp-up included.
        rates: what the learning rate is at named moments.
    """
    training, optimizer = run.training, run.optimizer
    left = schedule.samples - position.consumed_samples
    tokens = left * run.model.seq_length
    if last_iteration <= position.iteration:
        asked = f"train_iters={training.train_iters}"
        if training.train_samples is not None:
            asked = f"train_samples={training.train_samples}"
        done = f"{position.iteration} iterations and {position.consumed_samples} samples are done"
        return f"plan: nothing is left to train: {done}, and {asked} asks for no more"
    batch = f"{training.global_batch_size} samples a step"
    if training.rampup_batch_size is not None:
        batch = f"up to {batch} (rampup_batch_size={training.rampup_batch_size})"
    unit = schedule.step or 1
    until = f"{optimizer.lr_decay_style} until {schedule.decay / unit:g} {schedule.counted_in}"
    lengths = f"warm-up {schedule.warmup / unit:g}, {until}"
    told = ", ".join(f"{when} {rate:.3g}" for when, rate in rates.items())
    return (
        f"plan: iterations {position.iteration + 1} to {last_iteration}, {batch}: {left} samples, {tokens} tokens; "
        f"{position.consumed_samples} samples are done\n"
        f"learning rate: {told}; {lengths}"
    )


class Batches:
    """The global batches of a run, one after the other; their size may grow over the first samples.

    It grows as in Megatron-LM (``--rampup-batch-size START INCREMENT SAMPLES``), by equal steps after equal numbers of
    samples. Megatron-Core's own calculator ignores a ramp-up since 0.18.

    Args:
        run: the resolved configuration.
        schedule: of this start.
        ranks: data-parallel ones.

    Attributes:
        size: samples of a step, after the ramp-up if there is one.
    """

    def __init__(self, run: RunConfig, schedule: Schedule, ranks: int) -> None:
        training = run.training
        assert training.global_batch_size is not None  # filled in by `start.complete`
        self._samples, self._ramp, self.size = schedule.samples, training.rampup_batch_size, training.global_batch_size
        self._at_a_time = training.micro_batch_size * ranks

    def at(self, consumed_samples: int) -> int:
        """Samples of the step that starts there; 0 at the end, where less than a batch is left out as in Megatron."""
        samples = self._size_at(consumed_samples)
        return samples if consumed_samples + samples <= self._samples else 0

    def microbatches(self, samples: int) -> int:
        """Micro-batches of each data-parallel rank in a step of so many samples."""
        return samples // self._at_a_time

    def _size_at(self, consumed_samples: int) -> int:
        if self._ramp is None or consumed_samples > self._ramp[2]:
            return self.size
        start, increment, over = self._ramp
        # Divided as Megatron does, by a float, so that a run goes on there with the same batches.
        return start + int(consumed_samples / (over / ((self.size - start) // increment))) * increment

    def run_length(self, position: Position) -> tuple[int, int]:
        """Steps of the whole run and the samples that they take: those done, and those to come with their ramp."""
        steps, consumed = position.iteration, position.consumed_samples
        while self._ramp is not None and consumed <= self._ramp[2] and (samples := self.at(consumed)):
            consumed += samples
            steps += 1
        rest = max(0, self._samples - consumed) // self.size
        return steps + rest, consumed + rest * self.size
