"""split_qkv_rope, rope and swiglu against their definitions: values, gradients, odd shapes, strided input, types."""

from __future__ import annotations

import pytest
import torch

from phd_megatron.kernels.qkv_rope import rope, rope_reference, rope_table, split_qkv_reference, split_qkv_rope
from phd_megatron.kernels.swiglu import swiglu, swiglu_reference, swiglu_triton
from phd_megatron.kernels.triton_support import triton_problem


def table(rows: int, rotary: int, dtype: torch.dtype) -> torch.Tensor:
    angles = torch.outer(torch.arange(rows, dtype=dtype), 0.7 ** torch.arange(rotary // 2, dtype=dtype))
    return rope_table(angles.repeat(1, 2)[:, None, None], dtype)


def compare(function, reference, x: torch.Tensor, tolerance: float) -> None:
    x = x.detach().requires_grad_()
    y, expected = function(x), reference(x)
    assert y.dtype == x.dtype and y.shape == expected.shape
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    (gradient,), (wanted,) = (torch.autograd.grad((out * weight).sum(), x) for out in (y, expected))
    assert (y - expected).norm() <= tolerance * expected.norm()
    assert (gradient - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (7, 3, 5, 6), (33, 2, 3, 20)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rope(dtype, tolerance, shape, share):
    rotary = max(2, int(shape[-1] * share) // 2 * 2)
    angles = table(shape[0], rotary, dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    compare(lambda x: rope(x, angles), lambda x: rope_reference(x, angles), x, tolerance)
    wide = torch.randn(*shape[:3], 2 * shape[-1]).to(dtype)[..., 1 : 1 + shape[-1]]
    assert not wide.is_contiguous() or wide.numel() <= shape[-1]
    compare(lambda x: rope(x, angles), lambda x: rope_reference(x, angles), wide, tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(("shape", "per_group"), [((1, 1, 1, 4), 1), ((7, 3, 2, 6), 3), ((33, 2, 3, 10), 4)])
@pytest.mark.parametrize("rotary", [None, 2, "all"])
def test_split_qkv_rope(dtype, tolerance, shape, per_group, rotary):
    *outer, width = shape
    angles = None if rotary is None else table(shape[0], width // 2 * 2 if rotary == "all" else rotary, dtype)
    mixed = torch.randn(*outer, (per_group + 2) * width).to(dtype)

    def joined(split):
        return torch.cat([part.flatten(2) for part in split], dim=-1)

    def reference(x):
        query, key, value = split_qkv_reference(x, per_group)
        if angles is not None:
            query, key = rope_reference(query, angles), rope_reference(key, angles)
        return joined((query, key, value))

    query, key, value = split_qkv_rope(mixed, per_group, angles)
    assert query.shape == (*outer[:2], outer[2] * per_group, width) and key.shape == value.shape == shape
    compare(lambda x: joined(split_qkv_rope(x, per_group, angles)), reference, mixed, tolerance)
    wide = torch.randn(*outer, 2 * (per_group + 2) * width).to(dtype)[..., : (per_group + 2) * width]
    compare(lambda x: joined(split_qkv_rope(x, per_group, angles)), reference, wide, tolerance)


def test_rope_keeps_lengths_and_turns_back():
    angles = table(9, 8, torch.float64)
    x = torch.randn(9, 2, 3, 8, dtype=torch.float64)
    turned = rope(x, angles)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0]) and not torch.allclose(turned[1:], x[1:])
    back = torch.stack([angles[0], -angles[1]])
    assert torch.allclose(rope(turned, back), x)


def test_rope_is_megatrons_bit_for_bit():
    rotary = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    angles = torch.rand(11, 1, 1, 8).repeat(1, 1, 1, 2)
    x = torch.randn(11, 2, 3, 16)
    expected = rotary._apply_rotary_pos_emb_bshd(x, angles)
    assert torch.equal(rope(x, rope_table(angles, x.dtype)), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 6), (17, 1, 34)])
def test_swiglu(dtype, tolerance, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    compare(swiglu, swiglu_reference, x, tolerance)
    wide = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    compare(swiglu, swiglu_reference, wide, tolerance)
    if triton_problem("cpu", dtype) is None:
        compare(swiglu_triton, swiglu_reference, x, tolerance)
        compare(swiglu_triton, swiglu_reference, wide, tolerance)


def test_gradcheck():
    x = torch.randn(3, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    angles = table(3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope(x, angles), x)
    mixed = torch.randn(3, 2, 1, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_qkv_rope(x, 1, angles), mixed)
    assert torch.autograd.gradcheck(lambda x: split_qkv_rope(x, 1, None), mixed)
    assert torch.autograd.gradcheck(swiglu, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))
