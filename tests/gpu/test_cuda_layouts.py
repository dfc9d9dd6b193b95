"""On several GPUs, over NCCL, every layout gives the numbers of one GPU: ``phd-megatron parity`` on CUDA.

With torch's own layers in float32 (1e-5, as on the CPU) and, where it is installed, with Transformer Engine in bfloat16
(the command's tolerance for half precision).
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

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "--num-layers 4 --hidden-size 128 --ffn-hidden-size 192 --num-attention-heads 4 --num-query-groups 2"
SHAPE += " --seq-length 96 --micro-batch-size 2 --lr 1e-2 --device cuda"
DENSE = "tp2,tp2+sp,pp2,pp2+vpp2,dp2,dp2+overlap,cp2,cp2+p2p"
MODELS = {
    "vanilla pre": ("--norm-scheme pre", DENSE),
    "hybrid_star PHD-CSWA-2-5-24": ("--norm-scheme hybrid_star --phd-repeat 2 --phd-window 5 --phd-chunk 24", DENSE),
    "hybrid_star PHD-SWA-3-5-inf": ("--norm-scheme hybrid_star --phd-repeat 3 --phd-window 5", "tp2+sp,cp2,cp2+p2p"),
    "hybrid_star MoE PHD-CSWA-2-5-8": (
        "--norm-scheme hybrid_star --phd-repeat 2 --phd-window 5 --phd-chunk 8 --num-experts 4 --moe-router-topk 2 "
        "--moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall",
        "dp2,ep2,tp2+sp,pp2",
    ),
}
KINDS = {"float32": "--transformer-impl local"}
if importlib.util.find_spec("transformer_engine"):
    KINDS["bfloat16"] = "--bf16 --transformer-impl transformer_engine"


def program(*words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "phd_megatron", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "text.txt").write_text("\n".join(f"{i} squared is {i * i}" for i in range(3000)))
    done = program("prepare", "--input", str(directory), "--output-prefix", str(directory / "data"))
    assert done.returncode == 0, done.stdout
    return directory / "data"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_layouts_on_gpus(corpus: Path, tmp_path: Path, model: str, kind: str) -> None:
    options, layouts = MODELS[model]
    result = tmp_path / "parity.json"
    done = program(
        *("parity", *SHAPE.split(), *options.split(), *KINDS[kind].split(), "--data-path", str(corpus)),
        *("--layouts", layouts, "--json", str(result)),
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    statuses = {row["layout"]: row["status"] for row in json.loads(result.read_text())["layouts"]}
    assert statuses == dict.fromkeys(layouts.split(","), "equal")
