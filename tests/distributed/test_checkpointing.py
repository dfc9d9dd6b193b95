"""Saving and resuming for real: processes that are killed, disks that are full, files that are cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("checkpoint_program.py")
ROOT = Path(__file__).resolve().parents[2]
QUIET = {"PYTHONWARNINGS": "ignore"}
STATE = ("parameters", "main_parameters", "moments", "adam_steps", "num_steps")


def results(output: str) -> list[dict[str, Any]]:
    """The RESULT of each rank, by rank."""
    found = [json.loads(line.split("RESULT ", 1)[1]) for line in output.splitlines() if "RESULT " in line]
    return sorted(found, key=lambda result: result["rank"])


def alone(*args: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The program as a world of one."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, args)],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )


def environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, [str(ROOT), clean.get("PYTHONPATH")]))
    return {**clean, **QUIET, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def tensor_parallel(torchrun: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Save directory with iterations 1 and 2 of a TP2 run in fp32, and the results of its four steps."""
    save = tmp_path_factory.mktemp("tp2")
    done = torchrun(2, PROGRAM, "--tp", 2, "--steps", 4, "--save", save, "--save-at", 1, 2, env=QUIET)
    return save, results(done.stdout)


def test_resume_is_bit_exact_with_tensor_parallelism(torchrun: Any, tensor_parallel: Any) -> None:
    save, whole = tensor_parallel
    resumed = results(torchrun(2, PROGRAM, "--tp", 2, "--steps", 4, "--load", save, env=QUIET).stdout)
    assert [result["start"] for result in resumed] == [2, 2]
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"][2:]
        assert {key: after[key] for key in STATE} == {key: before[key] for key in STATE}
        assert after["adam_steps"] == [4.0]


@pytest.fixture(scope="module")
def overlapped(torchrun: Any) -> list[dict[str, Any]]:
    """Six steps of DP2 with bf16, fp32 main parameters and overlapped collectives, never interrupted."""
    return results(torchrun(2, PROGRAM, "--bf16", "--overlap", "--steps", 6, env=QUIET).stdout)


@pytest.mark.parametrize("how", [(), ("--background",)], ids=["waited-for", "background"])
def test_kill_during_save_resumes_from_the_checkpoint_before(
    torchrun: Any, overlapped: Any, tmp_path: Path, how: tuple[str, ...]
) -> None:
    """Killed when only the commit was missing; in the background two steps later, with a file half written."""
    fault = "kill-while-writing" if how else "kill-before-commit"
    options = ("--bf16", "--overlap", "--steps", 6, "--save", tmp_path, "--save-at", 1, 2, 3, "--keep-last", 1, *how)
    killed = torchrun(2, PROGRAM, *options, "--fault", fault, "--fault-at", 3, check=False, env=QUIET, timeout=300)
    assert killed.returncode != 0
    partial = tmp_path / "iter_0000003"
    assert (partial / "__0_0.distcp").exists() and not (partial / "metadata.json").exists()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert not (tmp_path / "iter_0000001").exists(), "keep_last = 1"

    resumed = results(torchrun(2, PROGRAM, *options, "--load", tmp_path, env=QUIET).stdout)
    assert [result["start"] for result in resumed] == [2, 2]
    assert (partial / "metadata.json").exists()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003"]
    for before, after in zip(overlapped, resumed, strict=True):
        assert after["losses"] == before["losses"][2:]
        assert {key: after[key] for key in STATE} == {key: before[key] for key in STATE}


@pytest.mark.parametrize("how", [(), ("--background",)], ids=["waited-for", "background"])
def test_kill_between_the_commit_and_the_tracker_loses_nothing(
    torchrun: Any, overlapped: Any, tmp_path: Path, how: tuple[str, ...]
) -> None:
    options = ("--bf16", "--overlap", "--steps", 6, "--save", tmp_path, "--save-at", 1, 2, 3, "--keep-last", 2, *how)
    fault = ("--fault", "kill-before-tracker", "--fault-at", 3)
    killed = torchrun(2, PROGRAM, *options, *fault, check=False, env=QUIET, timeout=300)
    assert killed.returncode != 0
    assert (tmp_path / "iter_0000003/metadata.json").exists()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "2"

    done = torchrun(2, PROGRAM, *options, "--load", tmp_path, env=QUIET)
    resumed = results(done.stdout)
    assert [result["start"] for result in resumed] == [3, 3]
    assert "says '2', but iteration 3 of the same run is complete and newer" in done.stdout
    assert resumed[0]["tracker"][0] == "3", "it moves with the restart"
    for before, after in zip(overlapped, resumed, strict=True):
        assert after["losses"] == before["losses"][3:]
        assert {key: after[key] for key in STATE} == {key: before[key] for key in STATE}


