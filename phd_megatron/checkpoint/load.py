"""Finding and loading a checkpoint, whatever layout saved it.

Where the files lie is `checkpoint/store.py`'s business, their format `checkpoint/format.py`'s, and what they
hold `checkpoint/state.py`'s; `checkpoint/saver.py` saves.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values

from phd_megatron.checkpoint import adam_state, checksums, extra_state, match, optimizer_kind, rng_state, store
from phd_megatron.checkpoint import format as checkpoint_format
from phd_megatron.checkpoint.optimizer_kind import Group
from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.run_lock import RunLock
from phd_megatron.checkpoint.saver import RuntimeLike
from phd_megatron.checkpoint.state import chunks, rng_object, sharded_state
from phd_megatron.checkpoint.status import RUN_CONFIG, is_stock
from phd_megatron.checkpoint.stock import Stock, load_stock, place_in_run, stock_checks
from phd_megatron.checkpoint.stock_names import Place, in_our_names
from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.config.plain import Json
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import load_yaml
from phd_megatron.errors import UserError, shown
from phd_megatron.model.copy_embedding import COPY_EMBEDDING
from phd_megatron.runtime import agreement
from phd_megatron.runtime.durable import read_small

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import CommonStateDict, ShardedStateDict, StateDict
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES

#: parameters that start at zero, so that a model with them is at first the one without
_FROM_ZERO = frozenset({COPY_EMBEDDING})
#: hyper-parameters of an optimizer group that come from this run's configuration, not from the checkpoint
_CONFIGURED = ("max_lr", "min_lr", "lr_mult", "wd_mult", "betas", "eps")


#: numbers in ``training_state.json``, and those that checkpoints of earlier releases may lack
_ALWAYS, _LATER = ("iteration", "consumed_samples"), ("skipped_iterations", "first_batch_size", "schedule_total")


def lock_save_dir(save_dir: str | os.PathLike[str]) -> RunLock | None:
    """Make the save directory and claim it for this run; collective. Keep the result as long as the run lasts.

    Returns:
        The lock on rank 0, None elsewhere.

    Raises:
        UserError: on all ranks, when another run saves there or it cannot be written.
    """
    held: list[RunLock] = []

    def claim() -> None:
        try:
            Path(save_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make --save {save_dir}: {error.strerror}; choose another directory") from error
        held.append(RunLock(save_dir).acquire())

    agreement.from_rank_zero(claim)
    return held[0] if held else None


def find_checkpoint(
    load_dir: str | os.PathLike[str],
    *,
    log: Callable[[str], None],
    needed_by: str | None = None,
    save_dir: str | os.PathLike[str] | None = None,
) -> Path | None:
    """The checkpoint to resume from, chosen by rank 0 for all; collective.

    Args:
        needed_by: a field that is set and has no meaning without a checkpoint.
        save_dir: where the run saves: a first start may name it before it holds a checkpoint.

    Returns:
        Its directory, or None (with a warning) when ``load_dir`` is missing, empty, or the run's own.

    Raises:
        UserError: there is none and it is needed, or one was named that is not there or incomplete.
    """

    def choose() -> Path | None:
        path = store.latest_complete(load_dir, warn=log)
        if path is None:
            if needed_by is not None:
                raise UserError(
                    f"--load {load_dir} holds no complete checkpoint and --{needed_by.replace('_', '-')} is set; "
                    "correct the path, or drop the flag to start from scratch"
                )
            _refuse_something_else(Path(load_dir), save_dir)
            log(f"warning: --load {load_dir} holds no complete checkpoint; starting from scratch")
        return path

    return agreement.from_rank_zero(choose)


def _refuse_something_else(load_dir: Path, save_dir: str | os.PathLike[str] | None) -> None:
    """What is full of something else was meant to be loaded, and must not be started without."""
    if (load_dir / "config.json").is_file():
        raise UserError(
            f"--load {load_dir} is a Hugging Face directory; make a checkpoint of it (phd-megatron import --hf-dir "
            f"{load_dir} --output DIRECTORY), and load that with --finetune"
        )
    own = save_dir is not None and os.path.realpath(save_dir) == os.path.realpath(load_dir)
    if not own and load_dir.is_dir() and any(load_dir.iterdir()):
        raise UserError(
            f"--load {load_dir} holds no complete checkpoint, but {shown(min(os.listdir(load_dir)))} and the like; "
            "correct the path, or leave --load out to start from scratch"
        )


@torch.no_grad()
def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    runtime: RuntimeLike,
    run_config: RunConfig | None = None,
    load_optimizer: bool = True,
    load_rng: bool = True,
    verify: bool = True,
) -> Json:
    """Load one complete checkpoint (see :func:`find_checkpoint`) into freshly built objects; collective.

    The layout may differ from the one that saved. Then, and with ``load_rng=False``, random-number state is not
    restored, which is logged. Learning rates, betas and decay come from this run's configuration.

    Args:
        run_config: this run's configuration; when given, another architecture is refused field by field.
        load_optimizer: False loads the parameters only, not the optimizer and not the schedule.
        verify: compare every file with its checksum first; each rank reads its share of the files.

    Returns:
        The ``training_state`` that was saved, with ``iteration`` and ``layout``.

    Raises:
        UserError: on all ranks, for another architecture or a damaged file, which is named.
    """
    path = Path(path)
    if verify:
        _verify(path, runtime)
    restored = optimizer if load_optimizer else None
    finetune = run_config is not None and run_config.checkpoint.finetune
    opened = _open(path, run_config, scheduler is not None and not finetune, runtime)
    if restored is not None:
        match.check_sharding(path, opened.common)
        configured = _configured_groups(restored)
    state, absent = _request(opened, models, restored, finetune, load_rng, runtime)
    loaded = _read(opened, state, models)
    for key, model in chunks(models):
        model.load_state_dict(loaded[key], strict=not absent)
    if restored is not None:
        _load_optimizer(restored, loaded["optimizer"], configured)
        _load_scheduler(scheduler, opened.common)
    elif optimizer is not None:
        optimizer.reload_model_params()  # main parameters are copies of the model's
    if "rng_state" in state:
        rng_state.restore(loaded["rng_state"], runtime.device)
    runtime.log(f"loaded checkpoint {path}" + ("" if restored is not None else " (parameters only)"))
    return opened.training_state


@dataclass(frozen=True)
class _Opened:
    """A checkpoint before its tensors are read.

    Attributes:
        stored: what it holds, under our names.
        stock: what one of Megatron-LM or Bridge says of itself; None of ours.
        places: where a stock one has its tensors.
    """

    path: Path
    reader: CheckpointReader
    common: CommonStateDict
    training_state: Json
    stored: Mapping[str, STORAGE_TYPES]
    stock: Stock | None = None
    places: Mapping[str, Place] = field(default_factory=dict)

    @property
    def cure(self) -> str:
        """What to do about another model."""
        return match.BUILD_IT if self.stock is None else "set the options of this run to those of that model"


def _open(path: Path, run_config: RunConfig | None, goes_on: bool, runtime: RuntimeLike) -> _Opened:
    """Read the small files, and compare the configuration with this run's; collective."""
    reader = CheckpointReader(path)

    def read_small_files() -> _Opened:
        checkpoint_format.check_format(path, _read_json(path / store.METADATA))
        stored = reader.read_metadata().state_dict_metadata
        if is_stock(path):
            stock = Stock.read(path, reader)
            place = place_in_run(stock) if goes_on else stock.training_state
            entries, places = in_our_names(stored)
            return _Opened(path, reader, stock.common, place, entries, stock, places)
        common = checkpoint_format.read_common(path)
        return _Opened(
            path, reader, common, read_training_state(path) if goes_on else store.training_state(path), stored
        )

    opened = agreement.everywhere(read_small_files)
    if run_config is not None and (opened.stock is not None or (path / RUN_CONFIG).is_file()):
        for note in agreement.everywhere(lambda: _compare(opened, run_config)):
            runtime.log(note)
    return opened


