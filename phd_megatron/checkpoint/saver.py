"""Saving a training state, so that a crash at any moment leaves the last complete checkpoint usable.

Order of a save: the parameters are looked at, then the directory's lock and space; the sidecars (``run_config.yaml``,
``training_state.json``, ``tokenizer/``), ``common.pt`` and one ``.distcp`` file per rank, ``.metadata``, the lock once
more, ``checksums.json``, sync, ``metadata.json`` (the commit), tracker, pruning. Where the files lie is
`checkpoint/store.py`'s business, how they are written `checkpoint/writer.py`'s.

In the background a thread of each rank writes ``common.pt`` and the ``.distcp`` files from a copy in host memory. All
that the ranks do together stays in the main thread, before the writing and, once every rank's thread is done, after it;
so there is no collective that a training step's could cross.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from phd_megatron.checkpoint import checksums, health, rng_state, store
from phd_megatron.checkpoint import format as checkpoint_format
from phd_megatron.checkpoint import state as checkpoint_state
from phd_megatron.checkpoint import writer as checkpoint_writer
from phd_megatron.checkpoint.checksums import FileSum
from phd_megatron.checkpoint.format import TOKENIZER
from phd_megatron.checkpoint.run_directory import RunDirectory
from phd_megatron.checkpoint.status import RUN_CONFIG
from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.config.plain import Json
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import dump_yaml
from phd_megatron.console.terminal import say
from phd_megatron.errors import UserError
from phd_megatron.runtime import agreement

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


class RuntimeLike(Protocol):
    """The part of the runtime that checkpoints need."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""

    def log(self, message: str, /) -> None:
        """Print once per run."""


class Saveable(Protocol):
    """A tokenizer that can write its files into a directory."""

    def save(self, directory: Path, /) -> None:
        """Write the files."""


@dataclass
class _Save:
    """One save between its start and its commit."""

    iteration: int
    path: Path
    write: checkpoint_writer.ShardWrite
    size: int
    largest: float | None  # absolute value of a parameter
    began: float
    thread: threading.Thread | None = None
    in_the_way: float = 0.0  # seconds for which training stood still at the start

    def start(self, background: bool) -> None:
        """Write this rank's files: now, or in a thread."""
        if background:
            # Not a daemon: the interpreter does not end, and the directory's lock is kept, while it writes.
            self.thread = threading.Thread(target=self.write.write, name=f"save-{self.iteration}")
            self.thread.start()
            self.in_the_way = time.perf_counter() - self.began
        else:
            self.write.write()


