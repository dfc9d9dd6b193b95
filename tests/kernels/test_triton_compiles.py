"""Every Triton kernel compiles for Hopper, which the interpreter does not show: types, tile shapes, shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "compile_for_gpu.py"
KERNELS = {
    *("forward_kernel", "delta_kernel", "query_gradient_kernel", "key_gradient_kernel"),
    *("norm_rope_forward_kernel", "norm_rope_backward_kernel", "norm_weight_gradient_kernel"),
    *("window_forward_kernel", "window_backward_kernel"),
    *("swiglu_forward_kernel", "swiglu_backward_kernel"),
    *("weighted_swiglu_forward_kernel", "weighted_swiglu_backward_kernel"),
    *("gather_kernel", "gather_sum_kernel", "clear_empty_groups_kernel", "add_groups_kernel"),
    *("split_kernel", "combine_kernel", "cross_entropy_statistics_kernel", "cross_entropy_gradient_kernel"),
}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--head-dim", "64"],
        pytest.param(["--head-dim", "128", "--all"], marks=pytest.mark.full),
        pytest.param(["--head-dim", "80", "--dtype", "float16", "--all"], marks=pytest.mark.full),
        pytest.param(["--head-dim", "48", "--dtype", "float32"], marks=pytest.mark.full),
        pytest.param(["--head-dim", "256"], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_kernels_compile(arguments: list[str], tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (it is for Linux)")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PHD_TRITON_"))}
    variables |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments], env=variables, capture_output=True, text=True, timeout=570
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in lines} == KERNELS
