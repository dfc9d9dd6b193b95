"""Stock megatron-core trains on CPU/gloo under every layout, and each redirect that makes it so is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phd_megatron.runtime import cpu_backend, mcore_fixes
from phd_megatron.runtime.mcore_versions import installed

SCRIPT = Path(__file__).with_name("tiny_megatron.py")
#: redirects that need a launch of their own to be shown needed
ELSEWHERE = {"jit-fuser", "p2p", "moe-splits", "cuda-packages", "triton-kernels", "uneven-splits"}
CASES = (
    "cuda-names",
    "device-literals",
    "tensor-cuda",
    "record-stream",
    "rng",
    "distrib-optimizer-types",
    "float16-optimizer-types",
    "clip-grads-types",
    "torch-adamw/state",
    "torch-adamw/speed",
    "adam-state-without-step",
    "padded-buckets",
    "groups-of-one-kind",
    "checkpoint-without-output",
    "te-general-gemm",
    "single-rank",
    "scale-in-place",
    "norm-on-device",
    "weight-gradient",
)


def result_of(output: str):
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output
    return json.loads(lines[-1].removeprefix("RESULT "))


def alone(*args: str, timeout: float = 180, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), **variables}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def redirect_results(tmp_path_factory):
    done = alone("redirects", str(tmp_path_factory.mktemp("redirects")), timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return result_of(done.stdout)


@pytest.fixture(scope="module")
def one_rank():
    done = alone("train")
    assert done.returncode == 0, done.stdout + done.stderr
    return result_of(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_redirect_works_and_is_needed(redirect_results, case):
    with_it, without_it = redirect_results[case]
    rows = {row.name: row for row in (*cpu_backend.REDIRECTS, *mcore_fixes.REDIRECTS)}
    row = rows.get(case.split("/")[0])
    assert with_it == "ok"
    assert (without_it != "ok") == (row is None or row.is_needed)


def test_every_redirect_has_a_case():
    names = {row.name for row in (*cpu_backend.REDIRECTS, *mcore_fixes.REDIRECTS)} | set(cpu_backend.METHODS)
    assert names == {case.split("/")[0] for case in CASES} | ELSEWHERE


LAYOUTS = [
    (2, "tp=2"),
    (2, "tp=2 sp=1"),
    (2, "pp=2"),
    (2, "overlap=1"),
    (2, "sharded=0"),
    (2, "pp=2 vpp=2"),
    (2, "pp=2 vpp=2 wire=1"),
    (4, "tp=2 sp=1 pp=2 overlap=1"),
]


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=[layout for _, layout in LAYOUTS])
def test_layouts_agree_with_one_rank(torchrun, one_rank, ranks, layout):
    result = result_of(torchrun(ranks, SCRIPT, "train", *layout.split()).stdout)
    # rank 0 of a pipeline sums no losses of its own: they are all-reduced in the script
    for (loss, norm), (expected_loss, expected_norm) in zip(result, one_rank, strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_bf16_with_fp32_main_parameters(torchrun, one_rank):
    result = result_of(torchrun(2, SCRIPT, "train", "bf16=1").stdout)
    assert [loss for loss, _ in result] == pytest.approx([loss for loss, _ in one_rank], rel=1e-3)


def test_stock_p2p_is_wrong_on_gloo(torchrun, one_rank):
    """Interleaved stages send activations and gradients between the same two ranks; stock code lets them cross."""
    result = result_of(torchrun(2, SCRIPT, "train", "pp=2", "vpp=2", "skip=p2p").stdout)
    assert result[0][1] != pytest.approx(one_rank[0][1], rel=1e-2)


def test_expert_parallel_and_its_redirect(torchrun):
    assert result_of(torchrun(2, SCRIPT, "train", "moe=1", "ep=2").stdout)
    stock = torchrun(2, SCRIPT, "train", "moe=1", "ep=2", "skip=moe-splits", check=False)
    assert stock.returncode != 0 and "RESULT" not in stock.stdout


def test_experts_with_tensor_parallelism_and_their_redirect(torchrun):
    layout = ("moe=1", "ep=2", "tp=2", "sp=1")
    assert result_of(torchrun(4, SCRIPT, "train", *layout).stdout)
    stock = torchrun(4, SCRIPT, "train", *layout, "skip=uneven-splits", check=False)
    assert stock.returncode != 0 and "invalid tensor size" in stock.stdout


def test_fused_swiglu_needs_no_compiler():
    """With stock megatron the fused SwiGLU is compiled, which needs a C++ compiler on CPU."""
    no_compiler = {"CXX": "/nonexistent/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    assert result_of(alone("train", "fused=1", **no_compiler).stdout)
    stock = alone("train", "fused=1", "skip=jit-fuser", **no_compiler)
    assert stock.returncode != 0 and "compiler" in stock.stderr.lower()


def test_cpu_run_where_transformer_engine_is_installed(tmp_path):
    """Stock megatron would take its optimizers, which want a GPU."""
    optimizers = tmp_path / "transformer_engine" / "pytorch" / "optimizers.py"
    optimizers.parent.mkdir(parents=True)
    for directory in (optimizers.parents[1], optimizers.parent):
        (directory / "__init__.py").touch()
    optimizers.write_text("def FusedAdam(*args, **kwargs): raise RuntimeError('no GPU')\nFusedSGD = FusedAdam\n")
    path = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(tmp_path)])}
    done = alone("train", **path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(done.stdout)
    assert alone("train", "skip=cuda-packages", **path).returncode != 0


def test_cpu_run_without_triton(tmp_path):
    """torch's builds for CPUs bring none."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    path = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), str(tmp_path)])}
    done = alone("train", "moe=1", **path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(done.stdout)
    stock = alone("train", "moe=1", "skip=triton-kernels", **path)
    assert (stock.returncode != 0) == (installed() >= (0, 18)), stock.stderr


@pytest.mark.parametrize("options", ["kind=fully_reshardable tp=2", "kind=dp_reshardable", "bf16=1", "sharded=0"])
def test_resume_is_exact(torchrun, tmp_path, options):
    done = torchrun(2, SCRIPT, "resume", f"directory={tmp_path / 'checkpoint'}", *options.split())
    straight, resumed = result_of(done.stdout)
    assert straight == resumed
