"""The fused norm and RoPE of q, k, v against its definition: values and all gradients, any subset of norms."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it is for Linux)", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set, and there is no GPU", allow_module_level=True)

from phd_megatron.kernels.qkv_norm_rope import qkv_norm_rope, qkv_norm_rope_reference
from phd_megatron.kernels.qkv_rope import rope_table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
EPS = 1e-5


def table_of(rows: int, turned: int, dtype: torch.dtype, samples: int = 1) -> Tensor:
    """Each of the samples with positions of its own."""
    positions = (torch.arange(rows, dtype=torch.float32)[:, None] + 3) * (1 + torch.arange(samples))
    angles = positions[..., None] * 0.7 ** torch.arange(turned // 2)
    return rope_table(angles.repeat(1, 1, 2)[:, :, None], dtype).to(DEVICE)


def compare(
    norms: str,
    shape: tuple[int, int, int],
    ratio: int,
    width: int,
    turned: int,
    dtype: torch.dtype,
    samples: int = 1,
) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    big = draw(*shape, (ratio + 2) * width + 5)
    big[..., -5:] = float("nan")  # what lies beside the rows must not be read
    leaves = [big[..., :-5], *(draw(width) for _ in norms)]
    table = table_of(shape[0], turned, dtype, samples) if turned else None
    results = []
    for function, wide in ((qkv_norm_rope, False), (qkv_norm_rope_reference, True)):
        inputs = [(x.double() if wide else x).detach().requires_grad_() for x in leaves]
        turn = table.double() if wide and table is not None else table
        out = function(inputs[0], ratio, turn, dict(zip(norms, inputs[1:], strict=True)), EPS)
        generator.manual_seed(4)
        grads = [draw(*x.shape).to(x.dtype) for x in out]
        results.append([*(x.detach() for x in out), *torch.autograd.grad(out, inputs, grads)])
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == dtype
        assert float((found.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norms", ["", "q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_every_subset_of_norms(norms: str, dtype: torch.dtype) -> None:
    compare(norms, (11, 2, 2), 3, 16, 16, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "ratio", "width", "turned"),
    [((1, 1, 1), 1, 16, 16), ((9, 1, 3), 1, 48, 48), ((5, 3, 1), 4, 80, 40), ((7, 2, 2), 2, 24, 0)],
)
def test_odd_shapes(shape: tuple[int, int, int], ratio: int, width: int, turned: int, dtype: torch.dtype) -> None:
    compare("qkv", shape, ratio, width, turned, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norms", ["", "qkv"])
@pytest.mark.parametrize(("shape", "turned"), [((11, 3, 2), 16), ((33, 2, 1), 10), ((1, 5, 1), 16)])
def test_positions_of_each_sequence(norms: str, shape: tuple[int, int, int], turned: int, dtype: torch.dtype) -> None:
    compare(norms, shape, 3, 16, turned, dtype, samples=shape[1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_programs_with_several_tiles_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phd_megatron.kernels.qkv_norm_rope.PROGRAMS", 20)
    monkeypatch.setattr("phd_megatron.kernels.qkv_norm_rope.SUMMED_ROWS", 4)
    compare("qkv", (31, 2, 2), 3, 24, 16, dtype)
    compare("k", (31, 2, 2), 3, 24, 16, dtype)


def test_gradcheck_of_the_definition() -> None:
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 1, 2, 18), (6,), (6,))]
    table = rope_table(torch.rand(3, 1, 1, 2, dtype=torch.float64).repeat(1, 1, 1, 2), torch.float64)

    def function(mixed: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return qkv_norm_rope_reference(mixed, 1, table, {"q": q, "v": v}, EPS)

    assert torch.autograd.gradcheck(function, leaves)


def test_refusals() -> None:
    mixed = torch.zeros(3, 1, 2, 4 * 16, device=DEVICE)
    weight, table = torch.zeros(16, device=DEVICE), table_of(3, 16, torch.float32)
    for message, arguments in (
        ("is needed", (mixed[..., :-1], 2, table, {})),
        ("size 16", (mixed, 2, table, {"q": weight[:8]})),
        ("size 16", (mixed, 2, table, {"c": weight})),
        ("does not fit", (mixed, 2, table_of(4, 16, torch.float32), {})),
        ("does not fit", (mixed, 2, table_of(3, 16, torch.float32, samples=2), {})),
    ):
        with pytest.raises(ValueError, match=message):
            qkv_norm_rope(*arguments, EPS)