def test_background_save_holds_the_state_of_its_step(torchrun: Any, overlapped: Any, tmp_path: Path) -> None:
    """Rank 1 starts to write when two more steps are done: what it writes is older, and the tracker waits for it."""
    options = ("--bf16", "--overlap", "--steps", 6)
    slow = ("--save", tmp_path, "--save-at", 2, "--background", "--fault", "slow", "--fault-at", 2, "--fault-rank", 1)
    saved = results(torchrun(2, PROGRAM, *options, *slow, env=QUIET).stdout)
    for before, after in zip(overlapped, saved, strict=True):
        assert after["losses"] == before["losses"], "saving changes nothing"
        assert after["tracker"][:4] == [None] * 4, "training went on while nothing was complete"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "2"

    resumed = results(torchrun(2, PROGRAM, *options, "--load", tmp_path, env=QUIET).stdout)
    for before, after in zip(overlapped, resumed, strict=True):
        assert after["start"] == 2 and after["losses"] == before["losses"][2:]
        assert {key: after[key] for key in STATE} == {key: before[key] for key in STATE}


@pytest.mark.parametrize("how", [(), ("--background",)], ids=["waited-for", "background"])
def test_full_disk_on_one_rank_is_an_error_on_all(
    torchrun: Any, tensor_parallel: Any, tmp_path: Path, how: tuple[str, ...]
) -> None:
    save = shutil.copytree(tensor_parallel[0], tmp_path / "save")
    fault = ("--fault", "file-size", "--fault-at", 3, "--fault-rank", 1)
    options = ("--tp", 2, "--steps", 4, "--save", save, "--load", save, "--save-at", 3, *how)
    done = torchrun(2, PROGRAM, *options, *fault, check=False, env=QUIET, timeout=300)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, done.stdout
    assert all("rank 1" in line and "File too large" in line for line in errors)
    assert all(f"the last complete checkpoint is {save / 'iter_0000002'}" in line for line in errors)
    assert not (save / "iter_0000003").exists()
    assert (save / "iter_0000002" / "metadata.json").exists()


@pytest.mark.parametrize("how", [(), ("--background",)], ids=["waited-for", "background"])
def test_a_parameter_of_one_rank_that_is_no_number_is_an_error_on_all(
    torchrun: Any, tmp_path: Path, how: tuple[str, ...]
) -> None:
    options = ("--tp", 2, "--bf16", "--overlap", "--steps", 3, "--save", tmp_path, "--save-at", 1, 2, "--keep-last", 1)
    fault = ("--fault", "nan", "--fault-at", 2, "--fault-rank", 1)
    done = torchrun(2, PROGRAM, *options, *how, *fault, check=False, env=QUIET, timeout=300)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and errors[0] == errors[1], done.stdout
    assert "the run has diverged: after iteration 2 " in errors[0] and "holds nan (rank 1), so the model" in errors[0]
    assert f"the last checkpoint is {tmp_path / 'iter_0000001'}: its parameters were finite" in errors[0]
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]


def test_two_saves_in_a_row_that_find_a_parameter_too_large_end_a_run(torchrun: Any, tmp_path: Path) -> None:
    options = ("--tp", 2, "--steps", 5, "--save", tmp_path, "--save-at", 1, 2, 3, 4, "--keep-last", 1)
    fault = ("--fault", "large", "--fault-at", 2, "--fault-rank", 1)
    done = torchrun(2, PROGRAM, *options, *fault, check=False, env=QUIET, timeout=300)
    said = [line for line in done.stdout.splitlines() if line.startswith(("error: ", "warning: after"))]
    assert len(said) == 3 and said[1] == said[2], done.stdout
    assert said[0].startswith("warning: after iteration 2 a parameter holds 1e+30")
    assert "the run has diverged: after iteration 3 " in said[1] and "(rank 1), so the model is not saved" in said[1]
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]


def test_too_little_space_is_refused_before_writing(tmp_path: Path) -> None:
    done = alone("--steps", 2, "--save", tmp_path, "--save-at", 1, 2, "--fault", "full", "--fault-at", 2)
    assert done.returncode == 2
    assert "no space left" in done.stdout and "MiB" in done.stdout
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001"]


