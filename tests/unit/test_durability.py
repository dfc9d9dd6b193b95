"""What is on the disk before the name that makes it valid; a whole save is in integration/test_background_save.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from phd_megatron.checkpoint import store
from phd_megatron.data.index_cache import save_index
from phd_megatron.data.indexed import IndexedWriter
from phd_megatron.data.output import Output
from phd_megatron.data.preprocess import prepare
from phd_megatron.runtime.durable import fsync_tree, write_atomically

from ..disk_events import Disk, state_of, watching

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the kernel which file is synced")
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def test_a_small_file_is_replaced_by_one_that_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path.resolve()
    path = root / "run.json"
    path.write_text("old")
    with watching(root, monkeypatch) as disk:
        write_atomically(path, "the new content")
    assert [(event.what, event.path.name) for event in disk.events] == [
        ("fsync", disk.events[0].path.name),
        ("replace", "run.json"),
        ("fsync", root.name),
    ]
    assert disk.events[0].path == disk.events[1].source != path
    assert disk.events[0].state[0] == len("the new content"), "after it was written, not before"
    assert path.read_text() == "the new content" and list(root.iterdir()) == [path]


def test_of_a_tree_every_file_and_every_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path.resolve() / "tree"
    places = [root, root / "a", root / "a" / "b", root / "empty"]
    for place in places:
        place.mkdir()
        (place / "file").write_text(place.name)
    (root / "empty" / "file").unlink()
    with watching(root, monkeypatch) as disk:
        fsync_tree(root)
    assert {event.path for event in disk.events} == {root, *root.rglob("*")}
    assert len(disk.events) == len(places) + 3


def test_syncing_a_tree_leaves_no_file_open(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / str(number)).touch()
    before = len(os.listdir("/proc/self/fd"))
    fsync_tree(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_checkpoint_stops_counting_before_its_data_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves metadata.json, which says complete, beside tensors that are gone."""
    root = tmp_path.resolve()
    for iteration in (1, 2):
        path = store.prepare_iteration(root, iteration)
        (path / "__0_0.distcp").write_text("weights")
        (path / store.TRAINING_STATE).write_text("{}")
        store.commit_iteration(root, iteration, FORMAT)
    old = root / "iter_0000001"
    with watching(root, monkeypatch) as disk:
        assert store.prune(root, 1, current=2) == [old]
    ends = disk.index("unlink", old / store.METADATA)
    gone = disk.index("unlink", old / "__0_0.distcp")
    between = [event for event in disk.events[ends:gone] if (event.what, event.path) == ("fsync", old)]
    assert store.METADATA not in between[0].state and "__0_0.distcp" in between[0].state
    assert any(store.TRAINING_STATE not in event.state for event in between)
    assert not old.exists()


def check_synced_at(disk: Disk, number: int, path: Path) -> None:
    """The file is on the disk, as it was when event ``number`` happened."""
    state = disk.events[number].state[path]
    assert disk.synced(path, state, 0, number), f"{path} was renamed, or another file made valid, before it was synced"


def test_prepared_data_is_on_the_disk_before_its_index_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The .idx comes last, when all that it needs has its name; a run takes no data without it."""
    root = tmp_path.resolve()
    (root / "text.txt").write_text("some words " * 1000)
    with watching(root, monkeypatch) as disk:
        prepare([root / "text.txt"], root / "d", progress=False)
    first, last = disk.index("replace", root / "d.bin"), disk.index("replace", root / "d.idx")
    assert first < last
    folder = root / "d.partial"
    for path in (folder / "data.bin", folder / "data.idx", folder / "meta.json", *(root / "d.tokenizer").iterdir()):
        check_synced_at(disk, first, folder / "tokenizer" / path.name if path.parent != folder else path)
    names = disk.events[last - 1]
    assert (names.what, names.path) == ("fsync", root) and {"d.bin", "d.tokenizer", "d.meta.json"} <= {*names.state}
    assert (disk.events[last + 1].what, disk.events[last + 1].path) == ("fsync", root)


def test_data_that_is_replaced_is_invalid_before_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old index beside the new .bin would be read as data."""
    root = tmp_path.resolve()
    (root / "text.txt").write_text("some words " * 100)
    prepare([root / "text.txt"], root / "d", progress=False)
    with watching(root, monkeypatch) as disk:
        prepare([root / "text.txt"], root / "d", overwrite=True, progress=False)
    gone = disk.index("unlink", root / "d.idx")
    new = disk.index("replace", root / "d.bin")
    assert any(e.path == root and e.what == "fsync" and "d.idx" not in e.state for e in disk.events[gone:new])


def test_publishing_syncs_whatever_the_writers_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path.resolve()
    with watching(root, monkeypatch) as disk, Output(str(root / "d"), overwrite=False) as output:
        for name in ("data.bin", "data.idx"):
            (output.directory / name).write_bytes(b"content")
        (output.directory / "tokenizer").mkdir()
        (output.directory / "tokenizer" / "tokenizer.json").write_text("{}")
        output.publish({"tokenizer": {}})
    first = disk.index("replace", root / "d.bin")
    for name in ("data.bin", "data.idx", "meta.json", "tokenizer/tokenizer.json"):
        check_synced_at(disk, first, root / "d.partial" / name)


def test_the_writer_of_token_files_leaves_both_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path.resolve()
    with watching(root, monkeypatch) as disk, IndexedWriter(root, np.uint16) as writer:
        writer.add(np.arange(9), np.array([4, 5]), np.array([2]))
        writer.finish()
    for name in ("data.bin", "data.idx"):
        assert disk.synced(root / name, state_of(root / name), 0, len(disk.events)), name
    assert sorted(os.listdir(root)) == ["data.bin", "data.idx"]


def test_a_cached_index_of_samples_gets_its_name_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path.resolve()
    arrays = (np.arange(3), np.arange(4).reshape(2, 2), np.arange(5))
    with watching(root, monkeypatch) as disk:
        save_index(root / "index", arrays)
    moves = [number for number, event in enumerate(disk.events) if event.what == "replace"]
    assert len(moves) == 4, "the checksums come last, since files without them are none"
    assert disk.events[moves[3]].path.name == "index-sums.json"
    check_synced_at(disk, moves[3], disk.events[moves[3]].source)
    for number, array in zip(moves[:3], arrays, strict=True):
        source = disk.events[number].source
        assert source is not None
        check_synced_at(disk, number, source)
        assert np.array_equal(np.load(disk.events[number].path), array)
