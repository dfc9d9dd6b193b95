"""A run saves into its own directory alone, goes back in it when told to, and takes no damaged checkpoint for none."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phd_megatron.checkpoint import checksums, rng_state, store
from phd_megatron.checkpoint.run_file import RUN_FILE, read_run
from phd_megatron.cli.main import main
from phd_megatron.training import metrics_reader

from .conftest import TINY_MODEL, flags

FOURTH = "iter_0000004"


def pretrain(data: Path, **changes: object) -> list[str]:
    """A run of four steps that saves after two and at the end; a change to None leaves an option out."""
    options: dict[str, object] = {
        **TINY_MODEL,
        **{"data-path": data, "micro-batch-size": 2, "global-batch-size": 4, "train-iters": 4, "eval-iters": 0},
        **{"log-interval": 1, "device": "cpu", "save-interval": 2},
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["pretrain", *flags({name: value for name, value in options.items() if value is not None})]


@pytest.fixture(scope="module")
def finished(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's directory with iterations 2 and 4; not to be changed."""
    save = tmp_path_factory.mktemp("finished") / "save"
    assert main(pretrain(documents, save=save)) == 0
    return save


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to work in."""
    return shutil.copytree(finished, tmp_path / "own")


def content(directory: Path) -> dict[str, str]:
    """Every file with a digest; the lock's file is no content."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(argv, *words)``: exit code 2, one message with all the words, and no step was taken."""

    def check(argv: list[str], *words: str) -> str:
        code = main(argv)
        out, error = capsys.readouterr()
        assert code == 2, f"{code}\n{out}\n{error}"
        assert error.startswith("error: ") and error.count("error: ") == 1 and "Traceback" not in error
        assert not re.search(r"iteration +\d+/", out)
        for word in words:
            assert word in error, f"{word!r} is not in: {error}"
        return error

    return check


@pytest.fixture
def accepted(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """What the program printed, with exit code 0."""

    def run(argv: list[str]) -> str:
        code = main(argv)
        out, error = capsys.readouterr()
        assert code == 0, f"{out}\n{error}"
        return out

    return run


def as_an_earlier_release_left_it(save: Path, checksums_too: bool = True) -> None:
    """Without the run's id, and without what a checkpoint says of itself today."""
    (save / RUN_FILE).unlink(missing_ok=True)
    for directory in save.glob("iter_*"):
        path = directory / store.TRAINING_STATE
        facts = json.loads(path.read_text("utf-8"))
        for name in ("run", "protocol", "largest_parameter"):
            facts.pop(name, None)
        path.write_text(json.dumps(facts), encoding="utf-8")
        (directory / checksums.MANIFEST).unlink()
        if checksums_too:
            checksums.write_manifest(directory, {}, {})


def start_of(out: str) -> int:
    (start,) = re.findall(r"training from iteration (\d+)", out)
    return int(start)


# ---------------------------------------------------------------- whose directory it is


def test_a_directory_of_another_run_is_refused(
    documents: Path, own: Path, finished: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    before = content(own)
    said = (f"--save {own} holds checkpoints (iterations 2, 4)", "replace and delete", f"Add --load {own}", "another")
    refused(pretrain(documents, save=own, keep_last=1), *said)
    refused(pretrain(documents, save=own, load=tmp_path / "nothing"), *said)
    refused(["pretrain", *flags({"load": finished, "save": own, "train-iters": 6})], *said)
    refused(["pretrain", *flags({"load": own, "save": own, "finetune": True})], "without --finetune", *said)
    refused(["pretrain", *flags({"load": own, "save": own / FOURTH})], f"{own / FOURTH} is itself a checkpoint")
    for path in own.glob("iter_*"):
        (path / store.METADATA).write_text("")  # damaged, and as little to be replaced
    damaged = content(own)
    refused(pretrain(documents, save=own), *said)
    assert content(own) == damaged and before.keys() == damaged.keys()


def test_a_run_goes_on_in_its_own_directory_and_in_a_copy(
    own: Path, finished: Path, accepted: Callable[..., str]
) -> None:
    before = content(finished)
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6})])
    assert start_of(out) == 4 and store.complete_iterations(own) == [2, 4, 6]
    ids = {store.run_of(path) for path in own.glob("iter_*")}
    known = read_run(own)
    assert known is not None and ids == {known.run}
    assert content(finished) == before


