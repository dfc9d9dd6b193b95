"""Every operation of the model on a GPU against its definition in float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.kernels.phd_attention import choose_backend, phd_attention
from phd_megatron.kernels.qkv_rope import (
    rope,
    rope_reference,
    rope_table,
    split_qkv_reference,
    split_qkv_rope,
)
from phd_megatron.kernels.swiglu import swiglu, swiglu_reference
from phd_megatron.norm.modules import rms_norm
from phd_megatron.phd.kv_policy import KVPolicy

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
POLICIES = [KVPolicy(1, 1, None), KVPolicy(2, 16, 32), KVPolicy(2, 16, None), KVPolicy(3, 1, None), KVPolicy(3, 16, 32)]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def worst(found: Callable[..., torch.Tensor], expected: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> float:
    """Worst relative error of the output and of each input's gradient."""
    values = []
    for function, wide in ((found, False), (expected, True)):
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        grad = rows(*out.shape, seed=9).to(out.dtype if wide else inputs[0].dtype)
        if wide:
            grad = grad.to(inputs[0].dtype).double()
        values.append([out, *torch.autograd.grad(out, leaves, grad)])
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_attention(policy: KVPolicy, width: int, dtype: torch.dtype) -> None:
    shapes = [(policy.repeat, 157, 2, heads, width) for heads in (8, 2, 2)]
    inputs = [rows(*shape, dtype=dtype, seed=number) for number, shape in enumerate(shapes)]
    error = worst(
        lambda q, k, v: phd_attention(q, k, v, policy, backend="sdpa"),
        lambda q, k, v: phd_attention(q, k, v, policy, backend="reference"),
        *inputs,
    )
    print(f"{policy.name} d={width} {dtype}: {error:.1e}; {choose_backend('cuda', dtype, width)[1]}")
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pruned_attention(dtype: torch.dtype) -> None:
    policy = KVPolicy(2, 16, 32)
    inputs = [rows(*shape, dtype=dtype) for shape in ((1, 157, 2, 8, 64), (2, 157, 2, 2, 64), (2, 157, 2, 2, 64))]
    error = worst(
        lambda q, k, v: phd_attention(q, k, v, policy, backend="sdpa"),
        lambda q, k, v: phd_attention(q, k, v, policy, backend="reference"),
        *inputs,
    )
    assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_elementwise(dtype: torch.dtype) -> None:
    angles = rows(40, 1, 1, 12, seed=5).repeat(1, 1, 1, 2)
    table, wide = rope_table(angles, dtype), rope_table(angles, dtype).double()

    def split(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(split_qkv_rope(x, 4, table), dim=2)

    def split_definition(x: torch.Tensor) -> torch.Tensor:
        query, key, value = split_qkv_reference(x, 4)
        return torch.cat([rope_reference(query, wide), rope_reference(key, wide), value], dim=2)

    errors = {
        "split and RoPE": worst(split, split_definition, rows(40, 2, 2, 6 * 32, dtype=dtype)),
        "RoPE": worst(lambda x: rope(x, table), lambda x: rope_reference(x, wide), rows(40, 2, 3, 32, dtype=dtype)),
        "SwiGLU": worst(swiglu, swiglu_reference, rows(40, 2, 96, dtype=dtype)),
        "RMSNorm": worst(
            lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w,
            rows(40, 2, 96, dtype=dtype),
            rows(96, dtype=dtype, seed=1),
        ),
    }
    print(dtype, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE[dtype]
