"""A whole training run: build, resume, train, evaluate, save."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

from phd_megatron.checkpoint.format import TOKENIZER
from phd_megatron.checkpoint.run_directory import RunDirectory, lies_in
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.datasets import build_datasets
from phd_megatron.data.tokenizers import Tokenizer, inherit_generation
from phd_megatron.errors import DIVERGED, UserError
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.cuda_graph import Batch
from phd_megatron.training.interval import Interval, Meter
from phd_megatron.training.metrics import Reporter
from phd_megatron.training.observers.observer import Step
from phd_megatron.training.observers.registry import observers_of
from phd_megatron.training.run_data import Record
from phd_megatron.training.schedule import Batches, Position, plan_schedule
from phd_megatron.training.signals import FINISHED, ExitController
from phd_megatron.training.state import TrainState, open_saver
from phd_megatron.training.step import Stepper, StepResult
from phd_megatron.training.streams import open_stream, with_whole_indices
from phd_megatron.training.validation import Validation


class Trainer:
    """Everything one rank holds during a run.

    Args:
        run: the resolved configuration.
        runtime: device and process groups, already initialised.
        tokenizer: the data's tokenizer.
        resume_from: complete checkpoint to load, or ``None`` to start fresh.
        place: the directory of ``--save``, claimed for this run.
        data: what the data is, for the checkpoints.
    """

    def __init__(
        self,
        run: RunConfig,
        runtime: Runtime,
        tokenizer: Tokenizer,
        resume_from: Path | None,
        place: RunDirectory | None = None,
        data: Record | None = None,
    ) -> None:
        self.run, self.runtime, self.data, self.loaded = run, runtime, data, resume_from
        if resume_from is not None:
            inherit_generation(tokenizer, resume_from / TOKENIZER)
        runtime.watch.at("building the model")
        self.position = Position()
        if resume_from is not None and not run.checkpoint.finetune:
            self.position = Position.of_checkpoint(resume_from)
        assert run.training.global_batch_size is not None  # filled in by `start.complete`
        self.schedule = plan_schedule(run, run.training.global_batch_size, self.position)
        self.batches = Batches(run, self.schedule, runtime.dims.dp)
        self.total_iterations, self._total_samples = self.batches.run_length(self.position)
        self.observers = observers_of(run, runtime, self.position.iteration + 1, self.total_iterations)
        self.state = TrainState(run, runtime, self.schedule)
        with ExitStack() as refused:
            # Hooks of the model hold it, and it the process groups, where nothing that collects garbage can see.
            refused.callback(self.state.let_go)
            self._open(tokenizer, place)
            refused.pop_all()

    def _open(self, tokenizer: Tokenizer, place: RunDirectory | None) -> None:
        """Load the checkpoint and open what a step needs."""
        run, runtime = self.run, self.runtime
        if self.loaded is not None:
            runtime.watch.at("loading the checkpoint")
            self.state.load(self.loaded, self.position)
        size, model = run.training.micro_batch_size, run.model
        self.stepper = Stepper(self.state.engine, runtime.device, size, model.seq_length, model.phd_repeat)
        self.meter = Meter(run, runtime, self.state)
        self.saver = open_saver(run, runtime, tokenizer, place, self.loaded)
        runtime.watch.at("opening the data", self.state.counters.iteration)
        self._open_data(tokenizer)

    def _open_data(self, tokenizer: Tokenizer) -> None:
        run, runtime = self.run, self.runtime
        wanted = (self.schedule.samples, run.training.eval_iters * self.batches.size, 0)
        train, valid, _ = with_whole_indices(lambda: build_datasets(run, tokenizer, wanted), runtime.local_rank)
        assert train is not None  # a run without samples was refused
        if run.data.packing != "none" and runtime.is_main:
            from phd_megatron.data.packed import packing_statistics

            for statistics in packing_statistics(train):
                runtime.log(str(statistics))
        self.train_stream = open_stream(run, runtime, train)
        self.validation: Validation | None = None
        if valid is not None:
            steps = None if self.schedule.step is None else self.total_iterations
            self.validation = Validation(run, runtime, valid, self._total_samples, steps)

    # ---------------------------------------------------------------- the loop

    def train(self, reporter: Reporter, exits: ExitController) -> str:
        """Train to the end or to an exit condition, save, and say in words why it stopped."""
        self.reporter = reporter
        run, counters, watch = self.run, self.state.counters, self.runtime.watch
        first, reason, interval = counters.iteration + 1, FINISHED, Interval()
        last = not self.batches.at(counters.consumed_samples)
        while not last:
            watch.at("the first step" if counters.iteration < first else "a step", counters.iteration + 1)
            before = counters.consumed_samples
            step, grad_norm = self._one_step(interval)
            reporter.advance(counters.iteration)
            last = not self.batches.at(counters.consumed_samples)
            validation, loss = self.validation, None
            if validation is not None and (
                last or validation.is_due(counters.iteration, before, counters.consumed_samples)
            ):
                loss = self._evaluate(validation, interval)
            if counters.iteration % run.logging.log_interval == 0 or loss is not None or last or step.reported:
                self._report(step, grad_norm, loss)
                interval = Interval()
            watch.at("agreeing whether to stop")
            exit_reason = exits.should_exit(counters.iteration)
            if exit_reason and not last:
                reason = exit_reason
                break
            with interval.paused():
                self._save_in_between(last)
        if reason == FINISHED:
            self._refuse_to_have_done_nothing()
        # A checkpoint may hold more than was loaded of it, so it is not saved over as it is.
        if counters.iteration >= first or not lies_in(self.loaded, run.checkpoint.save):
            self.save()
        return reason

    def _one_step(self, interval: Interval) -> tuple[Step, float]:
        """The next step, and the norm of its gradient before clipping."""
        counters = self.state.counters
        samples = self.batches.at(counters.consumed_samples)
        count, log = self.batches.microbatches(samples), self.reporter.log
        step = Step(counters.iteration + 1, count, self.state, self.stepper.groups, interval, log)
        with ExitStack() as stack:
            for observer in self.observers:
                stack.enter_context(observer.around_step(step))
            batches = self._counted(self.train_stream.microbatches(counters.consumed_samples, count), interval)
            look = [partial(observer.on_gradients, step) for observer in self.observers]
            result = self.stepper.train(batches, count, look, step.watched)
            self._count(result, samples, step)
        for observer in self.observers:
            observer.after_step(step)
        return step, result.grad_norm

    def _count(self, result: StepResult, samples: int, step: Step) -> None:
        counters, interval = self.state.counters, step.interval
        counters.iteration = step.iteration
        counters.consumed_samples += samples
        interval.losses.append(result.loss)
        interval.samples += samples
        interval.steps += 1
        interval.microbatches += step.microbatches
        if result.updated:
            self.state.scheduler.step(samples if self.schedule.step is None else self.schedule.step)
        else:
            counters.skipped_iterations += 1
            interval.skipped += 1
        if not math.isfinite(result.grad_norm) and not self.run.training.fp16:
            self._diverged(f"the gradient norm of iteration {step.iteration} is {result.grad_norm}", samples)

    def _counted(self, batches: Iterator[Batch], interval: Interval) -> Iterator[Batch]:
        """Each micro-batch is progress."""
        for batch in batches:
            self.runtime.watch.tick()
            self.meter.count(interval, batch)
            yield batch

    # ---------------------------------------------------------------- evaluation and reports

    def _evaluate(self, validation: Validation, interval: Interval) -> float:
        """Validation loss; its time is in no figure of a step."""
        with interval.paused():
            self.runtime.watch.at("validation")
            loss = validation.loss(self.stepper)
        iteration, perplexity = self.state.counters.iteration, math.exp(min(loss, 20))
        self.reporter.log(f" validation loss at iteration {iteration}: {loss:.6E} | PPL: {perplexity:.6E} |")
        return loss

    def _report(self, step: Step, grad_norm: float, validation_loss: float | None) -> None:
        """Write the row of the interval that ends with a step."""
        interval = step.interval
        self.runtime.synchronize()
        seconds, losses = interval.seconds, interval.mean_losses()
        if not all(map(math.isfinite, losses)) and not self.run.training.fp16:
            self._diverged(
                f"a loss of iterations {step.iteration - interval.steps + 1} to {step.iteration} is "
                f"{next(loss for loss in losses if not math.isfinite(loss))}",
                interval.samples,
            )
        observed = {name: value for o in self.observers for name, value in o.on_report(step).items()}
        self.reporter.report(self.meter.measure(interval, seconds, losses, grad_norm, validation_loss, observed))

    def _diverged(self, what: str, samples: int) -> NoReturn:
        """End the run; every rank comes here with the same numbers."""
        if self.saver is not None:
            self.saver.wait()
        end = self.state.counters.consumed_samples
        known = self.saver.standing if self.saver is not None else "nothing was saved, since there is no --save"
        raise UserError(
            f"{DIVERGED}: {what} (samples {end - samples} to {end - 1}), so nothing more is saved; {known}. Lower lr, "
            "lengthen the warm-up, or skip the batch"
        )

    def _refuse_to_have_done_nothing(self) -> None:
        """A run whose every step overflowed in fp16, or was left out for its gradient norm, is no run."""
        steps, limit = self.state.counters.iteration, self.run.optimizer.grad_norm_skip_threshold
        if steps and self.state.counters.skipped_iterations == steps:
            if limit is not None:
                overflowed = ", or overflowed" if self.run.training.fp16 else ""
                raise UserError(
                    f"none of {steps} steps changed the model: every gradient norm was above "
                    f"grad_norm_skip_threshold={limit:g}{overflowed}; raise it well above the norms that the log shows"
                )
            raise UserError(
                f"none of {steps} steps changed the model: with the loss scale, now {self.state.loss_scale:g} on the "
                "sum over tokens, a gradient overflowed each time; train longer, lower initial_loss_scale or "
                "loss_scale, or use bf16"
            )

    # ---------------------------------------------------------------- saving

    def _save_in_between(self, last: bool) -> None:
        """Save where it is due; the end of the run has a save of its own."""
        options, iteration = self.run.checkpoint, self.state.counters.iteration
        if options.save_interval and iteration % options.save_interval == 0 and not last:
            self.save(background=options.async_save, patient=True)
        elif self.saver is not None:
            self.saver.poll()

    def save(self, background: bool = False, patient: bool = False) -> None:
        """Write a checkpoint of the present state; in the background it is complete some steps later."""
        if self.saver is not None:
            self.runtime.watch.at("saving")
            self.state.save(self.saver, self.data, background=background, patient=patient)

    def close(self) -> None:
        """End observers, the saver's thread and data workers, forget the batch sizes, and let go of the model."""
        for observer in self.observers:
            observer.close()
        if self.saver is not None:
            self.saver.close()
        self.train_stream.close()
        if self.validation is not None:
            self.validation.close()
        self.state.let_go()
