"""Cross-entropy in Triton against its definition in float64; alone, and with the vocabulary over two ranks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it is for Linux)", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set, and there is no GPU", allow_module_level=True)

from phd_megatron.kernels.cross_entropy import cross_entropy, cross_entropy_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
TYPES = tuple(TOLERANCE) if CUDA else (torch.float32, torch.float16)


def draw(shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(*shape, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    labels.view(-1)[:2] = torch.tensor([0, vocabulary - 1])[: labels.numel()]
    weight = torch.rand(shape, generator=generator)
    weight.view(-1)[-1] = 0.0  # a token that the loss mask hides
    return logits.to(DEVICE, dtype), labels.to(DEVICE), weight.to(DEVICE)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "vocabulary"), [((3, 2), 5), ((4, 1), 4096), ((2, 3), 4099)])
@pytest.mark.parametrize("padding", [0, 3])
def test_against_the_definition(shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, padding: int) -> None:
    logits, labels, weight = draw(shape, vocabulary, dtype)
    wide = logits.double().requires_grad_()
    expected = cross_entropy_reference(wide, labels)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), wide)
    padded = torch.cat([logits, logits.new_full((*shape, padding), float("-inf"))], -1).requires_grad_()
    losses = cross_entropy(padded * 1, labels)  # its own memory, which is written over
    (found,) = torch.autograd.grad((losses * weight).sum(), padded)
    assert losses.dtype == torch.float32 and found.dtype == dtype
    assert float((losses.double() - expected).detach().norm() / expected.detach().norm()) <= 1e-6
    assert float((found[..., :vocabulary].double() - wanted).norm() / wanted.norm()) <= TOLERANCE[dtype]
    assert not found[..., vocabulary:].any()


def test_large_logits() -> None:
    logits = torch.tensor([[1e38, -1e38, 0.0], [-1e38, -1e38, -1e38]], device=DEVICE)
    losses = cross_entropy(logits, torch.tensor([0, 2], device=DEVICE))
    assert losses.tolist() == pytest.approx([0.0, 1.0986123])


def test_refusals() -> None:
    logits, labels, _ = draw((3, 2), 5, torch.float32)
    for wrong in (logits[..., :4], logits.transpose(0, 1)):
        with pytest.raises(ValueError, match="contiguous logits with one more dimension"):
            cross_entropy(wrong, labels)


@pytest.mark.skipif(CUDA, reason="over gloo, on the CPU")
def test_vocabulary_over_two_ranks(torchrun: Callable[..., object]) -> None:
    program = Path(__file__).parent / "cross_entropy_program.py"
    assert str(torchrun(2, program, timeout=400).stdout).count("OK") == 2  # type: ignore[attr-defined]