def _compare(opened: _Opened, run_config: RunConfig) -> list[str]:
    if opened.stock is None:
        return _check_resume(opened.path, run_config)
    return stock_checks(opened.stock, opened.stored, run_config)


def _request(
    opened: _Opened,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    finetune: bool,
    load_rng: bool,
    runtime: RuntimeLike,
) -> tuple[ShardedStateDict, frozenset[str]]:
    """The state to fill from the checkpoint, and the keys of this model that are not there; collective."""
    path, stored = opened.path, opened.stored
    state = sharded_state(models, optimizer, None, is_loading=True)
    if optimizer is not None:
        optimizer_kind.ask(state["optimizer"], optimizer, stored)
    may_lack = _FROM_ZERO if finetune else frozenset()
    absent = match.check_contents(path, state, stored, optimizer is not None, may_lack, opened.cure)
    if absent:
        _, state = extract_matching_values(state, lambda value: checkpoint_format.storage_key(value) in absent)
    for key in sorted(absent & _FROM_ZERO):
        runtime.log(f"note: {path} has no {key}, which starts at zero")
    if load_rng and opened.stock is None:
        _request_rng(opened, state, runtime)
    return state, absent


def _request_rng(opened: _Opened, state: ShardedStateDict, runtime: RuntimeLike) -> None:
    """Add this rank's random-number state to what is loaded, where the same layout saved it; collective."""
    path, stored = opened.path, opened.stored
    wanted = rng_object(None)
    agreement.everywhere(lambda: rng_state.check_kind(stored.get(wanted.unique_key), path))
    if wanted.unique_key in stored:
        state["rng_state"] = wanted
    elif any(key.startswith("rng_state/") for key in stored):
        runtime.log(f"note: {path} was saved with another layout, so random-number state (dropout) starts afresh")
    else:
        runtime.log(f"note: {path} holds no random-number state")


