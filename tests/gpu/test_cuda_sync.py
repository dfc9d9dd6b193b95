"""Inside a training step the host runs ahead of the GPU, but for the places that Megatron-Core needs a number at.

A wait in our own files is a mistake: each one leaves the GPU idle for as long as the host needs to start it again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
STEPS, WARM_UP = 5, 3
#: Files of Megatron-Core that wait, and for what. Each waits once a step.
STATED = {
    "megatron/core/optimizer/clip_grads.py": "the gradient norm, which the log and the check for divergence read",
}
SIZES = {"num-layers": 3, "hidden-size": 64, "ffn-hidden-size": 96, "num-attention-heads": 4, "num-query-groups": 2}
SIZES |= {"seq-length": 48, "phd-window": 5, "phd-chunk": 8, "micro-batch-size": 2, "global-batch-size": 4}
SIZES |= {"train-iters": STEPS, "eval-iters": 0, "log-interval": STEPS}
IMPLEMENTATIONS = ["local", *(["transformer_engine"] if importlib.util.find_spec("transformer_engine") else [])]


def program(*words: str, ranks: int = 1) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "text.txt").write_text("\n".join(f"{i} squared is {i * i}" for i in range(3000)))
    prefix = str(directory / "data")
    prepare = ["--input", str(directory), "--output-prefix", prefix, "--tokenizer", "byte"]
    program("-m", "phd_megatron", "prepare", *prepare)
    return prefix


#: Recorded in the third step, the last that is not watched.
GRAPH = ["--cuda-graph-impl", "local", "--cuda-graph-scope", "full_iteration", "--cuda-graph-warmup-steps", "2"]


#: experts on one rank wait for nothing either
EXPERTS = ["--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "64", "--moe-router-dtype", "fp32"]
EXPERTS += ["--moe-aux-loss-coeff", "0.01", "--moe-z-loss-coeff", "0.001"]
EXPERTS += ["--moe-shared-expert-intermediate-size", "64"]


@pytest.mark.parametrize("graph", [[], GRAPH], ids=["", "graph"])
@pytest.mark.parametrize("experts", [[], EXPERTS], ids=["", "experts"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("scheme", "repeat"), [("pre", 1), ("hybrid_star", 2)])
def test_a_step_waits_where_it_is_stated_only(
    data: str, implementation: str, scheme: str, repeat: int, experts: list[str], graph: list[str]
) -> None:
    words = ["--norm-scheme", scheme, "--phd-repeat", str(repeat), "--transformer-impl", implementation]
    words += [*graph, *experts, "--bf16", "--data-path", data]
    words += [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    out = program(str(Path(__file__).with_name("sync_program.py")), str(WARM_UP), "pretrain", *words)
    found = json.loads(out.splitlines()[-1])
    assert found["steps"] == STEPS - WARM_UP
    unstated = {site: times for site, times in found["sites"].items() if not any(name in site for name in STATED)}
    assert unstated == {}
    for name in STATED:
        times = sum(times for site, times in found["sites"].items() if name in site)
        assert times <= found["steps"], f"{name} waited {times} times in {found['steps']} steps"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_experts_on_two_ranks_wait_for_their_splits_only(data: str) -> None:
    """Which is an event that a copy on another stream has recorded, no synchronising operation."""
    words = ["--transformer-impl", "local", "--bf16", "--data-path", data, *EXPERTS]
    words += ["--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "alltoall"]
    words += [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    out = program(str(Path(__file__).with_name("sync_program.py")), str(WARM_UP), "pretrain", *words, ranks=2)
    ranks = [json.loads(line) for line in out.splitlines() if line.startswith('{"steps"')]
    assert len(ranks) == 2
    for found in ranks:
        assert [site for site in found["sites"] if not any(name in site for name in STATED)] == []
