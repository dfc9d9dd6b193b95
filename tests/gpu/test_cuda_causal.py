"""Every vendor's operator for part (a) that is installed, forward and backward, against plain products in float64.

``PHD_CAUSAL_KERNEL`` chooses them for users, and the packages of flash-attn are optional: what is not installed is
skipped, and what is installed has to be right.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.kernels.phd_attention import causal, phd_attention
from phd_megatron.kernels.phd_attention.causal import Call, operator_problem
from phd_megatron.phd.kv_policy import KVPolicy

NAMES = [kernel.name for kernel in causal._PREFERRED["cuda"]]
DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")
# Relative, in norm: bfloat16 rounds to 4e-3; the log-sum-exp is float32.
TOLERANCE, OF_LSE = 1e-2, 1e-4


def installed(name: str, width: int) -> causal.CausalKernel:
    problem = operator_problem(name, DEVICE, DTYPE, width)
    if problem and "is not installed" in problem:
        pytest.skip(problem)
    assert problem is None
    return causal._BY_NAME[name]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["grouped", "heads"])
@pytest.mark.parametrize("merged", [False, True], ids=["alone", "merged"])
@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str, merged: bool, heads: tuple[int, int], width: int) -> None:
    """``merged``: the backward of keys that are a part of all, as context parallelism and hidden keys need it."""
    kernel = installed(name, width)
    for rows, keys, masked in ((5, 5, True), (157, 157, True), (640, 640, True), (300, 77, False), (64, 1000, False)):
        q, grad = (draw(2, heads[0], rows, width, seed=seed) for seed in (1, 2))
        k, v = (draw(2, heads[1], keys, width, seed=seed) for seed in (3, 4))
        scale = width**-0.5
        out, lse, extra = kernel.forward(q, k, v, scale, masked)
        wide = [x.double() for x in (q, k, v)]
        want, want_lse, _ = causal._plain_forward(*wide, scale, masked)
        assert off(out, want) <= TOLERANCE
        assert off(lse[..., :rows], want_lse) <= OF_LSE
        if merged:
            # Other keys, with half of the weight of these on average.
            others = want_lse + draw(*want_lse.shape, seed=5).double() - 0.7
            want_all = torch.logaddexp(want_lse, others)
            mine = (want_lse - want_all).exp()[..., None]
            want = want * mine + (1 - mine) * draw(*want.shape, seed=6).double()
            want_lse, out = want_all, want.to(DTYPE)
            lse = torch.nn.functional.pad(want_all.float(), [0, lse.size(-1) - rows], value=float("inf"))
        found = kernel.backward(grad, Call(q, k, v, out, lse, extra, scale, masked))
        plain = Call(*wide, out.double() if merged else want, want_lse, (), scale, masked)
        expected = causal._plain_backward(grad.double(), plain)
        worst = max(off(x, y) for x, y in zip(found, expected, strict=True))
        print(f"{name} d={width} {rows} x {keys} {'causal' if masked else ''} merged={merged}: {worst:.1e}")
        assert worst <= 2 * TOLERANCE


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("repeat", [1, 2, 3])
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_triton"])
@pytest.mark.parametrize("name", NAMES)
def test_phd_attention(name: str, backend: str, repeat: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(name, width)
    monkeypatch.setenv(causal.FORCED, name)
    policy = KVPolicy(repeat, 16, 32) if repeat > 1 else KVPolicy(1)
    inputs = [draw(repeat, 157, 2, heads, width, seed=number) for number, heads in enumerate((8, 2, 2))]
    grad = draw(*inputs[0].shape, seed=9)
    values = []
    for way, wide in ((backend, False), ("reference", True)):
        leaves = [(x.double() if wide else x).detach().requires_grad_() for x in inputs]
        out = phd_attention(*leaves, policy, backend=way)
        values.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    worst = max(off(x.detach(), y.detach()) for x, y in zip(*values, strict=True))
    print(f"{name} {backend} {policy.name} d={width}: {worst:.1e}")
    assert worst <= 2 * TOLERANCE