def test_a_killed_run_that_saved_nothing_does_not_lock_its_directory(
    documents: Path, tmp_path: Path, accepted: Callable[..., str]
) -> None:
    save = tmp_path / "save"
    (store.prepare_iteration(save, 2) / "__0_0.distcp").write_bytes(b"half")
    out = accepted(pretrain(documents, save=save, load=save))
    assert start_of(out) == 0 and store.complete_iterations(save) == [2, 4]


def test_metrics_of_two_runs_do_not_mix(
    documents: Path, tmp_path: Path, accepted: Callable[..., str], refused: Callable[..., str]
) -> None:
    """A start at iteration 0 appended to whatever run's file it was given."""
    save, rows = tmp_path / "save", tmp_path / "metrics.jsonl"
    run = pretrain(documents, save=save, load=save, metrics_file=rows)
    accepted(run)
    written = rows.read_bytes()
    for changes in (
        {"seed": 7, "save": tmp_path / "other"},
        {"save": None, "save_interval": None},
        {"load": save, "finetune": True},
    ):
        changes = {"save": tmp_path / "third", **changes}
        assert "holds the metrics of another run" in refused(pretrain(documents, metrics_file=rows, **changes))
        assert rows.read_bytes() == written
    accepted([*run, "--train-iters", "6"])  # from the checkpoint
    for path in save.iterdir():  # as of a job that is killed before its first checkpoint
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert start_of(accepted(run)) == 0
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert {line["run"] for line in lines} == {json.loads((save / "run.json").read_text())["run"]}
    branch = pretrain(documents, load=save, save=tmp_path / "branch", metrics_file=rows, train_iters=5)
    accepted(branch)  # goes on with the run that it comes from, in its file
    assert [step["iteration"] for step in metrics_reader.read_run("x", rows).steps] == [1, 2, 3, 4, 5, 6]


def test_going_back_is_asked_for_by_name(
    own: Path, tmp_path: Path, refused: Callable[..., str], accepted: Callable[..., str]
) -> None:
    back: dict[str, object] = {"load": own / "iter_0000002", "save": own, "train-iters": 6}
    before = content(own)
    refused(["pretrain", *flags(back)], "goes back: iteration 4", "after 2 would be replaced", "--rewind", str(own))
    refused(["pretrain", *flags({**back, "save": tmp_path / "new", "rewind": True})], "--rewind", "is not in it")
    refused(["pretrain", *flags({**back, "finetune": True, "rewind": True})], "--rewind", "without --finetune")
    assert content(own) == before

    out = accepted(["pretrain", *flags({**back, "rewind": True, "exit-interval": 1})])
    assert start_of(out) == 2 and "going back from iteration 4 to 2" in out
    # Iteration 4 is of the run that was left, though newer than 3.
    again = accepted(["pretrain", *flags({"load": own, "save": own, "exit-interval": 1, "train-iters": 6})])
    assert start_of(again) == 3
    ids = [store.run_of(path) for path in sorted(own.glob("iter_*"))]
    assert ids[1] == ids[2] != ids[0] and store.complete_iterations(own) == [2, 3, 4]
    assert f"loaded checkpoint {own / FOURTH}" in accepted(["pretrain", *flags({"load": own, "save": own})])


