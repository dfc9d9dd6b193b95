"""What experts compute with on a GPU, against definitions in float64: forward and every gradient, in bfloat16.

Memory that is not set is NaN, experts without rows and one that has all included. Relative tolerance: ``TOLERANCE``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.kernels.grouped_mm import (
    add_groups_triton,
    clear_empty_groups_triton,
    grouped_linear,
    grouped_linear_reference,
)
from phd_megatron.kernels.moe_permute import (
    order_by_expert,
    permute,
    permute_reference,
    permute_weights,
    unpermute,
    unpermute_reference,
)
from phd_megatron.kernels.swiglu import weighted_swiglu, weighted_swiglu_reference

TOLERANCE = 1e-2
LOADS = {
    "spread": [300, 1, 515, 208],
    "some without": [0, 640, 0, 0, 384, 0],
    "one has all": [0, 0, 0, 1024],
    "the first has all": [1024, 0],
    "many": [(7 * expert) % 41 for expert in range(64)],
    "nothing": [0, 0],
}


@pytest.fixture(autouse=True)
def unset_memory_is_nan() -> Iterator[None]:
    """So that reading what nobody wrote shows; where a kernel allocates by itself, memory that was NaN comes back."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    poison = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 26)]
    del poison
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def compare(function: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = function(*leaves), reference(*wide)
    seeds = random(*y.shape, dtype=y.dtype, seed=9)
    found = [y, *torch.autograd.grad(y, leaves, seeds)]
    wanted = [expected, *torch.autograd.grad(expected, wide, seeds.double())]
    for one, two in zip(found, wanted, strict=True):
        assert one.shape == two.shape and one.isfinite().all()
        error = float((one.double() - two).norm() / two.norm().clamp_min(1e-30))
        assert error <= TOLERANCE, error


@pytest.mark.parametrize("sizes", [(256, 512), (2048, 1024), (72, 136)])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_grouped_linear(sizes: tuple[int, int], load: list[int]) -> None:
    inputs, outputs = sizes
    ends = torch.tensor(load, device="cuda").cumsum(0).to(torch.int32)
    compare(
        lambda x, w: grouped_linear(x, w, ends),
        lambda x, w: grouped_linear_reference(x, w, ends),
        random(sum(load), inputs),
        random(len(load), outputs, inputs, seed=1),
    )


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_groups_without_rows_are_cleared(load: list[int]) -> None:
    ends = torch.tensor(load, device="cuda").cumsum(0).to(torch.int32)
    gradient = torch.full((len(load), 300, 70), 3.0, device="cuda", dtype=torch.bfloat16)
    expected = torch.tensor([3.0 if rows else 0.0 for rows in load], device="cuda").view(-1, 1, 1)
    assert torch.equal(clear_empty_groups_triton(gradient, ends).float(), expected.expand(-1, 300, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(300, 70), (512, 256), (7, 1)])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_groups_are_added(load: list[int], shape: tuple[int, int], dtype: torch.dtype) -> None:
    ends = torch.tensor(load, device="cuda").cumsum(0).to(torch.int32)
    total, gradient = random(len(load), *shape, dtype=dtype), random(len(load), *shape, seed=1)
    empty = torch.tensor(load, device="cuda").eq(0).view(-1, 1, 1)
    expected = torch.where(empty, total, total + gradient).to(dtype)
    gradient.masked_fill_(empty, float("nan"))
    assert torch.equal(add_groups_triton(total, gradient, ends), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "experts", "topk", "width"), [(513, 16, 2, 2048), (100, 64, 8, 70), (7, 4, 1, 1)])
def test_permute_and_back(tokens: int, experts: int, topk: int, width: int, dtype: torch.dtype) -> None:
    chosen = random(tokens, experts, dtype=torch.float32, seed=3).topk(topk).indices
    route = torch.zeros(tokens, experts, dtype=torch.bool, device="cuda").scatter(1, chosen, True)
    order = order_by_expert(route, topk)
    compare(lambda x: permute(x, order), lambda x: permute_reference(x, route), random(tokens, width, dtype=dtype))
    back = random(tokens * topk, width, dtype=dtype)
    compare(lambda x: unpermute(x, order), lambda x: unpermute_reference(x, route), back)
    compare(lambda x: permute_weights(x, order), lambda x: x.T[route.T], random(tokens, experts, dtype=dtype))


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 2), (513, 2048), (65, 2 * 1500), (0, 8)])
def test_weighted_swiglu(shape: tuple[int, int], weights_dtype: torch.dtype) -> None:
    weights = random(shape[0], dtype=weights_dtype, seed=4)
    compare(weighted_swiglu, weighted_swiglu_reference, random(*shape), weights)


def test_all_of_it_is_recorded_and_replayed() -> None:
    """Order, permutation, products and back in one CUDA graph, replayed for another routing."""
    tokens, experts, topk, width = 512, 8, 2, 256
    x, score = random(tokens, width), random(tokens, experts, dtype=torch.float32, seed=3)
    first, second = random(experts, 2 * 128, width, seed=1), random(experts, width, 128, seed=2)

    def layer() -> Tensor:
        route = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(topk).indices, True)
        order = order_by_expert(route, topk)
        ends = order.counts.cumsum(0).to(torch.int32)
        hidden = grouped_linear(permute(x, order), first, ends)
        weighted = weighted_swiglu(hidden, permute_weights(score, order))
        return unpermute(grouped_linear(weighted, second, ends), order)

    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            replayed = layer()
        score.copy_(random(tokens, experts, dtype=torch.float32, seed=5))
        graph.replay()
        torch.testing.assert_close(replayed, layer(), rtol=1e-2, atol=1e-2)
