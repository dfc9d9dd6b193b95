"""Ranks that die, stop or get stuck, a torchrun that is gone, a terminal that is lost: by the real program."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phd_megatron.checkpoint import store

from .conftest import ROOT, TINY_MODEL, flags, program_environment, read_metrics
from .launch_nodes import SCRIPTS, free_port, started, variables

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and the parent-death signal are Linux's"),
]

PATIENCE = 400.0  # seconds for anything to happen on a busy machine; a fraction of the default timeout
MOMENT = ROOT / "tests/faults/moment.py"


def words(data: Path, save: Path, **changes: object) -> list[str]:
    """A run after ``pretrain`` that goes on until it is stopped."""
    options: dict[str, object] = {
        **{**TINY_MODEL, "data-path": data, "micro-batch-size": 2, "global-batch-size": 4, "train-iters": 5000},
        **{"eval-iters": 0, "log-interval": 1, "device": "cpu", "save": save, "load": save},
    }
    return flags(options | {name.replace("_", "-"): value for name, value in changes.items()})


def torchrun(*program: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]


def ranks_of(agent: int) -> dict[int, int]:
    """Rank -> process of a torchrun."""
    found: dict[int, int] = {}
    for task in Path(f"/proc/{agent}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return found


def agent_of(script: int) -> int:
    (agent,) = (int(c) for t in Path(f"/proc/{script}/task").glob("*/children") for c in t.read_text().split())
    return agent


def wait_until(happened: Callable[[], object], process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"not seen: {what}; code {process.poll()}\n{log.read_text()}")
        time.sleep(0.05)


def steps(log: Path) -> int:
    return len(re.findall(r"iteration +\d+/", log.read_text()))


def is_gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def ours(text: str) -> str:
    """Output without torchrun's report of its ranks."""
    return re.sub(r"(?s)Traceback \(most recent call last\):\n(?:(?!\n\n).)*?ChildFailedError.*", "", text)


def test_a_restart_by_torchrun_goes_on_with_the_same_numbers(documents: Path, tmp_path: Path) -> None:
    """MAX_RESTARTS=2: a rank is killed in the first and another in the second start; the third one finishes."""
    log, save = tmp_path / "log", tmp_path / "save"
    script = ["bash", str(SCRIPTS / "pretrain_single_node.sh")]
    run = words(documents, save, train_iters=40, save_interval=2, metrics_file=tmp_path / "metrics.jsonl")
    with started([*script, *run], variables(NPROC="2", MAX_RESTARTS="2"), log) as process:
        for rank in (1, 0):
            starts = 2 - rank
            begun = rf"(?s)(training from iteration.*){{{starts}}}\n.*iteration +\d+/.*saved checkpoint"
            wait_until(lambda pattern=begun: re.search(pattern, log.read_text()), process, log, f"start {starts}")
            os.kill(ranks_of(agent_of(process.pid))[rank], signal.SIGKILL)
        assert process.wait(PATIENCE) == 0, log.read_text()
    said = log.read_text()
    assert len(re.findall("training from iteration", said)) == 3 and "stopped at iteration 40: finished" in said
    assert "Traceback" not in said
    for rank in (1, 0):
        (line,) = re.findall(
            rf"error: rank {rank} \(host \S+, process \d+\) has died; it was at iteration \d+ .*", said
        )
        assert line.endswith("goes on from its newest complete checkpoint when it is started again")

    whole = tmp_path / "whole.jsonl"
    undisturbed = words(documents, tmp_path / "other", train_iters=40, metrics_file=whole)
    done = subprocess.run(
        torchrun("-m", "phd_megatron", "pretrain", *undisturbed), cwd=ROOT, env=program_environment(), timeout=PATIENCE
    )
    assert done.returncode == 0
    expected = {line["iteration"]: (line["lm_loss"], line["grad_norm"]) for line in read_metrics(whole)}
    found = [
        (line["iteration"], (line["lm_loss"], line["grad_norm"])) for line in read_metrics(tmp_path / "metrics.jsonl")
    ]
    assert {iteration for iteration, _ in found} == set(range(1, 41))
    assert all(expected[iteration] == numbers for iteration, numbers in found)


def test_a_stopped_rank_is_named_and_the_run_ends_in_a_fraction_of_a_minute(documents: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = words(documents, tmp_path / "save", distributed_timeout_minutes=0.3, save_interval=3)
    with started(torchrun("-m", "phd_megatron", "pretrain", *run), program_environment(), log) as process:
        wait_until(lambda: steps(log) > 4, process, log, "steps")
        victim = ranks_of(process.pid)[1]
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: "warning: rank 1" in log.read_text(), process, log, "the stopped rank's name")
        assert process.wait(PATIENCE) == 1
    said = log.read_text()
    (warning,) = re.findall("warning: rank 1 .*", said)
    assert re.search(rf"\(host \S+, process {victim}\) has given no sign of life for \d+ s", warning)
    assert re.search(r"at iteration \d+ in '.+', for \d+ s then", warning)
    assert f"It is stopped: kill -CONT {victim} lets it go on" in warning and "after 0.3 minutes" in warning
    errors = re.findall("error: .*", said)
    assert len(errors) == 1 and f"rank 1 (host {os.uname().nodename}, process {victim})" in errors[0]
    assert is_gone(victim), "nothing is left behind"
    assert "Traceback" not in ours(said)
    assert re.search(rf"Root Cause(?s:.*)exitcode  : -9 \(pid: {victim}\)", said), "torchrun blames the right one"


