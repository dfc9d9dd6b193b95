"""The Triton kernels of PHD attention against the definition in float64: output and all gradients.

Without a GPU they run in Triton's interpreter, in float32 with tiles of 16 rows, so that short sequences have many
tile borders. ``tests/gpu`` runs this file on CUDA, in float32 and bfloat16.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it is for Linux)", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set, and there is no GPU", allow_module_level=True)

from phd_megatron.kernels.phd_attention import causal, phd_attention, sdpa_triton, triton, window
from phd_megatron.kernels.phd_attention.triton import triton_attention
from phd_megatron.kernels.phd_attention.triton_tiles import first_hidden, hidden_visible, last_hidden_query
from phd_megatron.kernels.triton_support import FixedTile
from phd_megatron.phd.kv_policy import KVPolicy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BACKENDS = ("triton", "sdpa_triton")


class Case(NamedTuple):
    policy: KVPolicy
    length: int
    ratio: int = 2  # query heads of a KV group
    width: int = 16
    copies: int | None = None  # Kq
    groups: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        pruned = f"-Kq{self.copies}" if self.copies else ""
        return f"{self.policy.name}-s{self.length}-r{self.ratio}-d{self.width}{pruned}-g{self.groups}-b{self.batch}"


CASES = [
    Case(KVPolicy(1), 37, ratio=3),
    Case(KVPolicy(2, 1), 19, ratio=1, groups=2),  # window 1: plain PHD
    Case(KVPolicy(2, 4, 8), 33, batch=2),  # chunk borders inside tiles; one row more than whole tiles
    Case(KVPolicy(3, 16, 32), 41, ratio=1),  # a chunk longer than a tile
    Case(KVPolicy(3, 9, 4), 23, copies=1),  # window > chunk; pruned last layer
    Case(KVPolicy(4, 3, 7), 18, copies=2, groups=2, ratio=1),  # a chunk that divides nothing
    Case(KVPolicy(5, 20), 13, ratio=1),  # window > sequence, no chunks
    Case(KVPolicy(18, 3, 4), 6, ratio=1),  # one position has more hidden keys than a tile
    Case(KVPolicy(3, 4, 8), 21, groups=2, batch=2),  # sequences and groups in one dimension
    Case(KVPolicy(2, 16, 32), 1, groups=2, batch=2),  # one token
]
WIDE = [
    Case(KVPolicy(2, 3, 8), 17, width=width) for width in (48, 80)
]  # padded to 64 and 128 columns, which must not be read
FULL = [
    Case(KVPolicy(repeat, *variant), length, ratio=ratio, groups=2, batch=2, width=width)
    for repeat in (1, 2, 3, 5)
    for variant in ((1, None), (16, None), (16, 32), (3, 7), (64, 32))
    for length, ratio, width in ((7, 3, 16), (50, 2, 32))
    if repeat > 1 or variant == (1, None)  # one copy has no hidden keys to see
] + [Case(KVPolicy(3, 16, 32), 40, width=width) for width in (64, 96, 128, 256)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 x 16 in the interpreter."""
    for kernel in [x for module in (triton, window) for x in vars(module).values()]:
        if isinstance(kernel, FixedTile):
            monkeypatch.setattr(kernel, "constants", {"BLOCK_M": 16, "BLOCK_N": 16})
    yield


def poisoned(x: Tensor) -> Tensor:
    """The same numbers inside a larger buffer, in which everything around them is NaN."""
    big = x.new_full([size + 2 for size in x.shape], float("nan"))
    inner = big[tuple(slice(1, -1) for _ in x.shape)]
    inner.copy_(x)
    return inner


