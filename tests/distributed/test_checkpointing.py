"""Saving and resuming for real: processes that are killed, disks that are full, files that are cut short."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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


def alone(*args: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
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
        assert before["save_seconds"] < 10


def test_kill_during_save_resumes_from_the_checkpoint_before(torchrun: Any, tmp_path: Path) -> None:
    """DP2, bf16 with fp32 main parameters, overlapped collectives; killed when only the commit was missing."""
    options = ("--bf16", "--overlap", "--steps", 4, "--save", tmp_path, "--save-at", 1, 2, 3, "--keep-last", 1)
    killed = torchrun(
        2, PROGRAM, *options, "--fault", "kill-before-commit", "--fault-at", 3, check=False, env=QUIET, timeout=60
    )
    assert killed.returncode != 0
    partial = tmp_path / "iter_0000003"
    assert (partial / "__0_0.distcp").exists() and not (partial / "metadata.json").exists()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert not (tmp_path / "iter_0000001").exists(), "keep_last = 1"

    resumed = results(torchrun(2, PROGRAM, *options, "--load", tmp_path, env=QUIET).stdout)
    assert [result["start"] for result in resumed] == [2, 2]
    assert (partial / "metadata.json").exists()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003"]

    whole = results(torchrun(2, PROGRAM, "--bf16", "--overlap", "--steps", 4, env=QUIET).stdout)
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"][2:]
        assert {key: after[key] for key in STATE} == {key: before[key] for key in STATE}


def test_full_disk_on_one_rank_is_an_error_on_all(torchrun: Any, tensor_parallel: Any, tmp_path: Path) -> None:
    save = shutil.copytree(tensor_parallel[0], tmp_path / "save")
    fault = ("--fault", "file-size", "--fault-at", 3, "--fault-rank", 1)
    options = ("--tp", 2, "--steps", 4, "--save", save, "--load", save, "--save-at", 3)
    done = torchrun(2, PROGRAM, *options, *fault, check=False, env=QUIET, timeout=60)
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, done.stdout
    assert all("rank 1" in line and "File too large" in line for line in errors)
    assert all(f"the last complete checkpoint is {save / 'iter_0000002'}" in line for line in errors)
    assert not (save / "iter_0000003").exists()
    assert (save / "iter_0000002" / "metadata.json").exists()


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
    for number, (name, how) in enumerate(damage):
        copy = shutil.copytree(good, tmp_path / f"{number}" / "iter_0000002")
        content = (copy / name).read_bytes()
        if isinstance(how, int):
            (copy / name).write_bytes(content[:how])
        else:
            (copy / name).write_bytes(how if name == ".metadata" else how + content[len(how) :])
        cases.append({"load": str(copy)})
    cases += [{"load": str(good), "layers": 3}, {"load": str(good), "layers": 1}]
    cases += [{"load": str(good), "hidden": 64}, {"load": str(good), "plain_optimizer": True}]
    done = alone("--refusals", json.dumps(cases))
    said = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("REFUSAL ")]
    assert len(said) == len(cases), done.stdout
    assert said[0] == "loaded", "TP2 loads on one rank"
    assert "random-number state (dropout) starts afresh" in done.stdout
    for message, (name, _) in zip(said[1:], damage, strict=False):
        assert name in message and "iter_0000002" in message
    assert "truncated" in said[1] and "5000 bytes" in said[1]
    assert "posix.system" in said[5]
    more, fewer, wider, optimizer = said[-4:]
    assert "lacks decoder.layers.2" in more
    assert "this model has no decoder.layers.1" in fewer
    assert "has shape" in wider and "(64," in wider and "another architecture" in wider
    assert "use_distributed_optimizer" in optimizer


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
        output, _ = first.communicate(timeout=40)
        assert "received SIGTERM" in output
        saved = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
        assert saved >= 1 and (tmp_path / f"iter_{saved:07d}" / "metadata.json").exists()

        # kill -9 of the launcher alone: its worker must neither go on training nor keep the directory
        first = start()
        first.kill()
        began = time.monotonic()
        third = alone("--steps", saved + 1, "--save", tmp_path, "--load", tmp_path, "--save-at", saved + 1)
        assert third.returncode == 0, third.stdout
        assert f'"start": {saved}' in third.stdout
        assert time.monotonic() - began < 60
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
            first.wait()