def test_a_rank_that_goes_on_is_told_of(documents: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = words(documents, tmp_path / "save", distributed_timeout_minutes=0.5)
    with started(torchrun("-m", "phd_megatron", "pretrain", *run), program_environment(), log) as process:
        wait_until(lambda: steps(log) > 2, process, log, "steps")
        victim = ranks_of(process.pid)[0]
        os.kill(victim, signal.SIGSTOP)
        wait_until(lambda: "warning: rank 0" in log.read_text(), process, log, "the stopped rank's name")
        os.kill(victim, signal.SIGCONT)
        wait_until(lambda: "note: rank 0" in log.read_text(), process, log, "that it goes on")
        before = steps(log)
        wait_until(lambda: steps(log) > before + 3, process, log, "more steps")
        for rank in ranks_of(process.pid).values():
            os.kill(rank, signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, log.read_text()
    assert re.search(r"note: rank 0 \(host \S+, process \d+\) answers again", log.read_text())


def test_a_stuck_rank_is_named_with_its_stack(documents: Path, tmp_path: Path) -> None:
    """One rank hangs in the system call that opens its part of a checkpoint, as on a dead file server."""
    log, held = tmp_path / "log", tmp_path / "held"
    run = words(documents, tmp_path / "save", distributed_timeout_minutes=0.3, save_interval=2)
    moment = {"FAULT_MOMENT": rf"1:open:/__1_0\.distcp$:1:{held}"}
    with started(torchrun(str(MOMENT), "pretrain", *run), program_environment() | moment, log) as process:
        wait_until(held.exists, process, log, "the save")
        victim = ranks_of(process.pid)[1]
        assert process.wait(PATIENCE) == 1
    said = log.read_text()
    (warning,) = re.findall("warning: no rank has got on .*", said)
    assert f"process {victim}) is at iteration 2 in 'saving', for" in warning and warning.endswith("the others wait")
    (found,) = re.findall(r"(?s)rank 1 \(host \S+, process \d+\): Python stack\n(.*?moment\.py.*?)\n\S", said)
    assert "checkpoint/writer.py" in found
    (error,) = re.findall("error: .*", said)
    assert f"process {victim})" in error and "Traceback" not in ours(said)
    assert is_gone(victim)


def test_ranks_end_with_a_torchrun_that_is_killed_while_they_start(documents: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = torchrun("-m", "phd_megatron", "pretrain", *words(documents, tmp_path / "save"))
    with started(run, program_environment(), log) as process:
        wait_until(lambda: len(ranks_of(process.pid)) == 2, process, log, "two ranks")
        left = ranks_of(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE
        while not all(map(is_gone, left.values())):
            assert time.monotonic() < deadline, "ranks are left behind"
            time.sleep(0.05)


def test_a_rank_whose_torchrun_went_before_it_began(tmp_path: Path) -> None:
    """The shell ends at once, so that the program's parent is gone when it asks the kernel to die with it."""
    out = tmp_path / "out"
    command = f"(sleep 1; exec setsid {sys.executable} -m phd_megatron --version >{out} 2>&1) & exit 0"
    environment = program_environment() | {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1"}
    subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment, check=True)
    deadline = time.monotonic() + PATIENCE
    while not (out.exists() and out.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "torchrun has gone while this rank was starting" in out.read_text()


def test_a_lost_terminal_saves(documents: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LEADER, *words(documents, save, metrics_file=tmp_path / "metrics.jsonl")],
        **{"cwd": ROOT, "env": program_environment()},
        **{"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True},
    )
    os.close(terminal)
    said, deadline = b"", time.monotonic() + PATIENCE
    while len(re.findall(rb"iteration +\d+/", said)) < 3:
        assert time.monotonic() < deadline, said
        said += os.read(master, 65536)
    os.close(master)  # the kernel sends SIGHUP, and whatever is written from now on fails
    assert process.wait(PATIENCE) == 0
    done = int(read_metrics(tmp_path / "metrics.jsonl")[-1]["iteration"])
    assert store.complete_iterations(save) == [done]


#: takes the terminal for its own, as a shell's child has it, and becomes the program
LEADER = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the suite ignores it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "phd_megatron", "pretrain", *sys.argv[1:]])
"""


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_many_processes_that_cannot_find_one_another_are_refused(documents: Path, tmp_path: Path, name: str) -> None:
    run = [sys.executable, "-m", "phd_megatron", "pretrain", *words(documents, tmp_path / "save")]
    done = subprocess.run(
        run, cwd=ROOT, env=program_environment() | {name: "4"}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2
    assert f"error: {name}=4 is set" in done.stderr and "would be a run of its own" in done.stderr
    assert "slurm.sbatch" in done.stderr and f"unset {name}" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "save").exists()


def test_tasks_of_srun_form_one_world(documents: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "phd_megatron", "pretrain", *words(documents, tmp_path / "save", exit_interval=2)]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "SLURM_NTASKS": "2"}
    tasks = [
        subprocess.Popen(
            run,
            **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
            env=program_environment() | address | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    said = [task.communicate(timeout=PATIENCE)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 ranks: DP 2" in said[0] and "stopped at iteration 2" in said[0] and "iteration" not in said[1]
