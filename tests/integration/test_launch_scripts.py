"""The scripts of ``launch_scripts/``, run as a cluster runs them: two machines are two torchrun agents on this one.

Of SLURM there are only the commands that the script calls, and Kubernetes is what its manifests say a pod gets.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from phd_megatron.config.catalog import fields

from .conftest import ROOT, TINY_MODEL, program_environment, read_metrics

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash"),
]

SCRIPTS = ROOT / "launch_scripts"
SHELL_FILES = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch", *ROOT.glob("tests/**/run.sh"), ROOT / ".ci/run"])
MANIFESTS = ("kubernetes.yaml", "kubernetes_pytorchjob.yaml")
PATIENCE = 200.0  # seconds for anything to happen on a busy machine
STEPS, FIRST = 60, 6
UNFINISHED = 75

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


def container(manifest: str) -> dict[str, Any]:
    """The one container of a manifest's pods."""
    *_, workload = yaml.safe_load_all((SCRIPTS / manifest).read_text("utf-8"))
    template = workload["spec"].get("template") or workload["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    (found,) = template["spec"]["containers"]
    return found


def environment_of(manifest: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(manifest)["env"]}


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
    """Variables of a batch script, and a PATH with the commands it calls."""
    commands = tmp_path / "commands"
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
        REQUEUED=str(tmp_path / "requeued"),
    )


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


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifest(manifest: str) -> None:
    """The command is a script of ours with options that exist, and every machine count is the same."""
    pod = container(manifest)
    script, run_file, *options = pod["command"][1:]
    assert (ROOT / script).is_file() and run_file.endswith(".yaml")
    assert {word[2:].replace("-", "_") for word in options if word.startswith("--")} <= set(fields())
    text = (SCRIPTS / "pretrain_multi_node.sh").read_text("utf-8") + (SCRIPTS / "_torchrun.sh").read_text("utf-8")
    assert all(re.search(rf"\b{name}\b", text) for name in environment_of(manifest))
    *services, workload = yaml.safe_load_all((SCRIPTS / manifest).read_text("utf-8"))
    marked = re.findall(r"(\d+)\"?\}? +# machines", (SCRIPTS / manifest).read_text("utf-8"))
    assert len(marked) == 3 and len(set(marked)) == 1
    assert pod["resources"]["limits"]["nvidia.com/gpu"] == int(environment_of(manifest)["NPROC"])
    template = workload["spec"].get("template") or workload["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in pod["volumeMounts"]}
    if services:
        name, host = workload["metadata"]["name"], environment_of(manifest)["MASTER"]
        assert services[0]["spec"]["selector"] == {"job-name": name}
        assert host.startswith(f"{name}-0.{template['spec']['subdomain']}:")
        codes = [
            r["onExitCodes"]["values"] for r in workload["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in r
        ]
        assert [UNFINISHED] in codes


NAME = "phd-megatron"
TORCHRUN = "-m torch.distributed.run --nnodes {} --rdzv-backend c10d --rdzv-endpoint {} --rdzv-id {} --max-restarts {} "


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"MASTER": "a:1", "NNODES": "2"}, ("2", "a:1", NAME, 0, 1)),
        ({"MASTER_ADDR": "a", "WORLD_SIZE": "4", "RANK": "1"}, ("4", "a:29500", NAME, 0, 1)),
        (
            {"PET_MASTER_ADDR": "b", "PET_MASTER_PORT": "7", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4"},
            ("2", "b:7", NAME, 0, 4),
        ),
        (
            {"PET_MASTER_ADDR": "b", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"},
            ("2", "b:29500", NAME, 0, 1),
        ),
        (
            {
                "PET_RDZV_ENDPOINT": "c:8",
                "PET_NNODES": "2:4",
                "PET_RDZV_ID": "x",
                "PET_MAX_RESTARTS": "3",
                "NPROC": "2",
            },
            ("2:4", "c:8", "x", 3, 2),
        ),
        ({"MASTER": "a:1", "NNODES": "2", "CUDA_VISIBLE_DEVICES": "0,2,3"}, ("2", "a:1", NAME, 0, 3)),
        ({"MASTER": "a:1", "NNODES": "2", "CUDA_VISIBLE_DEVICES": ""}, ("2", "a:1", NAME, 0, 1)),
    ],
    ids=["ours", "master-addr", "trainer-v2", "auto", "elastic-policy", "visible-gpus", "no-gpu"],
)
def test_where_the_rendezvous_comes_from(given: dict[str, str], expected: tuple[object, ...]) -> None:
    """The interpreter is ``echo``, which prints how torchrun would have been started."""
    env = {**variables(), "PYTHON": "echo", **given}
    env = {name: value for name, value in env.items() if name != "NPROC" or "NPROC" in given}
    if "CUDA_VISIBLE_DEVICES" not in given:
        env["CUDA_VISIBLE_DEVICES"] = ""
    script = str(SCRIPTS / "pretrain_multi_node.sh")
    done = subprocess.run(["bash", script, "--lr", "1"], env=env, capture_output=True, text=True, timeout=60)
    *rendezvous, ranks = expected
    assert done.stdout.strip() == (
        TORCHRUN.format(*rendezvous) + f"--nproc-per-node {ranks} -m phd_megatron pretrain --lr 1"
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({"NNODES": "2"}, ["--lr", "1"], "MASTER is not set"),
        (
            {"NNODES": "2", "MASTER": "host0"},
            ["--lr", "1"],
            "MASTER=host0 has no port; use host:port, such as host0:29500",
        ),
        ({"MASTER": "a:1"}, ["--lr", "1"], "NNODES= is no number of machines"),
        ({"MASTER": "a:1", "NNODES": "all"}, ["--lr", "1"], "NNODES=all is no number"),
        ({"MASTER": "a:1", "NNODES": "2", "NPROC": "0"}, ["--lr", "1"], "NPROC=0 is no number of ranks"),
        ({"MASTER": "a:1", "NNODES": "2"}, ["nowhere.yaml"], "cannot read the run configuration nowhere.yaml"),
    ],
)
def test_bad_input(given: dict[str, str], words: list[str], message: str) -> None:
    env = {**variables(), "PYTHON": "echo", **given}
    script = str(SCRIPTS / "pretrain_multi_node.sh")
    done = subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("name", ["pretrain_single_node.sh", "pretrain_multi_node.sh"])
def test_help_is_the_comment_at_the_head(name: str) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / name), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Exit code" in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_are_clean(path: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