def test_wrong_and_damaged_checkpoints_are_named(tensor_parallel: Any, tmp_path: Path) -> None:
    good = tensor_parallel[0] / "iter_0000002"
    damage: list[tuple[str, int | bytes]] = [("__1_0.distcp", 5000), ("common.pt", 100), (".metadata", 50)]
    damage += [("__0_0.distcp", b"\0" * 400), (".metadata", b"cposix\nsystem\n(S'true'\ntR.")]
    cases: list[dict[str, Any]] = [{"load": str(good)}]
    for number, (name, how) in enumerate([*damage, *damage]):
        copy = shutil.copytree(good, tmp_path / f"{number}" / "iter_0000002")
        content = (copy / name).read_bytes()
        if isinstance(how, int):
            (copy / name).write_bytes(content[:how])
        else:
            (copy / name).write_bytes(how if name == ".metadata" else how + content[len(how) :])
        if number < len(damage):
            (copy / "checksums.json").unlink()  # as an earlier release saved it
            state = json.loads((copy / "training_state.json").read_text())
            (copy / "training_state.json").write_text(json.dumps({**state, "protocol": 1}))
        cases.append({"load": str(copy)})
    flipped = shutil.copytree(good, tmp_path / "flipped" / "iter_0000002")
    content = bytearray((flipped / "__1_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (flipped / "__1_0.distcp").write_bytes(content)
    cases += [{"load": str(flipped)}, {"load": str(flipped), "no_verify": True}]
    cases += [{"load": str(good), "layers": 3}, {"load": str(good), "layers": 1}]
    cases += [{"load": str(good), "hidden": 64}]
    done = alone("--refusals", json.dumps(cases))
    said = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("REFUSAL ")]
    assert len(said) == len(cases), done.stdout
    assert said[0] == "loaded", "TP2 loads on one rank"
    assert "random-number state (dropout) starts afresh" in done.stdout
    for message, (name, _) in zip(said[1:], [*damage, *damage, ("__1_0.distcp", 1)], strict=False):
        assert name in message and "iter_0000002" in message
    assert done.stdout.count("has no checksums.json") == len(damage)
    assert "truncated: it has 5000 bytes, and had" in said[6]
    for message in said[8:12]:
        assert "checksum is" in message or "bytes, and had" in message or "truncated" in message
    assert said[12] == "loaded", "without the checksums nobody sees a flipped bit of a tensor"
    assert "truncated" in said[1] and "5000 bytes" in said[1]
    assert "posix.system" in said[5]
    more, fewer, wider = said[-3:]
    assert "another architecture: it lacks decoder.layers.2" in more
    assert "this model has no decoder.layers.1" in fewer
    assert "has shape" in wider and "(64," in wider and "another architecture" in wider


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "tokenizer/tokenizer.json"])
def test_a_flipped_byte_ends_all_ranks_whichever_read_the_file(
    torchrun: Any, tensor_parallel: Any, tmp_path: Path, name: str
) -> None:
    """The files are divided over the ranks, so a rank learns of some from another one."""
    copy = shutil.copytree(tensor_parallel[0], tmp_path / "save") / "iter_0000002" / name
    content = bytearray(copy.read_bytes())
    content[len(content) // 3] ^= 0x10
    copy.write_bytes(content)
    done = torchrun(2, PROGRAM, "--tp", 2, "--steps", 4, "--load", tmp_path / "save", check=False, env=QUIET)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert errors and all(f"{copy} is damaged" in line for line in errors), done.stdout
    assert "RESULT" not in done.stdout and "loaded checkpoint" not in done.stdout


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_optimizer_states_move_between_the_distributed_and_the_plain_optimizer(
    tmp_path: Path, precision: tuple[str, ...]
) -> None:
    """Whoever loads holds, bit for bit, the states that the other kind saved, and goes on with the same losses."""
    distributed, plain = (), ("--plain-optimizer",)
    whole = results(alone("--steps", 6, *precision).stdout)[0]
    losses: list[str] = []
    for end, kind, other in ((2, distributed, plain), (4, plain, distributed), (6, distributed, plain)):
        places = ("--save", tmp_path, "--load", tmp_path, "--save-at", end)
        saved = results(alone("--steps", end, *places, *precision, *kind).stdout)[0]
        assert saved["start"] == end - 2
        losses += saved["losses"]
        loaded = results(alone("--steps", end, "--load", tmp_path, *precision, *other).stdout)[0]
        assert loaded["start"] == end and not loaded["losses"]
        assert {key: loaded[key] for key in STATE} == {key: saved[key] for key in STATE}
    # The two kinds sum the clip norm in another order, so the last bit of a step may differ.
    for one, two in zip(losses, whole["losses"], strict=True):
        assert float.fromhex(one) == pytest.approx(float.fromhex(two), rel=1e-3 if precision else 1e-6)


def test_second_run_is_refused_sigterm_saves_and_kill_frees_the_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += [str(PROGRAM), "--steps", "1000", "--sleep", "0.2", "--save", str(tmp_path), "--load", str(tmp_path)]

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("step "):
                return process
        pytest.fail(output)

    first = start()
    try:
        second = alone("--steps", 1, "--save", tmp_path)
        assert second.returncode == 2
        assert "another run saves into" in second.stdout and "since" in second.stdout
        first.send_signal(signal.SIGTERM)
        output, _ = first.communicate(timeout=300)
        assert "received SIGTERM" in output
        saved = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
        assert saved >= 1 and (tmp_path / f"iter_{saved:07d}" / "metadata.json").exists()

        # kill -9 of the launcher alone: its worker must neither go on training nor keep the directory
        first = start()
        first.kill()
        third = alone("--steps", saved + 1, "--save", tmp_path, "--load", tmp_path, "--save-at", saved + 1)
        assert third.returncode == 0, third.stdout
        assert f'"start": {saved}' in third.stdout
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
