"""A run whose ranks are connected: its data, its directory, the checkpoint that it goes on from; then it trains."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.checkpoint.load import find_checkpoint, lock_save_dir
from phd_megatron.checkpoint.run_directory import RunDirectory, claim
from phd_megatron.checkpoint.run_file import new_id
from phd_megatron.checkpoint.store import iteration_of
from phd_megatron.config.schema import CheckpointConfig, RunConfig
from phd_megatron.data.tokenizers import Tokenizer
from phd_megatron.runtime import agreement
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.metrics import open_reporter, run_of_rows
from phd_megatron.training.pretrain import Trainer
from phd_megatron.training.run_data import Record, agree_on_data, compare_data
from phd_megatron.training.schedule import describe_plan
from phd_megatron.training.signals import ExitController, record_stop


@dataclass(frozen=True)
class OpenRun:
    """What stands on disk before a model is built.

    Attributes:
        data: what the run trains on.
        resume_from: the checkpoint that it goes on from.
        place: the directory of ``--save``, this run's own.
        run_id: whose rows those of the metrics file are.
    """

    data: Record
    resume_from: Path | None
    place: RunDirectory | None
    run_id: str


def train(config: RunConfig, runtime: Runtime, tokenizer: Tokenizer) -> None:
    """Train to the end, or until something asks to stop; collective.

    Args:
        config: completed.
        runtime: of the connected ranks.

    Raises:
        UserError: on all ranks, for data, checkpoints or directories that are not what the run needs, and for a run
            that diverges.
        RunLost: when a rank is lost.
    """
    agreement.set_timeout(config.parallel.distributed_timeout_minutes)
    with ExitStack() as stack, runtime.naming_lost_ranks():
        found = _open_run(config, runtime, tokenizer, stack)
        trainer = Trainer(config, runtime, tokenizer, found.resume_from, found.place, found.data)
        stack.callback(trainer.close)
        # Rank 0 opens files; when it cannot, every rank says so instead of waiting for it.
        reporter = agreement.everywhere(
            lambda: open_reporter(config, runtime.is_main, trainer.total_iterations, found.run_id)
        )
        stack.callback(reporter.close)
        counters = trainer.state.counters
        exits = stack.enter_context(
            ExitController(
                exit_duration_in_mins=config.training.exit_duration_in_mins,
                exit_interval=config.training.exit_interval,
                first_iteration=counters.iteration,
            )
        )
        parameters = sum(p.numel() for model in trainer.state.models for p in model.parameters())
        begin = f"training from iteration {counters.iteration}"
        reporter.log(f"{parameters / 1e6:.2f}M parameters on this rank; {begin}")
        rates = {"now": trainer.state.learning_rate, "peak": config.optimizer.lr}
        reporter.log(describe_plan(config, trainer.schedule, trainer.position, trainer.total_iterations, **rates))
        reason = trainer.train(reporter, exits)
        reporter.log(f"stopped at iteration {counters.iteration}: {reason}")
        record_stop(reason, runtime.local_rank)


def _open_run(config: RunConfig, runtime: Runtime, tokenizer: Tokenizer, stack: ExitStack) -> OpenRun:
    """Read the data, then find a checkpoint and claim the directory while its lock is held, until ``stack`` ends."""
    checkpoint = config.checkpoint
    runtime.watch.at("looking at the data")
    data = agree_on_data(config, tokenizer, (1, config.training.eval_iters, 0), runtime.local_rank)
    runtime.watch.at("claiming the save directory")
    lock = lock_save_dir(checkpoint.save) if checkpoint.save is not None else None
    if lock is not None:
        stack.callback(lock.release)
    resume_from = None
    if checkpoint.load is not None:
        needed_by, save_dir = _needs_a_checkpoint(checkpoint), checkpoint.save
        resume_from = find_checkpoint(checkpoint.load, log=runtime.log, needed_by=needed_by, save_dir=save_dir)
    if resume_from is not None:
        found = resume_from
        for note in agreement.from_rank_zero(lambda: compare_data(found, data, config)):
            runtime.log(f"note: {note}")
    place = None
    if checkpoint.save is not None:
        place = claim(
            checkpoint.save,
            lock,
            resume_from=resume_from,
            finetune=checkpoint.finetune,
            rewind=checkpoint.rewind,
            load=checkpoint.load,
            log=runtime.log,
        )
    rows, run_id = config.logging.metrics_file, place.run if place is not None else new_id()
    if rows is not None:
        begins = checkpoint.finetune or resume_from is None or iteration_of(resume_from) == 0
        run_id = agreement.from_rank_zero(lambda: run_of_rows(rows, run_id, begins=begins))
    return OpenRun(data, resume_from, place, run_id)


def _needs_a_checkpoint(checkpoint: CheckpointConfig) -> str | None:
    names = ("exit_on_missing_checkpoint", "finetune", "rewind")  # without one the others are those of a first start
    return next((name for name in names if getattr(checkpoint, name)), None)