def make(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(7)
    copies, repeat = case.copies or case.policy.repeat, case.policy.repeat
    shapes = [(copies, case.groups * case.ratio), (repeat, case.groups), (repeat, case.groups)]

    def draw(count: int, heads: int) -> Tensor:
        x = torch.randn(count, case.length, case.batch, heads, case.width, generator=generator)
        return poisoned(x.to(DEVICE, dtype))

    return [draw(*shape) for shape in shapes], draw(*shapes[0])


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers allocate without writing is NaN, so that a row nobody wrote shows."""
    for name in ("empty", "empty_like"):
        genuine = getattr(torch, name)

        def poison(*args: object, genuine: object = genuine, **kwargs: object) -> Tensor:
            made: Tensor = genuine(*args, **kwargs)  # type: ignore[operator]
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poison)


def run(inputs: list[Tensor], grad: Tensor, policy: KVPolicy, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    if backend == "atomic":
        out = triton_attention(*leaves, policy, deterministic=False)
    else:
        out = phd_attention(*leaves, policy, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs, grad = make(case, dtype)
    expected = run([x.double() for x in inputs], grad.double(), case.policy, "reference")
    found = run(inputs, grad, case.policy, backend)
    floor = 1e-3 * float(grad.double().norm())
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        if case.policy.repeat > 1:  # else it is the vendor's own
            assert a.is_contiguous(), f"a product that follows would copy {name}"
        error = float((a.double() - b).norm()) / max(float(b.norm()), floor)
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_definition(case: Case, backend: str, dtype: torch.dtype, nan_memory: None) -> None:
    check(case, dtype, backend)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
def test_head_dimensions_between_powers_of_two(case: Case, dtype: torch.dtype, nan_memory: None) -> None:
    check(case, dtype, "triton")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=lambda case: case.name)
def test_an_operator_that_takes_no_shared_keys(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, nan_memory: None
) -> None:
    """There is a call for each copy then."""
    genuine = sdpa_triton.causal_kernel

    def choose(*given: Any) -> tuple[causal.CausalKernel, str]:
        return genuine(*given)[0]._replace(shares_keys=False), ""

    monkeypatch.setattr(sdpa_triton, "causal_kernel", choose)
    check(case, dtype, "sdpa_triton")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=lambda case: case.name)
def test_atomic_query_gradient(case: Case, dtype: torch.dtype, nan_memory: None) -> None:
    check(case, dtype, "atomic")


@pytest.mark.full
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("backend", (*BACKENDS, "atomic"))
@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_more_against_the_definition(case: Case, backend: str, dtype: torch.dtype, nan_memory: None) -> None:
    check(case, dtype, backend)


def test_bits_repeat() -> None:
    case = CASES[2]
    inputs, grad = make(case, torch.float32)
    first, second = (run(inputs, grad, case.policy, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_scores_and_expanded_gradients() -> None:
    case = CASES[5]
    inputs, grad = make(case, torch.float32)
    inputs[0] = inputs[0] * 1e3
    ones = torch.ones((), device=DEVICE).expand(grad.shape)  # what .sum().backward() sends
    expected = run([x.double() for x in inputs], ones.double(), case.policy, "reference")
    found = run(inputs, ones, case.policy, "triton")
    assert all(bool(x.isfinite().all()) for x in found)
    assert float((found[0].double() - expected[0]).norm()) <= 1e-3 * float(expected[0].norm())


@pytest.mark.skipif(CUDA, reason="device functions are called one by one in the interpreter only")
@pytest.mark.parametrize(("window", "chunk"), [(1, None), (1, 4), (4, 6), (9, 4), (30, None)])
def test_visibility_on_the_device_is_the_policys(window: int, chunk: int | None) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def table(seen, first, last, LENGTH: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
        n = tl.arange(0, LENGTH)
        tl.store(first + n, first_hidden(n, WINDOW, CHUNK))
        tl.store(last + n, last_hidden_query(n, WINDOW, CHUNK))
        for j in range(1, 4):
            for i in range(2, 4):
                found = hidden_visible(n[:, None], j, n[None, :], i, WINDOW, CHUNK)
                at = seen + ((j - 1) * 2 + i - 2) * LENGTH * LENGTH + n[:, None] * LENGTH + n[None, :]
                tl.store(at, found.to(tl.int32))

    length, policy = 16, KVPolicy(3, window, chunk)
    seen = torch.zeros(3, 2, length, length, dtype=torch.int32)
    first, last = torch.zeros(2, length, dtype=torch.int32)
    table[(1,)](seen, first, last, length, window, chunk or 0)
    n = torch.arange(length)
    for j in range(1, 4):
        for i in range(2, 4):
            copies = torch.tensor(j), torch.tensor(i)
            expected = policy.hidden_visible(n[:, None], copies[0], n[None, :], copies[1])
            assert torch.equal(seen[j - 1, i - 2].bool(), expected)
    assert first.tolist() == [policy.first_hidden_key(p) for p in range(length)]
    for p in range(length):
        seers = [q for q in range(p, length) if policy.first_hidden_key(q) <= p]
        assert min(int(last[p]), length - 1) == max(seers)
