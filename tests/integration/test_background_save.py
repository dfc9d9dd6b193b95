"""Saves in the background while steps go on, without the distributed optimizer, whose load would hide a mixed state.

One run of the real program in this process: its saves of iterations 1 and 4 are held back until two more steps are
done. What the checkpoints then hold, in which order it came to the disk, and who could have saved beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from phd_megatron.checkpoint import store
from phd_megatron.cli.main import main

from ..disk_events import Disk, watching
from .conftest import TINY_MODEL, flags

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the kernel which file is synced")

STEPS, INTERVAL = 8, 3
#: a process of its own, because a POSIX lock does not keep its own process out
TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+") as stream:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(7)
"""


@dataclass
class Run:
    """What happened: tensors at each save, by iteration and name; where the lock was held; the disk's events."""

    save: Path
    disk: Disk
    at_save: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    after: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # two steps later, before it was written
    tracker: dict[int, str | None] = field(default_factory=dict)  # after each step
    locked: dict[str, bool] = field(default_factory=dict)

    def try_lock(self, moment: str) -> None:
        done = subprocess.run([sys.executable, "-S", "-c", TRY_LOCK, str(self.save / ".lock")], timeout=60)
        assert done.returncode in (0, 7)
        self.locked[moment] = done.returncode == 7


def tensors(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters and of Adam's moments, by the names that a checkpoint gives them."""
    model = trainer.state.models[0]
    while hasattr(model, "module"):
        model = model.module
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = trainer.state.optimizer
    (inner,) = (part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer]))
    for name, parameter in model.named_parameters():
        for moment, value in inner.state[parameter].items():
            if moment != "step":
                found[f"optimizer.state.{moment}.{name}"] = value.clone()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    from phd_megatron.data.preprocess import prepare
    from phd_megatron.runtime.context import install_backend

    install_backend("cpu")
    from phd_megatron.checkpoint import run_lock
    from phd_megatron.checkpoint import writer as checkpoint_writer
    from phd_megatron.training import pretrain

    place = tmp_path_factory.mktemp("background").resolve()
    (place / "text.txt").write_text("some words of a text " * 200)
    prepare([place / "text.txt"], place / "data", progress=False)
    save = place / "save"
    options = {
        **{**TINY_MODEL, "num-layers": 2, "data-path": place / "data", "save": save, "device": "cpu"},
        **{"micro-batch-size": 1, "global-batch-size": 1, "train-iters": STEPS, "eval-iters": 0, "lr": 0.01},
        **{"save-interval": INTERVAL, "async-save": True, "no-use-distributed-optimizer": True},
    }
    go_on = {iteration: threading.Event() for iteration in range(INTERVAL, STEPS, INTERVAL)}
    with pytest.MonkeyPatch.context() as patch, watching(save, patch) as disk:
        result = Run(save, disk)
        write, one_step = checkpoint_writer.ShardWrite.write, pretrain.Trainer._one_step
        do_save, commit, release = pretrain.Trainer.save, store.commit_iteration, run_lock.RunLock.release

        def late_write(self: Any) -> None:
            iteration = store.iteration_of(self._directory)
            if iteration in go_on:
                assert go_on[iteration].wait(30)
            disk.note(f"begin {iteration}")
            write(self)
            disk.note(f"end {iteration}")

        def step(self: Any, *rest: Any) -> Any:
            found = one_step(self, *rest)
            done = self.state.counters.iteration
            result.tracker[done] = store.read_tracker(save)
            result.try_lock(f"after step {done}")
            if done - 2 in go_on:
                result.after[done - 2] = tensors(self)
                go_on[done - 2].set()
            return found

        def saving(self: Any, *rest: Any, **more: Any) -> None:
            result.at_save[self.state.counters.iteration] = tensors(self)
            do_save(self, *rest, **more)

        def committing(root: Any, iteration: int, *rest: Any) -> Any:
            result.try_lock(f"before the commit of {iteration}")
            found = commit(root, iteration, *rest)
            result.try_lock(f"after the commit of {iteration}")
            return found

        def releasing(self: Any) -> None:
            result.locked["other threads that save"] = any(t.name.startswith("save-") for t in threading.enumerate())
            release(self)
            result.try_lock("after the release")

        patch.setattr(checkpoint_writer.ShardWrite, "write", late_write)
        patch.setattr(pretrain.Trainer, "_one_step", step)
        patch.setattr(pretrain.Trainer, "save", saving)
        patch.setattr(store, "commit_iteration", committing)
        patch.setattr(run_lock.RunLock, "release", releasing)
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            assert main(["pretrain", *flags(options)]) == 0
        finally:
            for event in go_on.values():
                event.set()
        yield result


