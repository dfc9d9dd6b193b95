"""The directory protocol: which checkpoint counts, which is next, which may be deleted."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from phd_megatron.checkpoint import store
from phd_megatron.checkpoint.run_file import RunFile, write_run
from phd_megatron.checkpoint.store import CheckpointError

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def save(root: Path, iteration: int, content: str = "weights") -> Path:
    """A whole save: prepare, write, commit."""
    path = store.prepare_iteration(root, iteration)
    (path / "__0_0.distcp").write_text(content)
    (path / "run_config.yaml").touch()
    return store.commit_iteration(root, iteration, FORMAT)


def latest(path: Path) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return store.latest_complete(path, warn=warnings.append), warnings


def test_commit_makes_a_checkpoint_the_latest(tmp_path: Path) -> None:
    first, second = save(tmp_path, 100), save(tmp_path, 200)
    assert first.name == "iter_0000100"
    assert latest(tmp_path) == (second, [])
    assert store.read_tracker(tmp_path) == "200"
    assert latest(first) == (first, []), "an explicit iteration"
    assert not list(tmp_path.rglob("*.tmp"))


def test_missing_and_empty_directories_hold_nothing(tmp_path: Path) -> None:
    assert latest(tmp_path) == (None, [])
    assert latest(tmp_path / "absent") == (None, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        latest(tmp_path / "file")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"other": 1}'])
def test_unfinished_save_does_not_count(tmp_path: Path, content: str | None) -> None:
    complete = save(tmp_path, 100)
    partial = store.prepare_iteration(tmp_path, 200)
    if content is not None:
        (partial / store.METADATA).write_text(content)
    assert not store.is_complete(partial)
    assert latest(tmp_path) == (complete, [])
    with pytest.raises(CheckpointError, match="iter_0000100, the newest complete"):
        latest(partial)


@pytest.mark.parametrize("tracker", ["300", "200", "junk", ""])
def test_tracker_that_points_nowhere_falls_back_with_a_warning(tmp_path: Path, tracker: str) -> None:
    save(tmp_path, 50)
    complete = save(tmp_path, 100)
    store.prepare_iteration(tmp_path, 200)
    (tmp_path / store.TRACKER).write_text(tracker)
    found, warnings = latest(tmp_path)
    assert found == complete
    assert len(warnings) == 1 and "iteration 100" in warnings[0]


def test_tracker_decides_so_that_users_can_roll_back(tmp_path: Path) -> None:
    first = save(tmp_path, 100)
    save(tmp_path, 200)
    (tmp_path / store.TRACKER).write_text("100\n")
    assert latest(tmp_path) == (first, [])
    os.unlink(tmp_path / store.TRACKER)
    found, warnings = latest(tmp_path)
    assert found == tmp_path / "iter_0000200" and "no latest_checkpointed" in warnings[0]


def test_partial_directory_is_replaced(tmp_path: Path) -> None:
    partial = store.prepare_iteration(tmp_path, 100)
    (partial / "__7_0.distcp").write_text("of a larger world")
    path = save(tmp_path, 100)
    assert path == partial and not (path / "__7_0.distcp").exists()


def test_complete_checkpoint_survives_until_its_replacement_is_complete(tmp_path: Path) -> None:
    path = save(tmp_path, 100, "old")
    store.prepare_iteration(tmp_path, 100)
    found, warnings = latest(tmp_path)  # as after a kill at this moment
    assert found is not None and (found / "__0_0.distcp").read_text() == "old" and not warnings
    assert latest(path) == (found, [])
    store.abandon_iteration(tmp_path, 100)
    assert (path / "__0_0.distcp").read_text() == "old"
    save(tmp_path, 100, "new")
    assert (path / "__0_0.distcp").read_text() == "new"
    assert [item.name for item in tmp_path.iterdir() if item.is_dir()] == ["iter_0000100"]


def test_kill_at_every_step_of_a_save_leaves_a_loadable_state(tmp_path: Path) -> None:
    """Kill -9 a forked saver before each of its file-system operations: old or new, never nothing."""
    seen = set()
    for again in (200, 100):  # a new iteration, and the one that is already there
        for operations in range(200):
            root = tmp_path / f"{again}-{operations}"
            save(root, 100, "old")
            child = os.fork()
            if child == 0:
                _die_after(operations)
                save(root, again, "new")
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = store.latest_complete(root, warn=lambda _: None)
            assert found is not None, f"nothing to load after {operations} operations"
            text = (found / "__0_0.distcp").read_text()
            assert text in ("old", "new")
            seen.add(text)
            save(root, again, "newer")  # and the next run can save there
            found = store.latest_complete(root, warn=lambda _: None)
            assert found is not None and (found / "__0_0.distcp").read_text() == "newer"
            if os.WIFEXITED(status):
                break
        else:
            pytest.fail("the saver never finished")
        assert operations > 8, "too few operations were seen to be a test"
    assert seen == {"old", "new"}


def save_today(root: Path, iteration: int, content: str, keep_last: int | None = None) -> Path:
    """A save of a run that has an id, with all that a checkpoint says of itself."""
    path = store.prepare_iteration(root, iteration)
    facts = {"iteration": iteration, "protocol": store.PROTOCOL, "run": "mine"}
    (path / store.TRAINING_STATE).write_text(json.dumps(facts))
    (path / ".metadata").write_text("")
    (path / "__0_0.distcp").write_text(content)
    store.commit_iteration(root, iteration, FORMAT)
    if keep_last is not None:
        store.prune(root, keep_last, current=iteration)
    return path


def test_kill_at_every_step_of_a_save_and_a_prune_is_never_taken_for_damage(tmp_path: Path) -> None:
    """And once the commit is done the new checkpoint is the one to load, whatever the tracker says."""
    seen = set()
    for again in (200, 100):
        for operations in range(200):
            root = tmp_path / f"{again}-{operations}"
            root.mkdir()
            write_run(root, RunFile("mine"))
            save_today(root, 50, "older")
            save_today(root, 100, "old")
            child = os.fork()
            if child == 0:
                _die_after(operations)
                save_today(root, again, "new", keep_last=1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            committed = store.is_complete(store.iteration_dir(root, again)) and "new" in [
                (store.iteration_dir(root, again) / "__0_0.distcp").read_text()
            ]
            found, _ = latest(root)
            assert found is not None
            assert (found / "__0_0.distcp").read_text() == ("new" if committed else "old")
            seen.add((committed, store.read_tracker(root)))
            save_today(root, again, "newer", keep_last=1)
            assert not list(root.glob("*.kept")) and not list(root.glob("*.new"))
            if os.WIFEXITED(status):
                break
        else:
            pytest.fail("the saver never finished")
    assert (True, "100") in seen and (True, "200") in seen, "killed between the commit and the tracker, too"


def test_checkpoints_of_a_run_that_was_left_do_not_count(tmp_path: Path) -> None:
    save_today(tmp_path, 100, "")
    save_today(tmp_path, 500, "")
    store.write_tracker(tmp_path, 100)
    write_run(tmp_path, RunFile("another", began=100))
    assert latest(tmp_path) == (tmp_path / "iter_0000100", [])
    (tmp_path / "iter_0000500" / store.METADATA).unlink()
    assert latest(tmp_path) == (tmp_path / "iter_0000100", []), "damaged or not"
    write_run(tmp_path, RunFile("mine"))
    with pytest.raises(CheckpointError, match=r"iter_0000500/metadata\.json is missing"):
        latest(tmp_path)


def test_of_a_link_to_a_checkpoint_elsewhere_only_the_link_is_deleted(tmp_path: Path) -> None:
    elsewhere = save_today(tmp_path / "elsewhere", 100, "weights")
    root = tmp_path / "root"
    root.mkdir()
    (root / "iter_0000100").symlink_to(elsewhere)
    save_today(root, 200, "", keep_last=1)
    assert store.complete_iterations(root) == [200] and not os.path.lexists(root / "iter_0000100")
    assert store.is_complete(elsewhere) and (elsewhere / "__0_0.distcp").read_text() == "weights"


def test_a_checkpoint_that_cannot_be_deleted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "iter_0000001"
    path.mkdir()
    (path / "data").write_text("x")
    monkeypatch.setattr(store, "_delete", lambda path: None)
    with pytest.raises(CheckpointError, match=f"cannot delete {path}: check its permissions"):
        store.remove_checkpoint(path)


def test_a_directory_of_any_name_that_holds_a_damaged_checkpoint_is_no_empty_one(tmp_path: Path) -> None:
    best = save_today(tmp_path, 100, "").rename(tmp_path / "best")
    assert latest(best) == (best, [])
    (best / store.METADATA).write_text("{")
    with pytest.raises(CheckpointError, match=r"best is not a complete checkpoint .*metadata\.json is damaged"):
        latest(best)


def _die_after(operations: int) -> None:
    """In a child: SIGKILL before operation number ``operations`` that changes the file system."""
    left = [operations]
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        original = getattr(os, name)

        def counted(*args: object, _original: object = original, **kwargs: object) -> object:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return _original(*args, **kwargs)  # type: ignore[operator]

        setattr(os, name, counted)


def test_keep_last_prunes_the_oldest_complete_ones(tmp_path: Path) -> None:
    for iteration in (100, 200, 300, 400):
        save(tmp_path, iteration)
    unfinished = store.prepare_iteration(tmp_path, 250)
    deleted = store.prune(tmp_path, 2, current=400)
    assert [path.name for path in deleted] == ["iter_0000100", "iter_0000200"]
    assert store.complete_iterations(tmp_path) == [300, 400]
    assert unfinished.exists()
    store.prune(tmp_path, 1, current=400)
    assert store.complete_iterations(tmp_path) == [400]
    with pytest.raises(ValueError, match="keep_last = 0"):
        store.prune(tmp_path, 0, current=400)


def test_keep_last_leaves_what_lies_beyond_a_roll_back(tmp_path: Path) -> None:
    for iteration in (100, 500):
        save(tmp_path, iteration)
    save(tmp_path, 110)
    assert store.prune(tmp_path, 1, current=110) == [tmp_path / "iter_0000100"]
    assert store.complete_iterations(tmp_path) == [110, 500]
    assert store.read_tracker(tmp_path) == "110"


def test_a_killed_prune_leaves_an_incomplete_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 100)
    kept = save(tmp_path, 200)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.prune(tmp_path, 1, current=200)
    assert store.complete_iterations(tmp_path) == [200]
    assert latest(tmp_path) == (kept, [])
