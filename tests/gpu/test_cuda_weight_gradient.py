"""Weight gradients added to float32 inside the product, on a GPU: torch's operators, apex's, and whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.runtime import weight_gradient
from phd_megatron.runtime.capabilities import probe

from .programs import documentation_as_bytes, program, succeeded, worst
from .test_cuda_graph_step import LOCAL, LOSS, MODEL, NORM

ADDMM = "torch's addmm adds to the gradient buffer"
RUN = " --seq-length 256 --micro-batch-size 4 --global-batch-size 8 --train-iters 8 --lr 1e-3 --seed 5 --log-interval 1"
RUN += " --eval-iters 0"


def modules() -> dict:
    found = {"torch": weight_gradient}
    try:
        import fused_weight_gradient_mlp_cuda
    except ImportError:
        return found
    return found | {"apex": fused_weight_gradient_mlp_cuda}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "wide", "out"), [(513, 96, 200), (64, 64, 64), (2048, 512, 1000)])
@pytest.mark.parametrize("name", ["torch", "apex"])
def test_product(name: str, rows: int, wide: int, out: int, dtype: torch.dtype) -> None:
    if name not in modules():
        pytest.skip("apex's fused_weight_gradient_mlp_cuda is not installed")
    module = modules()[name]
    generator = torch.Generator().manual_seed(0)
    inputs, grad = (torch.randn(rows, n, generator=generator).to("cuda", dtype) for n in (wide, out))
    before = torch.randn(out, wide, generator=generator).cuda()
    added = grad.double().t() @ inputs.double()
    found = before.clone()
    module.wgrad_gemm_accum_fp32(inputs, grad, found)
    error = float((found.double() - before.double() - added).norm() / added.norm())
    print(f"{name} {rows} x {wide} x {out} {dtype}: {error:.1e}")
    # Products of half precision are exact in float32; TF32 is off where float32 is what was asked for.
    assert error <= 1e-5
    if dtype != torch.float32:
        found = before.to(dtype)
        module.wgrad_gemm_accum_fp16(inputs, grad, found)
        expected = before.to(dtype).double() + added
        assert float((found.double() - expected).norm() / expected.norm()) <= 1e-2


def test_a_run_learns_the_same(tmp_path: Path) -> None:
    """Megatron-Core's own layers with the fusion, by whatever is installed, and without it."""
    corpus = documentation_as_bytes(tmp_path)
    series = {}
    for fused in ("true", "false"):
        words = f"{MODEL}{LOCAL}{RUN} --gradient-accumulation-fusion {fused}".split()
        metrics = tmp_path / f"{fused}.jsonl"
        done = succeeded(program("pretrain", *words, "--data-path", str(corpus), metrics=metrics))
        series[fused] = done
    said = "apex's fused_weight_gradient_mlp_cuda is installed" if probe("cuda").apex_weight_gradient else ADDMM
    assert said in series["true"].text
    for name, allowed in (("lm_loss", LOSS), ("grad_norm", NORM)):
        found = worst(series["true"].series(name), series["false"].series(name), 8)
        print(f"{name}: {found:.1e}")
        assert found <= allowed
