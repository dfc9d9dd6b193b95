"""The scripts of ``launch_scripts/``, run as a cluster runs them: two machines are two torchrun agents on this one.

Of SLURM there are only the commands that the script calls, and Kubernetes is what its manifests say a pod gets.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from .conftest import TINY_MODEL, read_metrics
from .launch_nodes import (
    PATIENCE,
    SCRIPTS,
    UNFINISHED,
    container,
    ended,
    environment_of,
    free_port,
    slurm_variables,
    started,
    variables,
    wait_for,
    wait_until_open,
)

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
]

STEPS, FIRST = 60, 6  # of a run, and of the runs that it is compared with


@pytest.fixture(scope="module")
def config(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``STEPS`` steps over two ranks, TP 2, as a YAML file."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    values = {
        "model": {name.replace("-", "_"): value for name, value in TINY_MODEL.items()} | {"phd_repeat": 2},
        "parallel": {"tensor_model_parallel_size": 2, "device": "cpu"},
        "data": {"data_path": [str(documents)]},
        "training": {"micro_batch_size": 2, "global_batch_size": 2, "train_iters": STEPS, "eval_iters": 0},
        "logging": {"log_interval": 1},
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def losses(path: Path) -> dict[int, float]:
    """Loss of every step; no step was done twice."""
    lines = read_metrics(path)
    found = {int(line["iteration"]): line["lm_loss"] for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def one_machine(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the first steps by the single-node script."""
    directory = tmp_path_factory.mktemp("single")
    options = ["--exit-interval", str(FIRST), "--metrics-file", str(directory / "metrics.jsonl")]
    command = ["bash", str(SCRIPTS / "pretrain_single_node.sh"), str(config), *options]
    temporary = directory / "tmp"
    temporary.mkdir()
    with started(command, variables(NPROC="2", TMPDIR=str(temporary)), directory / "log") as process:
        code = ended(process, directory / "log")
    assert code == UNFINISHED, (directory / "log").read_text()
    assert list(temporary.glob("tmp.*")) == []
    return losses(directory / "metrics.jsonl")


def test_single_node(one_machine: dict[int, float]) -> None:
    assert sorted(one_machine) == list(range(1, FIRST + 1))
    assert one_machine[FIRST] < one_machine[1]


def pods_of_a_pytorchjob(config: Path, directory: Path, *options: object) -> tuple[list[str], dict[str, str]]:
    """The manifest's own command, and what the operator sets for its elastic policy; both pods on this machine."""
    places = {"/data/run.yaml": str(config), "/data/checkpoints": str(directory / "save")}
    command = [places.get(word, word) for word in container("kubernetes_pytorchjob.yaml")["command"]]
    command += ["--metrics-file", str(directory / "metrics.jsonl"), *map(str, options)]
    operator = {
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
        "PET_NNODES": "2:2",
        "PET_MAX_RESTARTS": "3",
    }
    return command, {**environment_of("kubernetes_pytorchjob.yaml"), **variables(**operator)}


def test_a_pod_is_killed_and_replaced(config: Path, one_machine: dict[int, float], tmp_path: Path) -> None:
    """The other pod's ranks start again, find the new pod's and go on from the newest checkpoint, with equal losses."""
    command, env = pods_of_a_pytorchjob(config, tmp_path, "--save-interval", FIRST)
    logs = [tmp_path / name for name in ("master", "killed", "replacement")]
    with ExitStack() as stack:
        master = stack.enter_context(started(command, env, logs[0]))
        wait_until_open(env["PET_RDZV_ENDPOINT"])
        with started(command, env, logs[1]) as killed:
            deadline = time.monotonic() + PATIENCE
            while not (tmp_path / f"save/iter_{FIRST:07d}/metadata.json").exists():
                assert master.poll() is None and killed.poll() is None and time.monotonic() < deadline, [
                    log.read_text() for log in logs[:2]
                ]
                time.sleep(0.05)
        replacement = stack.enter_context(started(command, env, logs[2]))
        codes = [ended(process, log) for process, log in ((replacement, logs[2]), (master, logs[0]))]
    assert codes == [0, 0], [log.read_text() for log in logs]
    assert re.search(r"training from iteration [1-9]", logs[0].read_text() + logs[2].read_text())
    seen: dict[int, float] = {}
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        assert seen.setdefault(int(line["iteration"]), line["lm_loss"]) == line["lm_loss"]
    assert sorted(seen) == list(range(1, STEPS + 1))
    assert {step: seen[step] for step in one_machine} == one_machine


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    return slurm_variables(tmp_path)


def test_slurm_saves_before_the_limit_requeues_and_finishes(
    config: Path, one_machine: dict[int, float], slurm: dict[str, str], tmp_path: Path
) -> None:
    save, log, requeued = tmp_path / "save", tmp_path / "log", tmp_path / "requeued"
    command = ["bash", str(SCRIPTS / "slurm.sbatch"), str(config), "--save", str(save), "--load", str(save)]
    command += ["--metrics-file", str(tmp_path / "metrics.jsonl")]
    with started(command, slurm, log) as batch:
        wait_for(rf"iteration +{FIRST}/", batch, log)
        batch.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@600: to the batch script alone
        assert ended(batch, log) == 0, log.read_text()
    said = log.read_text()
    assert "rendezvous at localhost:2" in said
    (stopped,) = re.findall(r"stopped at iteration (\d+): received SIGUSR1", said)
    assert FIRST <= int(stopped) < STEPS and (save / f"iter_{int(stopped):07d}/metadata.json").exists()
    assert requeued.read_text() == f"{slurm['SLURM_JOB_ID']}\n"
    assert "Traceback" not in said

    with started(command, {**slurm, "SLURM_RESTART_COUNT": "1"}, log) as batch:
        assert ended(batch, log) == 0, log.read_text()
    assert f"training from iteration {stopped}" in log.read_text()
    assert f"stopped at iteration {STEPS}: finished" in log.read_text()
    assert requeued.read_text().count("\n") == 1, "a finished run is not put back"
    found = losses(tmp_path / "metrics.jsonl")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert {step: found[step] for step in one_machine} == one_machine


@pytest.mark.parametrize(
    ("step", "cancel", "refused", "code", "requeues"),
    [
        ("exit 0", False, False, 0, False),
        ("exit 1", False, False, 1, False),
        ("exit 75", False, False, 0, True),
        ("exit 75", False, True, 75, True),
        ("trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done", True, False, 75, False),
    ],
    ids=["finished", "failed", "unfinished", "not-requeueable", "cancelled"],
)
def test_slurm_requeues_exactly_when_unfinished(
    slurm: dict[str, str], tmp_path: Path, step: str, cancel: bool, refused: bool, code: int, requeues: bool
) -> None:
    """The end of the step is given; what the batch script makes of it is tested."""
    (tmp_path / "commands/srun").write_text(f"#!/usr/bin/env bash\n{step}\n")
    env = {**slurm, **({"REQUEUE_CODE": "1"} if refused else {})}
    with started(["bash", str(SCRIPTS / "slurm.sbatch"), "run.yaml"], env, tmp_path / "log") as batch:
        if cancel:
            wait_for("ready", batch, tmp_path / "log")
            batch.send_signal(signal.SIGTERM)
        assert ended(batch, tmp_path / "log") == code
    assert (tmp_path / "requeued").exists() == requeues
