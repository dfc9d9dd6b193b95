"""The Triton suites of ``tests/kernels`` on CUDA, in float32 and bfloat16, and memory linear in the length."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.kernels.phd_attention import phd_attention
from phd_megatron.phd.kv_policy import KVPolicy


def _take_over(name: str) -> None:
    """Everything that pytest collects in a file of ``tests/kernels`` becomes part of this one."""
    path = Path(__file__).parents[1] / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for key, value in vars(module).items():
        if key.startswith("test_") or key in ("small_tiles", "nan_memory"):
            globals()[key if key not in globals() else f"{key}_of_{name}"] = value


for suite in ("test_triton_attention", "test_triton_norm_rope", "test_triton_decode", "test_cross_entropy"):
    _take_over(suite)


@pytest.mark.parametrize("backend", ["triton", "sdpa_triton"])
def test_memory_grows_with_the_length_alone(backend: str) -> None:
    """No score tensor: twice the tokens take twice the memory, forward and backward."""
    policy, peaks = KVPolicy(3, 16, 32), []
    for length in (4096, 8192):
        leaves = [
            torch.randn(3, length, 1, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for heads in (8, 2, 2)
        ]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        phd_attention(*leaves, policy, backend=backend).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]
    assert peaks[1] <= 12 * sum(x.numel() * x.element_size() for x in leaves)