def test_rewind_is_not_inherited_and_wants_a_checkpoint(
    documents: Path, own: Path, tmp_path: Path, refused: Callable[..., str], accepted: Callable[..., str]
) -> None:
    refused(pretrain(documents, save=tmp_path / "new", rewind=True), "rewind=True", "set load")
    accepted(["pretrain", *flags({"load": own / "iter_0000002", "save": own, "rewind": True, "exit-interval": 1})])
    words = {"load": own / "iter_0000002", "save": own, "train-iters": 6}
    refused(["pretrain", *flags(words)], "add --rewind")


@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_directory_of_an_earlier_release_is_adopted(
    own: Path, accepted: Callable[..., str], with_checksums: bool
) -> None:
    as_an_earlier_release_left_it(own, with_checksums)
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6})])
    assert start_of(out) == 4 and "is of an earlier release" in out
    assert ("has no checksums.json" in out) != with_checksums
    known = read_run(own)
    assert known is not None and known.began == 4 and store.run_of(own / "iter_0000006") == known.run
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 8})])
    assert start_of(out) == 6 and "earlier release" not in out


def test_an_earlier_release_was_rolled_back_by_its_tracker(own: Path, accepted: Callable[..., str]) -> None:
    as_an_earlier_release_left_it(own)
    store.write_tracker(own, 2)
    out = accepted(["pretrain", *flags({"load": own, "save": own, "exit-interval": 1})])
    assert start_of(out) == 2
    assert start_of(accepted(["pretrain", *flags({"load": own, "save": own, "exit-interval": 1})])) == 3


# ---------------------------------------------------------------- which checkpoint is taken


def test_the_newest_of_the_run_wins_over_a_tracker_that_lags(
    own: Path, tmp_path: Path, accepted: Callable[..., str]
) -> None:
    store.write_tracker(own, 2)  # as after a kill between the commit of 4 and the tracker's move
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6})])
    assert start_of(out) == 4
    assert f"{store.TRACKER} says '2', but iteration 4 of the same run is complete and newer" in out
    store.write_tracker(own, 2)
    elsewhere = {"load": own / "iter_0000002", "save": tmp_path / "other", "exit-interval": 1}
    assert start_of(accepted(["pretrain", *flags(elsewhere)])) == 2, "an older one by name"


@pytest.mark.parametrize("damage", ["gone", "{", "[]", '{"run": 1, "began": 0, "start": "x"}'])
def test_a_lost_id_is_found_in_the_checkpoints(own: Path, accepted: Callable[..., str], damage: str) -> None:
    before = read_run(own)
    (own / RUN_FILE).unlink() if damage == "gone" else (own / RUN_FILE).write_text(damage)
    store.write_tracker(own, 2)
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6})])
    assert start_of(out) == 4 and f"has no valid {RUN_FILE}" in out
    after = read_run(own)
    assert before is not None and after is not None and after.run == before.run


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("directory", ("is a directory", "move it away")),
        ("pipe", ("cannot be read (not a regular file)", "move it away")),
    ],
)
def test_a_tracker_that_is_no_file_is_named(
    own: Path, refused: Callable[..., str], tracker: str, said: tuple[str, ...]
) -> None:
    path = own / store.TRACKER
    path.unlink()
    path.mkdir() if tracker == "directory" else os.mkfifo(path)
    refused(["pretrain", *flags({"load": own, "save": own})], str(path), *said)
    refused(["evaluate", "--checkpoint", str(own), "--device", "cpu"], str(path), *said)


@pytest.mark.parametrize("tracker", ["", "\0\0", "9" * 5000, "four", "-1"])
def test_a_damaged_tracker_is_a_warning(own: Path, accepted: Callable[..., str], tracker: str) -> None:
    (own / store.TRACKER).write_text(tracker)
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6})])
    assert start_of(out) == 4 and "taking the newest complete checkpoint, iteration 4" in out


