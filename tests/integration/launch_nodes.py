"""What the tests of ``launch_scripts/`` share: processes of a node, manifests, and what SLURM's commands do."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT, program_environment

SCRIPTS = ROOT / "launch_scripts"
PATIENCE = 400.0  # seconds for anything to happen on a busy machine
UNFINISHED = 75  # exit code of the scripts

#: What SLURM's commands do for the script: two "nodes", signals passed on to the tasks, the highest exit code.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
tasks=()
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"; again=1' USR1
trap 'kill -TERM "${tasks[@]}"; again=1' TERM
highest=0
for task in "${tasks[@]}"; do
    again=1
    while ((again)); do again=0 code=0; wait "$task" || code=$?; done
    ((code <= highest)) || highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") [[ "$3" == "node[0-1]" ]] && printf 'localhost\\nlocalhost\\n' ;;
    requeue*) echo "$2" >>"$REQUEUED"; exit "${REQUEUE_CODE:-0}" ;;
    *) exit 1 ;;
esac
"""


def variables(**more: str) -> dict[str, str]:
    """The environment of a node: this interpreter, one rank, nothing left of another launcher."""
    kept = {
        n: v for n, v in program_environment().items() if not n.startswith(("PET_", "SLURM_", "MASTER", "TORCHELAS"))
    }
    del kept["OMP_NUM_THREADS"]
    return {**kept, "PYTHON": sys.executable, "NPROC": "1", "PHD_MEGATRON_THREADS": "1", **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a session of its own, whose processes do not outlive the block; ranks die with their torchrun."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(process: subprocess.Popen[bytes], log: Path) -> int:
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"not within {PATIENCE:.0f} s: the end of {process.args!r}\n{log.read_text()}")


def wait_for(pattern: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, log.read_text()):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"never printed {pattern!r}, code {process.poll()}:\n{log.read_text()}")
        time.sleep(0.05)


def container(manifest: str) -> dict[str, Any]:
    """The one container of a manifest's pods."""
    *_, workload = yaml.safe_load_all((SCRIPTS / manifest).read_text("utf-8"))
    template = workload["spec"].get("template") or workload["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    (found,) = template["spec"]["containers"]
    return found


def environment_of(manifest: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(manifest)["env"]}


def slurm_variables(directory: Path) -> dict[str, str]:
    """Variables of a batch script, and a PATH with the commands it calls."""
    commands = directory / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return variables(
        PATH=f"{commands}:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID=str(free_port()),
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_JOB_NUM_NODES="2",
        REQUEUED=str(directory / "requeued"),
    )


def wait_until_open(endpoint: str) -> None:
    """Until the rendezvous is served there, so that the process that was started first is the one that serves it."""
    host, _, port = endpoint.partition(":")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"nobody serves {endpoint}")