@pytest.mark.parametrize("iteration", [INTERVAL, 2 * INTERVAL, STEPS])
def test_a_checkpoint_holds_the_tensors_of_its_step_bit_for_bit(run: Run, iteration: int) -> None:
    expected = run.at_save[iteration]
    assert len(expected) > 30 and {value.dtype for value in expected.values()} == {torch.float32}
    if iteration < STEPS:
        moved = [name for name, value in expected.items() if not torch.equal(value, run.after[iteration][name])]
        assert set(moved) == set(expected), "all had changed by the time of the writing, so that a mix would show"
    path = run.save / f"iter_{iteration:07d}"
    reader = dcp.FileSystemReader(path)
    keys = reader.read_metadata().state_dict_metadata
    assert set(expected) <= set(keys)
    found = {name: torch.full_like(value, torch.nan) for name, value in expected.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    common = torch.load(path / "common.pt", weights_only=True)
    assert common["opt_param_scheduler"]["num_steps"] == iteration
    assert json.loads((path / "training_state.json").read_text())["iteration"] == iteration


def test_it_counts_only_when_it_is_written(run: Run) -> None:
    """Steps 4 and 5 are done while the first save waits; step 6 may or may not see its end."""
    assert [run.tracker[step] for step in range(1, INTERVAL + 3)] == [None] * (INTERVAL + 2)
    assert [run.tracker[step] for step in (2 * INTERVAL + 1, 2 * INTERVAL + 2)] == [str(INTERVAL)] * 2
    assert store.read_tracker(run.save) == str(STEPS)


def test_no_other_run_can_save_there_until_the_last_commit(run: Run) -> None:
    assert not run.locked.pop("after the release")
    assert not run.locked.pop("other threads that save"), "the lock is given back when nothing writes any more"
    assert len(run.locked) == STEPS + 2 * 3 and all(run.locked.values()), run.locked


def test_a_writer_brings_its_own_files_to_the_disk(run: Run) -> None:
    """On a network file system nobody else can: rank 0 would sync what it sees of them."""
    for iteration in (INTERVAL, 2 * INTERVAL, STEPS):
        path = run.save / f"iter_{iteration:07d}"
        begin, end = (run.disk.index(f"{word} {iteration}", run.save) for word in ("begin", "end"))
        mine = [path / "common.pt", *path.glob("*.distcp")]
        assert len(mine) == 2
        for file in mine:
            stat = file.stat()
            assert run.disk.synced(file, (stat.st_size, stat.st_mtime_ns), begin, end), file


@pytest.mark.parametrize("iteration", [INTERVAL, 2 * INTERVAL, STEPS])
def test_everything_is_on_the_disk_before_the_name_that_makes_it_valid(run: Run, iteration: int) -> None:
    """A power cut after any call finds the tracker at a whole checkpoint, and metadata.json beside whole files."""
    disk, path = run.disk, run.save / f"iter_{iteration:07d}"
    appears = disk.index("replace", path)  # under its name, marked as unfinished
    begins = disk.index(f"begin {iteration}", run.save)
    assert path.name in disk.events[disk.index("fsync", run.save, appears)].state
    assert disk.index("fsync", run.save, appears) < begins, "the directory's name"

    commit = disk.index("replace", path / "metadata.json", begins)
    event = disk.events[commit]
    contents = {place: state for place, state in event.state.items() if place == path or path in place.parents}
    written = {place for place in contents if place.is_file()} - {path / "unfinished", event.source}
    names = {"common.pt", ".metadata", "checksums.json", "run_config.yaml", "training_state.json", "__0_0.distcp"}
    assert {place.name for place in written} > names and path / "tokenizer" in contents
    for place in written:
        assert disk.synced(place, contents[place], begins, commit), f"{place} before metadata.json"
    new = os.path.basename(event.source or "")
    for folder in (path, path / "tokenizer"):
        listing = tuple(name for name in contents[folder] if name != new)
        assert disk.synced(folder, listing, begins, commit), f"the names in {folder} before metadata.json"
    assert event.source is not None and disk.synced(event.source, event.state[event.source], begins, commit)

    tracker = disk.index("replace", run.save / store.TRACKER, begins)
    assert tracker > commit
    syncs = [entry for entry in disk.events[commit:tracker] if entry.what == "fsync"]
    assert any(entry.path == path and "metadata.json" in entry.state for entry in syncs), "before the tracker"
    assert any(entry.path == path and "unfinished" not in entry.state for entry in syncs)
    moved = disk.events[tracker]
    assert moved.source is not None and disk.synced(moved.source, moved.state[moved.source], commit, tracker)
    assert disk.index("fsync", run.save, tracker) > tracker