def test_a_tracker_without_any_checkpoint_does_not_start_from_scratch(
    documents: Path, own: Path, refused: Callable[..., str]
) -> None:
    for path in own.glob("iter_*"):
        shutil.rmtree(path)
    words = (f"{own / store.TRACKER} says '4'", "is missing", "put it back", "to start from scratch")
    refused(pretrain(documents, save=own, load=own), *words)
    assert not list(own.glob("iter_*"))


# ---------------------------------------------------------------- damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[:-1]),
    "one byte": lambda path: path.write_text(path.read_text().replace("sharded_backend", "sharded_backene")),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another kind": lambda path: path.write_text("[]"),
    "gone": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("alone", [False, True], ids=["with an older one", "alone"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metadata_is_refused_and_nothing_older_taken(
    own: Path, refused: Callable[..., str], damage: str, alone: bool
) -> None:
    if alone:  # as keep_last 1 leaves it
        shutil.rmtree(own / "iter_0000002")
    path = own / FOURTH / store.METADATA
    DAMAGES[damage](path)
    before = content(own)
    cure = "put the file back" if alone else f"load {own / 'iter_0000002'} by name"
    refused(
        ["pretrain", *flags({"load": own, "save": own, "train-iters": 6})], str(path), "tensors may be intact", cure
    )
    refused(["export", "--checkpoint", str(own), "--output", str(own.parent / "hf")], str(path), cure)
    refused(["pretrain", *flags({"load": own / FOURTH, "save": own.parent / "new"})], str(path), "put the file back")
    assert content(own) == before


def test_damaged_metadata_that_the_tracker_does_not_name_yet(own: Path, refused: Callable[..., str]) -> None:
    store.write_tracker(own, 2)
    (own / FOURTH / store.METADATA).unlink()
    refused(["pretrain", *flags({"load": own, "save": own})], str(own / FOURTH / store.METADATA), "is missing")


def test_a_damaged_checkpoint_is_kept_when_the_run_comes_there_again(own: Path, accepted: Callable[..., str]) -> None:
    (own / FOURTH / store.METADATA).write_text("{")
    before = content(own / FOURTH)
    back = {"load": own / "iter_0000002", "save": own, "rewind": True, "keep-last": 1, "train-iters": 6}
    out = accepted(["pretrain", *flags(back)])
    kept = own / f"{FOURTH}.kept"
    assert f"it is {kept} now" in out and content(kept) == before
    assert store.complete_iterations(own) == [6]


def test_what_a_killed_save_left_is_harmless_and_replaced(own: Path, accepted: Callable[..., str]) -> None:
    left = store.prepare_iteration(own, 6)
    for path in (own / FOURTH).iterdir():  # killed between the last file and the commit
        if path.is_file() and path.name != store.METADATA:
            shutil.copy(path, left)
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6})])
    assert start_of(out) == 4 and store.complete_iterations(own) == [2, 4, 6]
    assert not list(own.glob("*.kept")) and not (left / store.UNFINISHED).exists()


def test_what_a_killed_save_of_an_earlier_release_left_is_not_deleted_unseen(
    own: Path, accepted: Callable[..., str]
) -> None:
    as_an_earlier_release_left_it(own)
    shutil.copytree(own / FOURTH, own / "iter_0000006", ignore=shutil.ignore_patterns(store.METADATA))
    (own / "iter_0000005").mkdir()
    (own / "iter_0000005/__0_0.distcp").write_bytes(b"half")
    before = content(own / "iter_0000006")
    out = accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6, "save-interval": 1})])
    assert start_of(out) == 4 and store.complete_iterations(own) == [2, 4, 5, 6]
    assert [path.name for path in own.glob("*.kept")] == ["iter_0000006.kept"]
    assert content(own / "iter_0000006.kept") == before


