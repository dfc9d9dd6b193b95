"""The way from the words of a command line to a run that trains. What can be refused is refused as early as it can be.

:func:`load_config` makes one configuration of words, files and the checkpoint; :func:`complete` derives what is missing
and compares it with model, layout and data; :func:`pretrain` compares it with the machine, finds the other ranks and
hands over to `training/run.py`. No process group, model or file exists before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phd_megatron.config.deepspeed import batch_problems
from phd_megatron.config.help import format_config
from phd_megatron.config.load import LoadedConfig, load_run_config
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import CheckpointConfig, RunConfig
from phd_megatron.config.serialize import read_yaml, to_dict
from phd_megatron.config.validate import require_for_pretraining
from phd_megatron.errors import UserError, raise_all
from phd_megatron.planning.fit import refuse_what_cannot_fit
from phd_megatron.runtime.capabilities import Capabilities, probe
from phd_megatron.runtime.compatibility import installed_versions, note_of_a_start
from phd_megatron.runtime.context import Runtime, choose_device, install_backend
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.implementations import table
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.requirements import require, require_optimizer

if TYPE_CHECKING:
    from phd_megatron.data.tokenizers import Tokenizer
    from phd_megatron.training.schedule import Position


def pretrain(argv: list[str], asked_device: str) -> None:
    """Train what a command line says, on this rank.

    Args:
        argv: flags of a run.
        asked_device: ``device`` among them, or in their file: what it means is to be known before they can be read.

    Raises:
        UserError: for everything that is wrong with the run.
    """
    environment = Environment.read()
    device = choose_device(asked_device, environment.local_rank)[0]
    install_backend(device)  # before Megatron is imported
    loaded = load_config(argv)
    config = loaded.config
    untested = note_of_a_start(installed_versions())
    notes = [*filter(None, [untested]), *loaded.notes, *_as_a_restart(config.checkpoint)]
    require_for_pretraining(config)
    tokenizer, derived = complete(config, environment.world_size)
    capabilities = probe(device, environment.local_rank if device == "cuda" else None)
    _check_machine(config, environment.world_size, capabilities)
    runtime = Runtime.start(
        config.parallel,
        model=config.model,
        training=config.training,
        seed=config.training.seed,
        config=to_dict(config),
        record_dir=config.checkpoint.save,
    )
    with runtime:
        from phd_megatron.training.run import train

        for note in (*_nothing_is_saved(config.checkpoint), *notes, *derived):
            runtime.log(f"note: {note}")
        runtime.log(f"resolved configuration:\n{format_config(config, loaded.origins)}")
        runtime.log(table(config, capabilities))  # it tries kernels: on this rank's own GPU, which is selected by now
        train(config, runtime, tokenizer)


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
    is_given = config.training.global_batch_size is not None
    batch = _fill_in_batch(config, dims)
    if not is_given:
        notes.append(f"global_batch_size={batch}: micro_batch_size x DP {dims.dp}")
    dims.validate(config.model, config.training)
    raise_all([*batch_problems(config, dims.dp)])
    schedule = plan_schedule(config, batch, _position(config.checkpoint))
    if config.data.data_horizon_samples is None:
        config.data.data_horizon_samples = schedule.samples
    check_workers(config.data.num_workers)
    check_data(config, tokenizer, (schedule.samples, config.training.eval_iters * batch, 0))
    return tokenizer, notes


def fix_size(config: RunConfig, ranks: int) -> tuple[int, int]:
    """Fill in the vocabulary and the batch of a resolved run, in place; its samples and (about) its iterations."""
    from phd_megatron.data.datasets import resolve_tokenizer
    from phd_megatron.training.schedule import plan_schedule

    if config.model.vocab_size is None:
        config.model.vocab_size = resolve_tokenizer(config).vocab_size
    batch = _fill_in_batch(config, ParallelDims.from_config(config.parallel, ranks))
    samples = plan_schedule(config, batch).total
    return samples, math.ceil(samples / batch)


def _fill_in_batch(config: RunConfig, dims: ParallelDims) -> int:
    """The global batch size: what is set, or the smallest."""
    training = config.training
    if training.global_batch_size is None:
        training.global_batch_size = training.micro_batch_size * dims.dp
    return training.global_batch_size


def _check_machine(config: RunConfig, world_size: int, capabilities: Capabilities) -> None:
    dims = ParallelDims.from_config(config.parallel, world_size)
    require(config, dims, capabilities)
    require_optimizer(config)
    if capabilities.memory is not None:
        where = f"this {capabilities.device_name}" if capabilities.on_cuda else "this machine"
        refuse_what_cannot_fit(config, dims, capabilities.memory, where)


def _nothing_is_saved(checkpoint: CheckpointConfig) -> list[str]:
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


# ---------------------------------------------------------------- the checkpoint to go on from, before it is chosen


def _checkpoint_in(load_dir: str) -> Path | None:
    from phd_megatron.checkpoint.store import latest_complete

    return latest_complete(load_dir, warn=lambda message: None)


def _saved_configuration(load_dir: str) -> Mapping[str, Any] | None:
    from phd_megatron.checkpoint.status import RUN_CONFIG, is_stock

    path = _checkpoint_in(load_dir)
    return None if path is None or is_stock(path) else read_yaml(str(path / RUN_CONFIG))


def _position(checkpoint: CheckpointConfig) -> Position:
    """Where the run goes on."""
    from phd_megatron.training.schedule import Position

    path = _checkpoint_in(checkpoint.load) if checkpoint.load is not None and not checkpoint.finetune else None
    return Position() if path is None else Position.of_checkpoint(path)
