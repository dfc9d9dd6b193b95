"""What changes as a run trains and its checkpoints hold: models, optimizer, schedule of its rates, counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from phd_megatron.checkpoint.load import load_checkpoint
from phd_megatron.checkpoint.run_directory import RunDirectory
from phd_megatron.checkpoint.saver import CheckpointSaver
from phd_megatron.config.architecture import padded_vocab_size
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.tokenizers import Tokenizer
from phd_megatron.model.build import build_model
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.engine import Engine, HasGroups, build_engine
from phd_megatron.training.optimizer import build_scheduler, learning_rate
from phd_megatron.training.run_data import Record
from phd_megatron.training.schedule import Position, Schedule


@dataclass
class Counters:
    """How far a run is: ``training_state.json`` of its checkpoints. Data order follows from ``consumed_samples``."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    # what :class:`~phd_megatron.training.schedule.Position` reads
    first_batch_size: int | None = None
    counted_in: str | None = None
    schedule_total: int | None = None


class TrainState:
    """What changes as a run trains, on one rank.

    Args:
        run: the resolved configuration.
        runtime: device and process groups.
        schedule: of this start.

    Attributes:
        engine: what holds and updates the model.
        model_config: the configuration that the chunks share.
    """

    def __init__(self, run: RunConfig, runtime: Runtime, schedule: Schedule) -> None:
        assert run.model.vocab_size is not None  # filled in by `start.complete`
        self._run, self._runtime, self._schedule = run, runtime, schedule
        models = build_model(run, run.model.vocab_size, runtime.device)
        self.model_config = models[0].config
        if run.model.phd_repeat > 1 and self.model_config.copies_dropped_at_head:
            runtime.log("note: the head has a pipeline stage of its own, so the last decoder layer computes all copies")
        self.padded_vocab_size = padded_vocab_size(run.model.vocab_size, run.model.make_vocab_size_divisible_by)
        self.engine: Engine = build_engine(models, run, runtime.device, runtime.log)
        self.scheduler: OptimizerParamScheduler = build_scheduler(self.optimizer, run, schedule)
        self.counters = Counters(
            first_batch_size=schedule.iteration, counted_in=schedule.counted_in, schedule_total=schedule.total
        )

    @property
    def models(self) -> Sequence[MegatronModule]:
        """The wrapped model chunks of this rank."""
        return self.engine.models

    @property
    def optimizer(self) -> HasGroups:
        """Whose rates the schedule sets."""
        return self.engine.optimizer

    @property
    def learning_rate(self) -> float:
        """Of the next step, of the parameters that have no rate of their own."""
        return learning_rate(self.optimizer, self._run)

    @property
    def loss_scale(self) -> float:
        """What the loss of the next step is multiplied by (float16), and its gradients with it."""
        return self.engine.loss_scale()

    def load(self, path: Path, position: Position) -> None:
        """Take over a checkpoint, or of one that is finetuned the parameters alone; collective.

        Args:
            position: what the checkpoint says of its run.

        Raises:
            UserError: on all ranks, for a checkpoint that is damaged or of another model.
        """
        run, counters = self._run, self.counters
        with self.engine.state(loading=True) as (models, optimizer):
            found = load_checkpoint(
                path,
                models=models,
                optimizer=optimizer,
                scheduler=self.scheduler,
                run_config=run,
                runtime=self._runtime,
                load_optimizer=not (run.checkpoint.finetune or run.checkpoint.no_load_optim),
                load_rng=not (run.checkpoint.finetune or run.checkpoint.no_load_rng),
                verify=run.checkpoint.verify_checkpoint,
            )
        if run.checkpoint.finetune:
            return
        counters.iteration, counters.consumed_samples = found["iteration"], found["consumed_samples"]
        counters.skipped_iterations = found.get("skipped_iterations", 0)
        if run.checkpoint.no_load_optim or position.counted_in not in (None, self._schedule.counted_in):
            self.scheduler.num_steps = self._schedule.at(counters.iteration, counters.consumed_samples)
            self.scheduler.step(0)

    def save(self, saver: CheckpointSaver, data: Record | None, *, background: bool, patient: bool) -> None:
        """Write a checkpoint; the arguments are those of :meth:`CheckpointSaver.save`, ``data`` what was trained on."""
        with self.engine.state(loading=False) as (models, optimizer):
            saver.save(
                iteration=self.counters.iteration,
                models=models,
                optimizer=optimizer,
                scheduler=self.scheduler,
                training_state={**vars(self.counters), **({} if data is None else {"data": data})},
                background=background,
                patient=patient,
            )

    def let_go(self) -> None:
        """Free what the models hold; they cannot be used afterwards."""
        self.engine.let_go()


def open_saver(
    run: RunConfig, runtime: Runtime, tokenizer: Tokenizer, place: RunDirectory | None, loaded: Path | None
) -> CheckpointSaver | None:
    """What :meth:`TrainState.save` saves with; ``None`` for a run without ``--save``.

    Args:
        place: the directory of ``--save``, claimed for this run.
        loaded: the checkpoint that the run went on from.
    """
    options = run.checkpoint
    if options.save is None:
        return None
    return CheckpointSaver(
        options.save,
        run_config=run,
        tokenizer=tokenizer,
        runtime=runtime,
        keep_last=options.keep_last,
        place=place,
        loaded=loaded,
    )