def test_somebodys_files_in_a_checkpoints_place_stay(own: Path, accepted: Callable[..., str]) -> None:
    (own / "iter_0000005").mkdir()
    (own / "iter_0000005/thesis.txt").write_text("years of work")
    (own / "iter_0000006").write_text("a file")
    accepted(["pretrain", *flags({"load": own, "save": own, "train-iters": 6, "save-interval": 1})])
    assert (own / "iter_0000005.kept/thesis.txt").read_text() == "years of work"
    assert (own / "iter_0000006.kept").read_text() == "a file"
    assert store.complete_iterations(own) == [2, 4, 5, 6]


def test_checksums_that_are_gone_are_missed(
    own: Path, refused: Callable[..., str], accepted: Callable[..., str]
) -> None:
    path = own / FOURTH / checksums.MANIFEST
    path.unlink()
    said = (f"{path} is missing", store.TRAINING_STATE, f"load {own / 'iter_0000002'}", "--no-verify-checkpoint")
    resume = {"load": own, "save": own, "train-iters": 6}
    refused(["pretrain", *flags(resume)], *said)
    refused(["export", "--checkpoint", str(own), "--output", str(own.parent / "hf")], *said)
    refused(["evaluate", "--checkpoint", str(own), "--device", "cpu"], *said)
    assert start_of(accepted(["pretrain", *flags(resume), "--no-verify-checkpoint"])) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"iteration": "four"}, "iteration is 'four'"),
        ({"consumed_samples": None}, "consumed_samples is None"),
        ({"skipped_iterations": -1}, "skipped_iterations is -1"),
        (None, "is missing, so nothing says where the run was"),
    ],
)
def test_a_checkpoint_that_does_not_say_where_the_run_was(
    own: Path, refused: Callable[..., str], accepted: Callable[..., str], change: dict[str, object] | None, said: str
) -> None:
    path = own / FOURTH / store.TRAINING_STATE
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    resume = {"load": own, "save": own, "train-iters": 6}
    refused(["pretrain", *flags(resume), "--no-verify-checkpoint"], str(path), said, "--finetune")
    fresh = {"load": own, "save": own.parent / "new", "train-iters": 2, "finetune": True}
    assert start_of(accepted(["pretrain", *flags(fresh), "--no-verify-checkpoint"])) == 0


@pytest.mark.parametrize("kind", ["list", "words", "torch", "tracker"])
def test_a_random_number_state_of_another_type_is_refused(
    documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    accepted: Callable[..., str],
    kind: str,
) -> None:
    capture = rng_state.capture

    def of_another_type(device: object) -> object:
        state = capture(device)  # type: ignore[arg-type]
        changed = {"words": {**state, "python": {"version": 3, "words": "?", "gauss": None}}}
        changed["tracker"] = {**state, "tracker": {"model-parallel-rng": 7}}
        changed["torch"] = {**state, "torch": torch.zeros(3, dtype=torch.uint8)}
        return changed.get(kind, [1, 2])

    with monkeypatch.context() as patch:
        patch.setattr(rng_state, "capture", of_another_type)
        accepted(pretrain(documents, save=tmp_path / "save", exit_interval=1))
    resume = {"load": tmp_path / "save", "save": tmp_path / "save"}
    refused(["pretrain", *flags(resume)], "iter_0000001 holds a random-number state", "--no-load-rng")
    accepted(["pretrain", *flags(resume), "--no-load-rng"])


