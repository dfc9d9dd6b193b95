"""A whole training run: build, resume, train, evaluate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron.core import num_microbatches_calculator as microbatches
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from phd_megatron.checkpoint.format import TOKENIZER
from phd_megatron.checkpoint.load import load_checkpoint
from phd_megatron.checkpoint.run_directory import RunDirectory, lies_in
from phd_megatron.checkpoint.saver import CheckpointSaver
from phd_megatron.config.architecture import padded_vocab_size
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.datasets import build_datasets
from phd_megatron.data.tokenizers import Tokenizer, inherit_generation
from phd_megatron.errors import DIVERGED, UserError
from phd_megatron.model.attention import context_parallel_bytes
from phd_megatron.model.build import build_model
from phd_megatron.planning.flops import forward_flops
from phd_megatron.planning.peak import peak_tflops
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.cuda_graph import StepGraph
from phd_megatron.training.index_check import with_whole_indices
from phd_megatron.training.metrics import Reporter, StepMetrics
from phd_megatron.training.observers.gradient_dump import check_places, check_steps, dump_gradients, iteration_place
from phd_megatron.training.observers.layer_statistics import LayerStatistics, is_due
from phd_megatron.training.observers.profiler import StepProfiler
from phd_megatron.training.observers.router_metrics import collect_router_metrics
from phd_megatron.training.optimizer import (
    build_optimizer,
    build_scheduler,
    learning_rate,
    let_go,
    wrap_data_parallel,
)
from phd_megatron.training.progress import Interval, Progress
from phd_megatron.training.run_data import Record
from phd_megatron.training.schedule import Position, Schedule, describe_plan, plan_schedule
from phd_megatron.training.signals import FINISHED, ExitController
from phd_megatron.training.step import Stepper
from phd_megatron.training.streams import open_stream
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
        self.data, self.loaded = data, resume_from
        self.run, self.runtime, self.tokenizer = run, runtime, tokenizer
        if run.logging.dump_gradients_dir:
            check_places(run.logging.dump_gradients_dir, run.logging.dump_gradients_iterations, runtime.world_size)
        if resume_from is not None:
            inherit_generation(tokenizer, resume_from / TOKENIZER)
        dims = runtime.dims
        assert run.training.global_batch_size is not None and run.model.vocab_size is not None
        self.global_batch_size = run.training.global_batch_size
        runtime.watch.at("building the model")
        self.position = Position()
        if resume_from is not None and not run.checkpoint.finetune:
            self.position = Position.of_checkpoint(resume_from)
        self.schedule: Schedule = plan_schedule(run, self.global_batch_size, self.position)
        microbatches.reconfigure_num_microbatches_calculator(
            runtime.rank,
            run.training.rampup_batch_size,
            self.global_batch_size,
            run.training.micro_batch_size,
            dims.dp,
        )
        self.total_iterations, self._total_samples = self._run_length()
        if run.logging.dump_gradients_dir:
            steps = run.logging.dump_gradients_iterations
            if note := check_steps(steps, self.position.iteration + 1, self.total_iterations):
                runtime.log(note)
        models = build_model(run, run.model.vocab_size, runtime.device)
        config = models[0].config
        self.flops_model = replace(run.model, phd_last_layer_pruning=config.phd_last_layer_pruning)
        if run.model.phd_repeat > 1 and config.copies_dropped_at_head:
            runtime.log("note: the head has a pipeline stage of its own, so the last decoder layer computes all copies")
        self.padded_vocab_size = padded_vocab_size(run.model.vocab_size, run.model.make_vocab_size_divisible_by)
        self.models: list[DistributedDataParallel] = wrap_data_parallel(models, run)
        self.optimizer: MegatronOptimizer = build_optimizer(self.models, run)
        self.scheduler: OptimizerParamScheduler = build_scheduler(self.optimizer, run, self.schedule)
        schedule = self.schedule
        self.progress = Progress(
            first_batch_size=schedule.iteration, counted_in=schedule.counted_in, schedule_total=schedule.total
        )
        if resume_from is not None:
            runtime.watch.at("loading the checkpoint")
            self._resume(resume_from)
        self.stepper = Stepper(
            self.models,
            self.optimizer,
            runtime.device,
            run.training.micro_batch_size,
            run.model.seq_length,
            run.model.phd_repeat,
            StepGraph.of_run(run, self.models, runtime.device, runtime.log),
        )
        self.saver = self._open_saver(place, resume_from)
        runtime.watch.at("opening the data", self.progress.iteration)
        self._open_data()
        self.profiler: StepProfiler | None = None
        if run.logging.profile:
            self.profiler = StepProfiler.of_run(run, runtime, self.progress.iteration, self.total_iterations)

    def _resume(self, path: Path) -> None:
        run = self.run
        state = load_checkpoint(
            path,
            models=self.models,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            run_config=run,
            runtime=self.runtime,
            load_optimizer=not (run.checkpoint.finetune or run.checkpoint.no_load_optim),
            load_rng=not (run.checkpoint.finetune or run.checkpoint.no_load_rng),
            verify=run.checkpoint.verify_checkpoint,
        )
        if run.checkpoint.finetune:
            return
        self.progress.iteration, self.progress.consumed_samples = state["iteration"], state["consumed_samples"]
        self.progress.skipped_iterations = state.get("skipped_iterations", 0)
        if run.checkpoint.no_load_optim or self.position.counted_in not in (None, self.schedule.counted_in):
            self.scheduler.num_steps = self.schedule.at(self.progress.iteration, self.progress.consumed_samples)
            self.scheduler.step(0)

    def _open_data(self) -> None:
        run = self.run
        eval_samples = run.training.eval_iters * self.global_batch_size
        wanted = (self.schedule.samples, eval_samples, 0)
        train, valid, _ = with_whole_indices(
            lambda: build_datasets(run, self.tokenizer, wanted), self.runtime.local_rank
        )
        self.train_stream = open_stream(run, self.runtime, train)
        self.validation: Validation | None = None
        if valid is not None:
            steps = None if self.schedule.step is None else self.total_iterations
            self.validation = Validation(run, self.runtime, valid, self._total_samples, steps)

    # ---------------------------------------------------------------- the loop

    def train(self, reporter: Reporter, exits: ExitController) -> str:
        """Train to the end or to an exit condition, save, and say in words why it stopped."""
        run, progress = self.run, self.progress
        self.reporter = reporter
        interval = Interval(time.perf_counter())
        reason = FINISHED
        last = self._next_batch(progress.consumed_samples) == 0
        first_iteration = progress.iteration + 1
        watch = self.runtime.watch
        while not last:
            watch.at("the first step" if progress.iteration < first_iteration else "a step", progress.iteration + 1)
            before = progress.consumed_samples
            if self.profiler is None:
                grad_norm = self._one_step(interval)
            else:
                with self.profiler.step(progress.iteration + 1):
                    grad_norm = self._one_step(interval)
                interval.started += self.profiler.seconds_spent()  # not the time of a training step
            if progress.iteration == first_iteration:
                self._report_exchange()
            reporter.advance(progress.iteration)
            last = self._next_batch(progress.consumed_samples) == 0
            validation = self.validation
            evaluate = validation is not None and (
                last or validation.is_due(progress.iteration, before, progress.consumed_samples)
            )
            validation_loss = self._evaluate(validation, interval) if validation is not None and evaluate else None
            if progress.iteration % run.logging.log_interval == 0 or evaluate or last or interval.layer_statistics:
                self._report(interval, grad_norm, validation_loss)
                interval = Interval(time.perf_counter())
            watch.at("agreeing whether to stop")
            exit_reason = exits.should_exit(progress.iteration)
            if exit_reason and not last:
                reason = exit_reason
                break
            started = time.perf_counter()
            if run.checkpoint.save_interval and progress.iteration % run.checkpoint.save_interval == 0 and not last:
                self.save(background=run.checkpoint.async_save, patient=True)
            elif self.saver is not None:
                self.saver.poll()
            interval.started += time.perf_counter() - started  # not the time of a training step
        if reason == FINISHED:
            self._refuse_to_have_done_nothing()
        # A checkpoint may hold more than was loaded of it, so it is not saved over as it is.
        if progress.iteration >= first_iteration or not lies_in(self.loaded, run.checkpoint.save):
            self.save()
        return reason

    def _refuse_to_have_done_nothing(self) -> None:
        """A run in fp16 whose every step overflowed is no run."""
        steps = self.progress.iteration
        if steps and self.progress.skipped_iterations == steps:
            raise UserError(
                f"none of {steps} steps changed the model: with the loss scale, now "
                f"{float(self.optimizer.get_loss_scale()):g} on the sum over tokens, a gradient overflowed each time; "
                "train longer, lower initial_loss_scale or loss_scale, or use bf16"
            )

    def _next_batch(self, consumed_samples: int) -> int:
        """Samples of the step that starts there; 0 at the end, where less than a batch is left out as in Megatron."""
        microbatches.update_num_microbatches(consumed_samples, consistency_check=False)
        samples = microbatches.get_current_global_batch_size()
        return samples if consumed_samples + samples <= self.schedule.samples else 0

    def _run_length(self) -> tuple[int, int]:
        """Steps of the whole run and the samples that they take: those done, and those to come with their ramp."""
        ramp = self.run.training.rampup_batch_size
        steps, consumed = self.position.iteration, self.position.consumed_samples
        while ramp is not None and consumed <= ramp[2] and (samples := self._next_batch(consumed)):
            consumed += samples
            steps += 1
        rest = max(0, self.schedule.samples - consumed) // self.global_batch_size
        return steps + rest, consumed + rest * self.global_batch_size

    def _one_step(self, interval: Interval) -> float:
        progress, logging = self.progress, self.run.logging
        samples = self._next_batch(progress.consumed_samples)
        count = microbatches.get_num_microbatches()
        iteration = progress.iteration + 1
        groups = self.stepper.groups
        on_gradients: list[Callable[[], None]] = []
        if logging.dump_gradients_dir and iteration in logging.dump_gradients_iterations:
            directory = iteration_place(logging.dump_gradients_dir, iteration)
            on_gradients.append(partial(dump_gradients, self.models, directory, self.runtime.rank, groups.dp_cp))
        batches = self._counted(self.train_stream.microbatches(progress.consumed_samples, count))
        if is_due(logging.log_layer_statistics, iteration):
            statistics = LayerStatistics(self.models, groups, self.run.model.seq_length)
            on_gradients.append(statistics.take_gradients)
            scale = float(self.optimizer.get_loss_scale())  # of this step; the optimizer may change it
            with statistics.watching():
                result = self.stepper.train(batches, count, on_gradients, watched=True)
            interval.layer_statistics = statistics.collect(self.models[0].config.num_layers, scale)
        else:
            result = self.stepper.train(batches, count, on_gradients)
        progress.iteration = iteration
        progress.consumed_samples += samples
        interval.losses.append(result.loss)
        interval.samples += samples
        interval.steps += 1
        interval.microbatches += count
        if result.updated:
            self.scheduler.step(samples if self.schedule.step is None else self.schedule.step)
        else:
            progress.skipped_iterations += 1
            interval.skipped += 1
        if not math.isfinite(result.grad_norm) and not self.run.training.fp16:
            self._diverged(f"the gradient norm of iteration {iteration} is {result.grad_norm}", samples)
        return result.grad_norm

    def _diverged(self, what: str, samples: int) -> NoReturn:
        """End the run; every rank comes here with the same numbers."""
        if self.saver is not None:
            self.saver.wait()
        end = self.progress.consumed_samples
        known = self.saver.standing if self.saver is not None else "nothing was saved, since there is no --save"
        raise UserError(
            f"{DIVERGED}: {what} (samples {end - samples} to {end - 1}), so nothing more is saved; {known}. Lower lr, "
            "lengthen the warm-up, or skip the batch"
        )

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Each micro-batch is progress."""
        for batch in batches:
            self.runtime.watch.tick()
            yield batch

    # ---------------------------------------------------------------- evaluation and reports

    def plan(self) -> str:
        """What this start will do, in words."""
        run = self.run
        return describe_plan(
            run,
            self.schedule,
            self.position,
            self.total_iterations,
            now=learning_rate(self.optimizer, run),
            peak=run.optimizer.lr,
        )

    def _evaluate(self, validation: Validation, interval: Interval) -> float:
        """Validation loss; its time is in no figure of a step."""
        started = time.perf_counter()
        self.runtime.watch.at("validation")
        loss = validation.loss(self.stepper)
        interval.started += time.perf_counter() - started
        perplexity = math.exp(min(loss, 20))
        self.reporter.log(
            f" validation loss at iteration {self.progress.iteration}: {loss:.6E} | PPL: {perplexity:.6E} |"
        )
        return loss

    def _report(self, interval: Interval, grad_norm: float, validation_loss: float | None) -> None:
        run, progress = self.run, self.progress
        self.runtime.synchronize()
        seconds = time.perf_counter() - interval.started
        losses = [total / tokens for total, tokens in (loss.tolist() for loss in interval.losses)]
        if not all(map(math.isfinite, losses)) and not run.training.fp16:
            self._diverged(
                f"a loss of iterations {progress.iteration - interval.steps + 1} to {progress.iteration} is "
                f"{next(loss for loss in losses if not math.isfinite(loss))}",
                interval.samples,
            )
        tokens_per_second = interval.samples * run.model.seq_length / seconds
        flops = forward_flops(self.flops_model, self.padded_vocab_size).training  # of one sample
        tflops = flops * interval.samples / seconds / self.runtime.world_size / 1e12
        peak = peak_tflops(run.logging.peak_tflops, self.runtime.device_name)
        self.reporter.report(
            StepMetrics(
                iteration=progress.iteration,
                consumed_samples=progress.consumed_samples,
                consumed_tokens=progress.consumed_samples * run.model.seq_length,
                consumed_flops=float(progress.consumed_samples * flops),
                lm_loss=sum(losses) / len(losses),
                grad_norm=grad_norm,
                learning_rate=learning_rate(self.optimizer, run),
                global_batch_size=interval.samples // interval.steps,
                iteration_seconds=seconds / interval.steps,
                tokens_per_second=tokens_per_second,
                processed_tokens_per_second=tokens_per_second * run.model.phd_repeat,
                tflops_per_gpu=tflops,
                mfu=None if peak is None else tflops / peak,
                skipped_iterations=interval.skipped,
                validation_loss=validation_loss,
                layer_statistics=interval.layer_statistics,
                router=collect_router_metrics(
                    self.models, run.model, interval.microbatches * self.runtime.dims.dp, self.runtime.device
                ),
            )
        )

    def _report_exchange(self) -> None:
        """Say once what the first step sent between context-parallel ranks, as counted."""
        steps = microbatches.get_num_microbatches()
        for layer, sent in context_parallel_bytes(self.models).items():
            kinds = ", ".join(f"{kind} {count // steps}" for kind, count in sent.items() if count)
            self.reporter.log(f"context parallelism: bytes sent in layer {layer} per micro-batch: {kinds}")

    # ---------------------------------------------------------------- saving

    def _open_saver(self, place: RunDirectory | None, loaded: Path | None) -> CheckpointSaver | None:
        options = self.run.checkpoint
        if options.save is None:
            return None
        return CheckpointSaver(
            options.save,
            run_config=self.run,
            tokenizer=self.tokenizer,
            runtime=self.runtime,
            keep_last=options.keep_last,
            place=place,
            loaded=loaded,
        )

    def save(self, background: bool = False, patient: bool = False) -> None:
        """Write a checkpoint of the present state; in the background it is complete some steps later."""
        if self.saver is not None:
            self.runtime.watch.at("saving")
            self.saver.save(
                iteration=self.progress.iteration,
                models=self.models,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                training_state={**vars(self.progress), **({} if self.data is None else {"data": self.data})},
                background=background,
                patient=patient,
            )

    def close(self) -> None:
        """End the saver's thread and data workers, forget the global batch-size calculator, and let go of the model."""
        if self.profiler is not None:
            self.profiler.close()
        if self.saver is not None:
            self.saver.close()
        self.train_stream.close()
        if self.validation is not None:
            self.validation.close()
        microbatches.destroy_num_microbatches_calculator()
        let_go(self.models)