def _read(opened: _Opened, state: ShardedStateDict, models: Sequence[torch.nn.Module]) -> StateDict:
    """What the checkpoint holds of ``state``, its objects looked at; collective."""
    if opened.stock is not None:
        return load_stock(state, opened.stock, opened.reader, opened.places)
    loaded: StateDict = dist_checkpointing.load(state, str(opened.path), checkpoint_format.SafeLoad(opened.reader))

    def check_objects() -> None:
        for key, _ in chunks(models):
            extra_state.check(loaded[key], opened.path)
        if "rng_state" in state:
            rng_state.check(loaded["rng_state"], opened.path)

    agreement.everywhere(check_objects)
    return loaded


def _load_optimizer(optimizer: MegatronOptimizer, saved: StateDict, configured: Sequence[Group]) -> None:
    optimizer_kind.adapt(saved, optimizer)
    adams = [inner for inner in _torch_optimizers(optimizer) if "betas" in inner.defaults]
    for inner in adams[:1]:  # all are of one kind
        adam_state.adapt(saved, inner)
    optimizer.load_state_dict(saved)
    for group, values in zip(_groups(optimizer), configured, strict=True):
        group.update(values)


def _verify(path: Path, runtime: RuntimeLike) -> None:
    manifest = agreement.from_rank_zero(lambda: checksums.read_manifest(path))
    if manifest is None:
        runtime.log(checksums.unverified(path))
        return
    began = time.perf_counter()
    part, parts = agreement.rank(), agreement.world_size()
    agreement.everywhere(lambda: checksums.verify(path, manifest, part=part, parts=parts))
    size = sum(entry.size for entry in manifest.values())
    seconds = time.perf_counter() - began
    runtime.log(f"verified the checksums of {path}: {len(manifest)} files, {size / 2**20:.1f} MiB in {seconds:.2f} s")


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(read_small(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: this is not a complete checkpoint; load another one") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): load another checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): load another checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (it holds no mapping): load another checkpoint")
    return content


def read_training_state(path: Path) -> Json:
    """The place in the run that a checkpoint was saved at, whoever saved it."""
    if is_stock(path):
        return place_in_run(Stock.read(path, CheckpointReader(path)))
    file = path / store.TRAINING_STATE
    if not file.exists():
        raise CheckpointError(
            f"{file} is missing, so nothing says where the run was; load another checkpoint, or take the parameters "
            "alone with --finetune"
        )
    content = _read_json(file)
    for name in (*_ALWAYS, *_LATER):
        value = content.get(name)
        if value is None and name in _LATER:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(
                f"{file} is damaged: {name} is {repr(value)[:80]}, not a number of steps or samples; load another "
                "checkpoint, or take the parameters alone with --finetune"
            )
    return content


def _check_resume(path: Path, run_config: RunConfig) -> list[str]:
    from phd_megatron.config.resume import check_resume

    return check_resume(load_yaml(path / RUN_CONFIG), run_config)


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in chained if part.optimizer is not None]


def _groups(optimizer: MegatronOptimizer) -> list[Group]:
    return [group for inner in _torch_optimizers(optimizer) for group in inner.param_groups]


def _configured_groups(optimizer: MegatronOptimizer) -> list[Group]:
    return [{key: group[key] for key in _CONFIGURED if key in group} for group in _groups(optimizer)]


def _load_scheduler(scheduler: OptimizerParamScheduler | None, common: CommonStateDict) -> None:
    if scheduler is None or "opt_param_scheduler" not in common:
        return
    # The schedule's shape is this run's configuration; only the position comes from the checkpoint. Megatron's
    # load_state_dict would refuse a changed schedule, and adds the saved position to the current one.
    scheduler.num_steps = 0
    scheduler.step(increment=common["opt_param_scheduler"]["num_steps"])