def test_a_table_of_contents_with_the_wrong_kinds_is_refused(
    own: Path, refused: Callable[..., str], accepted: Callable[..., str]
) -> None:
    path = own / FOURTH / ".metadata"
    table = pickle.loads(path.read_bytes())  # written by the run above
    entries = table.state_dict_metadata
    (random,) = [key for key in entries if key.startswith("rng_state/")]
    weight = "embedding.word_embeddings.weight"
    resume = ["pretrain", *flags({"load": own, "save": own, "train-iters": 6}), "--no-verify-checkpoint"]

    table.state_dict_metadata = {**entries, random: entries[weight]}
    path.write_bytes(pickle.dumps(table))
    refused(resume, "random-number state", "it is a tensor, not an object", "--no-load-rng")
    table.state_dict_metadata = {**entries, weight: entries[random]}
    path.write_bytes(pickle.dumps(table))
    refused(resume, f"{own / FOURTH} is damaged: {weight} is an object in it, not a tensor")
    table.state_dict_metadata = entries
    path.write_bytes(pickle.dumps(table))
    assert start_of(accepted(resume)) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda common: {**common, "opt_param_scheduler": [1]}, "opt_param_scheduler is [1], not a mapping"),
        (lambda common: {**common, "opt_param_scheduler": {"num_steps": "8"}}, "with a count of samples in num_steps"),
        (lambda common: {**common, "content_metadata": 3}, "content_metadata is 3, not a mapping"),
        (lambda common: [common], "holds a list, not a mapping"),
    ],
)
def test_a_common_state_of_another_type_is_refused(
    own: Path, refused: Callable[..., str], change: Callable[[dict[str, object]], object], said: str
) -> None:
    path = own / FOURTH / "common.pt"
    torch.save(change(torch.load(path, weights_only=True)), path)
    refused(["pretrain", *flags({"load": own, "save": own}), "--no-verify-checkpoint"], str(path), said)


# ---------------------------------------------------------------- parameters that are no numbers any more


def test_what_diverged_is_not_saved_and_no_good_checkpoint_pruned(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild: dict[str, object] = {"lr": 1e30, "save_interval": 1, "keep_last": 1}
    assert main(pretrain(documents, save=tmp_path / "never", **wild)) == 2
    out, error = capsys.readouterr()
    assert "warning: after iteration 1 a parameter holds 1.03e+30" in out and "not saved; there is no checkpoint" in out
    assert "the run has diverged" in error and "there is no checkpoint to go back to. Lower lr" in error
    assert not list((tmp_path / "never").glob("iter_*"))

    # The warm-up starts at 0: after one step the parameters are those of the start.
    assert main(pretrain(documents, save=tmp_path / "once", lr_warmup_iters=3, **wild)) == 2
    out, error = capsys.readouterr()
    first = tmp_path / "once/iter_0000001"
    assert "warning: after iteration 2 a parameter holds" in out
    assert "the run has diverged" in error and f"the last checkpoint is {first}: its parameters were finite" in error
    assert store.complete_iterations(tmp_path / "once") == [1]
    assert main(["pretrain", *flags({"load": first, "save": tmp_path / "again", "lr": 1e-3, "exit-interval": 1})]) == 0


def test_parameters_that_are_finite_and_too_large_end_a_run(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With experts losses and gradients stay finite for a step, whatever the rate; the warm-up's first step is none."""
    small = {"num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 48, "kv-channels": 8, "seq-length": 24}
    small |= {"moe-ffn-hidden-size": 16, "micro-batch-size": 4, "global-batch-size": 4}
    wild = {"preset": "tiny-moe", "lr": 1e30, "norm-scheme": "pre", "train-iters": 12, "eval-iters": 0}
    places = {"data-path": documents, "device": "cpu", "save": tmp_path / "save"}
    assert main(["pretrain", *flags({**small, **wild, **places, "save-interval": 1, "exit-interval": 2})]) == 2
    error = capsys.readouterr().err
    assert re.search(r"the run has diverged: after iteration 2 parameter \S+ holds \S+e\+\d+, and no parameter", error)
    assert store.complete_iterations(tmp_path / "save") == [1]


@pytest.mark.parametrize("saved", [False, True])
def test_a_gradient_that_ends_a_run_promises_no_checkpoint(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], saved: bool
) -> None:
    place = {"save": tmp_path / "save", "save_interval": 4} if saved else {"save_interval": None}
    assert main(pretrain(documents, lr=1e30, **place)) == 2
    error = capsys.readouterr().err
    assert "the run has diverged" in error and "is good" not in error
    assert ("there is no checkpoint to go back to" if saved else "there is no --save") in error