class CheckpointSaver:
    """The saves of one run. Every rank makes one and calls the same methods in the same order.

    Args:
        save_dir: directory of the ``iter_...`` directories.
        run_config: the resolved configuration.
        keep_last: after each save delete all but the newest so many complete checkpoints. The newest one's parameters
            were finite when it was saved, or it would not have been.
        place: ``save_dir`` as this run's own; None for one that holds nothing yet and that nobody else knows.
        loaded: the checkpoint that the run went on from.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        *,
        run_config: RunConfig,
        tokenizer: Saveable | None,
        runtime: RuntimeLike,
        keep_last: int | None = None,
        place: RunDirectory | None = None,
        loaded: Path | None = None,
    ) -> None:
        self._root = Path(save_dir)
        self._run_config, self._tokenizer, self._runtime = run_config, tokenizer, runtime
        self._keep_last, self._place = keep_last, place
        self._last, self._largest = loaded, health.largest_of(loaded)
        self._under_way: _Save | None = None
        self._left_out = False  # the last save, since parameters were too large
        self._lost = False  # on rank 0: another run saves here

    @torch.no_grad()
    def save(
        self,
        *,
        iteration: int,
        models: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        scheduler: OptimizerParamScheduler | None,
        training_state: Json,
        background: bool = False,
        patient: bool = False,
    ) -> Path | None:
        """Write ``iter_<iteration>`` and make it the one to load; collective. An earlier save is completed first.

        Args:
            iteration: optimizer steps done.
            models: this rank's model chunks, wrapped or not (one, or one per virtual pipeline stage).
            training_state: JSON-able facts such as ``consumed_samples``.
            background: return as soon as the state is copied to host memory; :meth:`poll` and :meth:`wait` complete it.
            patient: leave out this save, with a warning, if parameters are finite but larger than any can be; two such
                saves in a row end the run.

        Returns:
            The checkpoint's directory; None when it was left out.

        Raises:
            UserError: on all ranks, when parameters are not finite, another run has begun to save here, the disk is
                full or a write failed anywhere. The unfinished directory is removed and the checkpoint before stays
                the one to load.
        """
        self.wait()
        began = time.perf_counter()
        facts = self._facts(training_state, iteration, optimizer)
        with checkpoint_state.whole_parameters(models):
            if optimizer is not None:  # what was not trained here is not judged
                largest = self._judge(models, optimizer, iteration, patient)
                if largest is None:
                    return None
                facts[health.FACT] = largest
            state_text = json.dumps(facts, indent=1)
            state = checkpoint_state.sharded_state(models, optimizer, scheduler, is_loading=False)
            state["rng_state"] = checkpoint_state.rng_object(rng_state.capture(self._runtime.device))
            state["content_metadata"] = checkpoint_state.content()
            write, size = self._lay_out(iteration, state, state_text, background)
            path = store.iteration_dir(self._root, iteration)
            self._under_way = _Save(iteration, path, write, size, facts.get(health.FACT), began)
            self._under_way.start(background)
        if not background:
            self._finish()
        return path

    def _facts(self, training_state: Json, iteration: int, optimizer: MegatronOptimizer | None) -> Json:
        facts = {**training_state, "iteration": iteration, "layout": checkpoint_state.layout(optimizer)}
        return facts | {"protocol": store.PROTOCOL} | ({} if self._place is None else {"run": self._place.run})

    def _judge(
        self, models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, iteration: int, patient: bool
    ) -> float | None:
        """The largest absolute value of a parameter; None, with a warning, when this save is to be left out."""
        patient = patient and not self._left_out
        largest = health.check_parameters(models, optimizer, iteration, lambda: self.standing, patient=patient)
        self._left_out = largest > health.LARGEST
        if not self._left_out:
            return largest
        self._runtime.log(health.warning(largest, iteration, self.standing))
        return None

    def _lay_out(
        self, iteration: int, state: ShardedStateDict, state_text: str, background: bool
    ) -> tuple[checkpoint_writer.ShardWrite, int]:
        """Make the directory with its sidecars, and plan the files; bytes of all ranks' tensors. Collective."""
        sharded, common = checkpoint_writer.prepare_save(state)
        path = store.iteration_dir(self._root, iteration)
        agreement.from_rank_zero(self._check_place)
        try:
            agreement.from_rank_zero(lambda: store.prepare_iteration(self._root, iteration))
            size = checkpoint_writer.check_space(path, sharded)
            agreement.from_rank_zero(lambda: self._write_sidecars(path, state_text))
            write = checkpoint_writer.ShardWrite(path, sharded, common)
            if background:
                agreement.everywhere(write.copy_to_host)
        except (UserError, OSError) as error:
            raise self._failure(iteration, path, error) from error
        return write, size

    def poll(self) -> None:
        """Complete the save in the background if all ranks have written; collective, and does not wait for any.

        Raises:
            UserError: on all ranks, when writing failed anywhere.
        """
        if self._under_way is not None and not agreement.maximum([int(self._is_writing)])[0]:
            self._finish()

    def wait(self) -> None:
        """Complete the save in the background, if there is one; collective.

        Raises:
            UserError: on all ranks, when writing failed anywhere.
        """
        if self._under_way is not None:
            self.close()
            self._finish()

    def close(self) -> None:
        """Let this rank's thread end, complete or not; not collective. For the way out after an error."""
        if self._under_way is not None and self._under_way.thread is not None:
            self._under_way.thread.join()

    @property
    def standing(self) -> str:
        """What is known about the last checkpoint, for a message that ends the run; the same on all ranks."""
        return health.standing(self._last_there, self._largest)

    @property
    def _last_there(self) -> Path | None:
        """The last checkpoint, unless somebody has removed it since."""
        return self._last if self._last is not None and _is_there(self._last) else None

    @property
    def _is_writing(self) -> bool:
        thread = self._under_way.thread if self._under_way is not None else None
        return thread is not None and thread.is_alive()

    def _finish(self) -> None:
        save, self._under_way = self._under_way, None
        assert save is not None
        started = time.perf_counter()

        def commit(known: Mapping[str, FileSum]) -> None:
            self._check_place()  # in the background steps have passed
            text = store.metadata_text(checkpoint_format.FORMAT)
            checksums.write_manifest(save.path, known, {store.METADATA: text})
            store.commit_iteration(self._root, save.iteration, checkpoint_format.FORMAT)

        try:
            save.write.finish(commit)
        except (UserError, OSError) as error:
            raise self._failure(save.iteration, save.path, error) from error
        self._last, self._largest = save.path, save.largest
        now = time.perf_counter()
        message = f"saved checkpoint {save.path} ({save.size / 2**20:.1f} MiB of tensors) in {now - save.began:.2f} s"
        if save.thread is not None:
            message += f" in the background; training stood still for {save.in_the_way + now - started:.2f} s"
        self._runtime.log(message)
        if self._keep_last is not None:
            deleted = agreement.from_rank_zero(lambda: self._prune(save.iteration))
            if deleted:
                names = ", ".join(item.name for item in deleted)
                self._runtime.log(f"keep_last = {self._keep_last}: deleted {names}")

    def _write_sidecars(self, path: Path, state_text: str) -> None:
        dump_yaml(self._run_config, path / RUN_CONFIG)
        (path / store.TRAINING_STATE).write_text(state_text, encoding="utf-8")
        if self._tokenizer is not None:
            (path / TOKENIZER).mkdir()
            self._tokenizer.save(path / TOKENIZER)

    def _check_place(self) -> None:
        if self._place is not None:
            try:
                self._place.check()
            except (UserError, OSError) as error:
                self._lost = isinstance(error, UserError)
                raise UserError(f"{error}; {self.standing}") from error

    def _prune(self, iteration: int) -> list[Path]:
        assert self._keep_last is not None
        try:
            return store.prune(self._root, self._keep_last, current=iteration)
        except (OSError, CheckpointError) as error:
            say(f"warning: keep_last = {self._keep_last} could not delete an old checkpoint: {error}")
            return []

    def _failure(self, iteration: int, path: Path, error: Exception) -> CheckpointError:
        """Give the space back; the error that all ranks raise."""

        def abandon() -> Path | str | None:
            if self._lost:  # what lies there may be the other run's
                return ""
            try:
                self._check_place()
            except UserError as lost:
                if self._lost:
                    return f"; {lost}"
            with suppress(OSError, UserError):  # a directory that cannot be written: say what went wrong first
                store.abandon_iteration(self._root, iteration)
            with suppress(UserError):
                newest = store.Survey(self._root).newest
                if newest is not None:
                    return store.complete_dir(self._root, newest)
            return path if _is_there(path) else self._last_there

        last = agreement.from_rank_zero(abandon)
        rest = f"; the last complete checkpoint is {last}" if last else "; there is no complete checkpoint yet"
        return CheckpointError(f"saving {path} failed: {error}{last if isinstance(last, str) else rest}")


def _is_there(checkpoint: Path) -> bool:
    """Whether a checkpoint has not been removed. Opens no file: a process that has too many open has lost none."""
    try:
        return (checkpoint / store.METADATA).stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # of the disk, which may come back
        return True
