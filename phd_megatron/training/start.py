"""From the words of a command line to a run that trains: everything that can be refused is refused on the way."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phd_megatron.config.help import format_config
from phd_megatron.config.load import LoadedConfig, load_run_config
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import CheckpointConfig, RunConfig
from phd_megatron.config.serialize import read_yaml, to_dict
from phd_megatron.config.validate import require_for_pretraining
from phd_megatron.errors import UserError
from phd_megatron.planning.fit import refuse_what_cannot_fit
from phd_megatron.runtime.capabilities import probe
from phd_megatron.runtime.context import Runtime, choose_device, install_backend
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.implementations import table
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.requirements import require

if TYPE_CHECKING:
    from phd_megatron.data.tokenizers import Tokenizer
    from phd_megatron.training.schedule import Position


def run(argv: list[str]) -> int:
    """Everything that can be refused is refused before a process group, a model or a file exists."""
    environment = Environment.read()
    device = choose_device(asked_device(argv), environment.local_rank)[0]
    install_backend(device)  # before Megatron is imported
    loaded = load_config(argv)
    config = loaded.config
    loaded.notes += _as_a_restart(config.checkpoint)
    require_for_pretraining(config)
    tokenizer, derived = complete(config, environment.world_size)
    notes = [*_nothing_is_saved(config), *loaded.notes, *derived]
    capabilities = probe(device, environment.local_rank if device == "cuda" else None)
    dims = ParallelDims.from_config(config.parallel, environment.world_size)
    require(config, dims, capabilities)
    if capabilities.memory is not None:
        where = f"this {capabilities.device_name}" if capabilities.on_cuda else "this machine"
        refuse_what_cannot_fit(config, dims, capabilities.memory, where)
    runtime = Runtime.start(
        config.parallel,
        model=config.model,
        training=config.training,
        seed=config.training.seed,
        config=to_dict(config),
        record_dir=config.checkpoint.save,
    )
    with runtime:
        for note in notes:
            runtime.log(f"note: {note}")
        runtime.log(f"resolved configuration:\n{format_config(config, loaded.origins)}")
        runtime.log(table(config, capabilities))  # it tries kernels: on this rank's own GPU, which is selected by now
        _train(config, runtime, tokenizer)
    return 0


def _nothing_is_saved(config: RunConfig) -> list[str]:
    checkpoint = config.checkpoint
    if checkpoint.save:
        return []
    kept = f", keep_last={checkpoint.keep_last} or not" if checkpoint.keep_last else ""
    return [f"without save nothing of this run is kept{kept}; give --save DIRECTORY"]


def _as_a_restart(checkpoint: CheckpointConfig) -> list[str]:
    """The same command again goes on with the run that it began, which may have begun elsewhere or further back."""
    from phd_megatron.checkpoint.run_directory import is_restart

    load, save = checkpoint.load, checkpoint.save
    if load is None or save is None:
        return []
    if not is_restart(save, load, finetune=checkpoint.finetune, rewind=checkpoint.rewind):
        return []
    checkpoint.load, checkpoint.finetune, checkpoint.rewind = save, False, False
    return [f"the run in {save} began with this very start from {load}, so it goes on from its own newest checkpoint"]


def _needs_a_checkpoint(checkpoint: CheckpointConfig) -> str | None:
    names = ("exit_on_missing_checkpoint", "finetune", "rewind")  # without one the others are those of a first start
    return next((name for name in names if getattr(checkpoint, name)), None)


def load_config(argv: list[str]) -> LoadedConfig:
    """The merged configuration of a command line, not completed yet. Imports Megatron for its field names."""
    from phd_megatron.model.transformer_config import transformer_field_types

    return load_run_config(argv, transformer_fields=transformer_field_types(), saved=_saved_configuration)


def complete(config: RunConfig, world_size: int) -> tuple[Tokenizer, list[str]]:
    """Resolve a configuration for so many ranks, in place, and check it against the model, the layout and the data.

    Returns:
        The tokenizer, and notes on what was derived.

    Raises:
        UserError: for everything that can be known before ranks are connected.
    """
    from phd_megatron.data.datasets import check_data, resolve_tokenizer
    from phd_megatron.data.loader import check_workers
    from phd_megatron.training.schedule import plan_schedule

    notes = resolve(config)
    if config.logging.profile and (beyond := [r for r in config.logging.profile_ranks if r >= world_size]):
        raise UserError(
            f"profile_ranks={config.logging.profile_ranks}: there is no rank {beyond[0]}, the run has {world_size}; "
            "name ranks below that"
        )
    tokenizer = resolve_tokenizer(config)
    if config.model.vocab_size is None:
        config.model.vocab_size = tokenizer.vocab_size
    dims = ParallelDims.from_config(config.parallel, world_size)
    config.parallel.sequence_parallel = dims.sp
    if config.training.global_batch_size is None:
        config.training.global_batch_size = config.training.micro_batch_size * dims.dp
        notes.append(f"global_batch_size={config.training.global_batch_size}: micro_batch_size x DP {dims.dp}")
    dims.validate(config.model, config.training)
    schedule = plan_schedule(config, config.training.global_batch_size, _position(config))
    if config.data.data_horizon_samples is None:
        config.data.data_horizon_samples = schedule.samples
    check_workers(config.data.num_workers)
    evaluated = config.training.eval_iters * config.training.global_batch_size
    check_data(config, tokenizer, (schedule.samples, evaluated, 0))
    return tokenizer, notes


def asked_device(argv: list[str]) -> str:
    """``device`` of the command line or the YAML file; needed before the configuration can be read in full."""
    asked = "auto"
    for index, word in enumerate(argv):
        name, _, value = word.partition("=")
        value = value or (argv[index + 1] if index + 1 < len(argv) else "")
        if name == "--config" and Path(value).is_file():
            section = read_yaml(value).get("parallel")
            asked = section.get("device", asked) if isinstance(section, dict) else asked
        elif name == "--device":
            return value
    return asked


def _checkpoint_in(load_dir: str) -> Path | None:
    from phd_megatron.checkpoint.store import latest_complete

    return latest_complete(load_dir, warn=lambda message: None)


def _saved_configuration(load_dir: str) -> Mapping[str, Any] | None:
    path = _checkpoint_in(load_dir)
    return read_yaml(str(path / "run_config.yaml")) if path is not None else None


def _position(config: RunConfig) -> Position:
    """Where the run goes on."""
    from phd_megatron.training.schedule import Position

    options = config.checkpoint
    path = _checkpoint_in(options.load) if options.load is not None and not options.finetune else None
    return Position() if path is None else Position.of_checkpoint(path)


def _train(config: RunConfig, runtime: Runtime, tokenizer: Any) -> None:
    from phd_megatron.checkpoint.load import find_checkpoint, lock_save_dir
    from phd_megatron.checkpoint.run_directory import claim
    from phd_megatron.checkpoint.run_file import new_id
    from phd_megatron.checkpoint.store import iteration_of
    from phd_megatron.runtime import agreement
    from phd_megatron.training.metrics import open_reporter, run_of_rows
    from phd_megatron.training.pretrain import Trainer
    from phd_megatron.training.run_data import agree_on_data, compare_data
    from phd_megatron.training.signals import ExitController, record_stop

    agreement.set_timeout(config.parallel.distributed_timeout_minutes)
    checkpoint = config.checkpoint
    with ExitStack() as stack, runtime.naming_lost_ranks():
        runtime.watch.at("looking at the data")
        data = agree_on_data(config, tokenizer, (1, config.training.eval_iters, 0), runtime.local_rank)
        runtime.watch.at("claiming the save directory")
        lock = lock_save_dir(checkpoint.save) if checkpoint.save is not None else None
        if lock is not None:
            stack.callback(lock.release)
        resume_from = None
        if checkpoint.load is not None:
            resume_from = find_checkpoint(
                checkpoint.load,
                log=runtime.log,
                needed_by=_needs_a_checkpoint(checkpoint),
                save_dir=checkpoint.save,
            )
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
        trainer = Trainer(config, runtime, tokenizer, resume_from, place, data)
        stack.callback(trainer.close)
        # Rank 0 opens files; when it cannot, every rank says so instead of waiting for it.
        reporter = agreement.everywhere(
            lambda: open_reporter(config, runtime.is_main, trainer.total_iterations, run_id)
        )
        stack.callback(reporter.close)
        exits = stack.enter_context(
            ExitController(
                exit_duration_in_mins=config.training.exit_duration_in_mins,
                exit_interval=config.training.exit_interval,
                first_iteration=trainer.progress.iteration,
            )
        )
        parameters = sum(p.numel() for model in trainer.models for p in model.parameters())
        start = trainer.progress.iteration
        reporter.log(f"{parameters / 1e6:.2f}M parameters on this rank; training from iteration {start}")
        reporter.log(trainer.plan())
        reason = trainer.train(reporter, exits)
        reporter.log(f"stopped at iteration {trainer.progress.iteration}: {reason}")
        record_stop(reason, runtime.local_rank)
