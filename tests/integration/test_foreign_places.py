"""What somebody else put where a run loads from or saves into: named, kept, and never gone on from by mistake."""

from __future__ import annotations

import json
import shutil

import pytest

from phd_megatron.checkpoint import store
from phd_megatron.checkpoint.run_file import RUN_FILE, read_run
from phd_megatron.checkpoint.run_lock import LOCK_NAME

from .test_run_directory import accepted, content, finished, own, pretrain, refused, start_of

__all__ = ["accepted", "finished", "own", "refused"]  # fixtures

NINTH = "iter_0000009"


@pytest.mark.parametrize("how", ["renamed", "copied", "older"])
def test_a_checkpoint_under_another_iteration_is_not_gone_on_from(own, documents, refused, accepted, how):
    """A run that did would begin at 4, count from there, and replace what it had saved since."""
    if how == "renamed":
        (own / "iter_0000004").rename(own / NINTH)
    elif how == "copied":
        shutil.copytree(own / "iter_0000004", own / NINTH)
    else:
        (own / "iter_0000002").rename(own / "iter_0000003")
    before = content(own)
    resume = pretrain(documents, save=own, load=own, train_iters=12, exit_interval=1)
    if how == "older":  # in nobody's way, until the run is to save there
        assert start_of(accepted(resume)) == 4
        there = content(own / "iter_0000003")
        accepted(pretrain(documents, save=own, load=own / "iter_0000004", train_iters=8, rewind=True, exit_interval=1))
        assert content(own / "iter_0000003") == there
        return
    refused(resume, f"{own / NINTH} holds the state of iteration 4", "Call it iter_0000004 again")
    refused(pretrain(documents, save=own.parent / "new", load=own / NINTH), "holds the state of iteration 4")
    refused(pretrain(documents, save=own), "checkpoints", "choose another --save directory")
    assert content(own) == before
    if how == "renamed":
        (own / NINTH).rename(own / "iter_0000004")
        assert start_of(accepted(resume)) == 4


def test_a_misnamed_checkpoint_is_kept_when_its_place_is_saved_to(own, documents, accepted):
    (own / "iter_0000002").rename(own / "iter_0000003")
    there = content(own / "iter_0000003")
    accepted(pretrain(documents, save=own, load=own / "iter_0000004", train_iters=8, save_interval=1, keep_last=1))
    assert content(own / "iter_0000003") == there, "keep_last does not take it for one of the run"


@pytest.mark.parametrize("text", ['{"experiment": "three days of notes"}', "notes", "[1]"])
def test_somebodys_run_json_is_not_replaced(tmp_path, documents, refused, text):
    (tmp_path / RUN_FILE).write_text(text)
    refused(pretrain(documents, save=tmp_path), f"{tmp_path / RUN_FILE} is not what a run of phd-megatron wrote")
    assert (tmp_path / RUN_FILE).read_text() == text and store.complete_iterations(tmp_path) == []


def test_a_run_json_that_was_changed_is_kept_beside_the_new_one(own, documents, accepted):
    (own / RUN_FILE).write_text('{"notes": 1}')
    out = accepted(pretrain(documents, save=own, load=own, train_iters=5))
    assert start_of(out) == 4 and f"it is kept as {RUN_FILE}.kept" in out
    assert json.loads((own / f"{RUN_FILE}.kept").read_text()) == {"notes": 1} and read_run(own) is not None


def test_somebodys_lock_file_is_not_emptied(tmp_path, documents, refused):
    (tmp_path / LOCK_NAME).write_text("pid 4; precious")
    refused(pretrain(documents, save=tmp_path), f"{tmp_path / LOCK_NAME} is not what a run of phd-megatron wrote")
    assert (tmp_path / LOCK_NAME).read_text() == "pid 4; precious"


@pytest.mark.parametrize("left", [b"", b"\0" * 90])
def test_a_lock_file_of_a_power_cut_is_no_hindrance(tmp_path, documents, accepted, left):
    (tmp_path / LOCK_NAME).write_bytes(left)
    accepted(pretrain(documents, save=tmp_path, train_iters=1))


def test_load_of_something_else_does_not_start_from_scratch(tmp_path, documents, refused, accepted):
    exported = tmp_path / "hf"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    said = ("is a Hugging Face directory", "phd-megatron import --hf-dir", "--finetune")
    refused(pretrain(documents, save=tmp_path / "new", load=exported), *said)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    refused(
        pretrain(documents, save=tmp_path / "new", load=tmp_path / "notes"), "holds no complete checkpoint", "a.txt"
    )
    assert not list((tmp_path / "new").glob("iter_*"))
    (tmp_path / "new" / "log.txt").write_text("a first start that writes its log where it saves")
    again = accepted(pretrain(documents, save=tmp_path / "new", load=tmp_path / "new", train_iters=1))
    assert "starting from scratch" in again


def test_steps_that_no_dump_of_gradients_will_see(own, tmp_path, documents, refused, accepted):
    dump = {"dump_gradients_dir": tmp_path / "gradients", "dump_gradients_iterations": 9, "save_interval": None}
    refused(
        pretrain(documents, **dump), "dump_gradients_iterations=[9]: the run ends with step 4", "9 is never reached"
    )
    dump["dump_gradients_iterations"] = 3
    out = accepted(pretrain(documents, save=own, load=own, train_iters=5, **dump))
    assert "dump_gradients_iterations: [3] are past, since this start begins with step 5" in out
    assert not list(tmp_path.glob("gradients/*"))
