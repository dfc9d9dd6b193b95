"""The scripts of ``launch_scripts/`` without a run: options, manifests, refusals, and shellcheck."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from phd_megatron.config.catalog import fields

from .conftest import ROOT
from .launch_nodes import SCRIPTS, UNFINISHED, container, environment_of, variables

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")

SHELL_FILES = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch", *ROOT.glob("tests/**/run.sh"), ROOT / ".ci/run"])
MANIFESTS = ("kubernetes.yaml", "kubernetes_pytorchjob.yaml")


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
    done = subprocess.run(["bash", script, "--lr", "1"], env=env, capture_output=True, text=True, timeout=300)
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
    done = subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize("name", ["pretrain_single_node.sh", "pretrain_multi_node.sh"])
def test_help_is_the_comment_at_the_head(name: str) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / name), "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Exit code" in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_files_are_clean(path: Path) -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout
