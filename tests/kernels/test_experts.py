"""What experts compute with, against its definitions: sorting rows, grouped products, weighted SwiGLU.

Values and every gradient, odd shapes, experts without rows and one that has all; memory that is not set is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from phd_megatron.kernels.grouped_mm import (
    add_groups,
    add_groups_triton,
    clear_empty_groups,
    clear_empty_groups_triton,
    grouped_linear,
    grouped_linear_reference,
    grouped_mm_problem,
    width_problem,
)
from phd_megatron.kernels.moe_permute import (
    gather_sum_triton,
    gather_triton,
    order_by_expert,
    permute,
    permute_reference,
    permute_weights,
    unpermute,
    unpermute_reference,
)
from phd_megatron.kernels.swiglu import weighted_swiglu, weighted_swiglu_reference, weighted_swiglu_triton
from phd_megatron.kernels.triton_support import triton_problem

TOLERANCES = [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
needs_triton = pytest.mark.skipif(triton_problem("cpu", torch.float32) is not None, reason="no Triton")


@pytest.fixture(autouse=True)
def unset_memory_is_nan() -> Iterator[None]:
    """So that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compare(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], tolerance: float, *inputs: Tensor
) -> None:
    """Values and the gradients of all inputs; the reference computes in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = function(*leaves), reference(*wide)
    assert y.dtype == inputs[0].dtype and y.shape == expected.shape
    seeds = random(*y.shape, dtype=y.dtype, seed=1)
    found = [y, *torch.autograd.grad(y, leaves, seeds)]
    wanted = [expected, *torch.autograd.grad(expected, wide, seeds.double())]
    for one, two in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert (one.double() - two).norm() <= tolerance * max(two.norm(), 1e-300)


# rows of each expert
LOADS = {
    "spread": [3, 1, 7, 5],
    "some without": [0, 6, 0, 0, 9, 0],
    "one has all": [0, 0, 11],
    "the first has all": [11, 0, 0],
    "alone": [5],
    "nothing": [0, 0],
}


def ends_of(load: list[int]) -> Tensor:
    return torch.tensor(load).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("sizes", [(8, 16), (16, 8), (6, 10), (1, 1)])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_grouped_linear(dtype: torch.dtype, tolerance: float, sizes: tuple[int, int], load: list[int]) -> None:
    inputs, outputs = sizes
    rows = random(sum(load), inputs, dtype=dtype)
    weight = random(len(load), outputs, inputs, dtype=dtype, seed=2)
    ends = ends_of(load)
    compare(
        lambda x, w: grouped_linear(x, w, ends),
        lambda x, w: grouped_linear_reference(x, w, ends),
        tolerance,
        rows,
        weight,
    )
    wide = random(sum(load), 2 * inputs, dtype=dtype)[:, ::2]  # neither dense
    turned = random(len(load), inputs, outputs, dtype=dtype, seed=2).transpose(1, 2)
    compare(
        lambda x, w: grouped_linear(x, w, ends),
        lambda x, w: grouped_linear_reference(x, w, ends),
        tolerance,
        wide,
        turned,
    )


def test_grouped_linear_takes_any_gradient() -> None:
    """A sum hands back one number for all elements, without memory of its own."""
    rows, weight = random(12, 8, dtype=torch.bfloat16), random(3, 16, 8, dtype=torch.bfloat16).requires_grad_()
    grouped_linear(rows, weight, ends_of([4, 0, 8])).sum().backward()
    assert not weight.grad[1].any() and weight.grad[::2].abs().sum() > 0


def test_where_torch_multiplies_groups() -> None:
    assert grouped_mm_problem(torch.bfloat16, None) is None
    assert grouped_mm_problem(torch.bfloat16, (9, 0)) is None
    assert "compute capability 8.0, and this is 7.5" in str(grouped_mm_problem(torch.bfloat16, (7, 5)))
    assert "not in float32" in str(grouped_mm_problem(torch.float32, (9, 0)))
    assert width_problem(8, 1024) is None
    assert "12 is not a multiple of 8" in str(width_problem(64, 12))


@pytest.mark.parametrize("clear", [clear_empty_groups, pytest.param(clear_empty_groups_triton, marks=needs_triton)])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_groups_without_rows_are_cleared(clear: Callable[[Tensor, Tensor], Tensor], load: list[int]) -> None:
    gradient = torch.full((len(load), 5, 7), 3.0)
    expected = torch.tensor([3.0 if rows else 0.0 for rows in load]).view(-1, 1, 1).expand(-1, 5, 7)
    assert torch.equal(clear(gradient, ends_of(load)), expected) and torch.equal(gradient, expected)


@pytest.mark.parametrize("add", [add_groups, pytest.param(add_groups_triton, marks=needs_triton)])
@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")], ids=str)
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_groups_are_added(add: Callable[..., Tensor], types: tuple[str, str], load: list[int]) -> None:
    """As torch adds, to the last bit of float32; what groups without rows have is not read."""
    total, gradient = (
        random(len(load), 5, 7, dtype=getattr(torch, name), seed=seed) for seed, name in enumerate(types)
    )
    expected = total.clone()
    for group, rows in enumerate(load):
        if rows:
            expected[group] += gradient[group]
        else:
            gradient[group] = float("nan")
    assert add(total, gradient, ends_of(load)) is total
    last_bit = 2**-7 if types[0] == "bfloat16" else 0.0  # Triton's interpreter cuts where a GPU rounds
    torch.testing.assert_close(total, expected, rtol=last_bit, atol=0)


def test_a_gradient_is_added_where_megatron_keeps_it() -> None:
    """Twice, as two micro-batches; and nothing is added that DDP would add once more."""
    load = [4, 0, 8]
    rows, ends = random(12, 8, dtype=torch.bfloat16), ends_of(load)
    weight = random(3, 16, 8, dtype=torch.bfloat16, seed=2).requires_grad_()
    grouped_linear(rows, weight, ends).sum().backward()
    expected, weight.grad = weight.grad.float(), None
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(3, 16, 8), False
    for count in (1, 2):
        grouped_linear(rows, weight, ends).sum().backward()
        assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
        torch.testing.assert_close(weight.main_grad, 1 + count * expected, rtol=0, atol=0)
        weight.grad = None


def routing(tokens: int, experts: int, topk: int, chosen: list[int] | None = None) -> Tensor:
    """``[tokens, experts]``; random, or all tokens to the same experts."""
    scores = random(tokens, experts, seed=3)
    if chosen is not None:
        scores[:, chosen] += 100
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, scores.topk(topk).indices, True)


ROUTES = {
    "top-1": routing(13, 4, 1),
    "top-2": routing(33, 5, 2),
    "top-8 of 9": routing(7, 9, 8),
    "all experts": routing(6, 3, 3),
    "the same experts": routing(10, 6, 2, [1, 4]),
    "one expert": routing(9, 1, 1),
    "one token": routing(1, 4, 2),
    "no token": routing(0, 4, 2),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_order_by_expert(route: Tensor) -> None:
    tokens, experts = route.shape
    topk = int(route[0].sum()) if tokens else 2
    order = order_by_expert(route, topk)
    pairs = [(e, t) for e in range(experts) for t in range(tokens) if route[t, e]]
    assert order.source.tolist() == [t for _, t in pairs]
    assert order.counts.tolist() == [sum(e == expert for e, _ in pairs) for expert in range(experts)]
    for token in range(tokens):
        mine = [row for row, (_, t) in enumerate(pairs) if t == token]
        assert order.places[token].tolist() == mine
        assert order.experts[token].tolist() == [pairs[row][0] for row in mine]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("width", [1, 10])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_permute_and_back(dtype: torch.dtype, tolerance: float, width: int, route: Tensor) -> None:
    topk = int(route[0].sum()) if len(route) else 2
    order = order_by_expert(route, topk)
    rows = random(len(route), width, dtype=dtype)
    compare(lambda x: permute(x, order), lambda x: permute_reference(x, route), tolerance, rows)
    back = random(len(route) * topk, width, dtype=dtype)
    compare(lambda x: unpermute(x, order), lambda x: unpermute_reference(x, route), tolerance, back)
    weights = random(*route.shape, dtype=dtype)
    compare(lambda x: permute_weights(x, order), lambda x: x.T[route.T], tolerance, weights)


@needs_triton
@pytest.mark.parametrize("width", [1, 7, 1500])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_permute_in_triton(width: int, route: Tensor) -> None:
    topk = int(route[0].sum()) if len(route) else 2
    order = order_by_expert(route, topk)
    rows, back = random(len(route), width), random(len(route) * topk, width)
    strided = random(len(route) * topk, 2 * width)[:, ::2]
    assert torch.equal(gather_triton(rows, order.source), permute_reference(rows, route))
    for given in (back, strided):
        torch.testing.assert_close(gather_sum_triton(given, order.places), unpermute_reference(given, route))


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("weights_dtype", [None, torch.float32])
@pytest.mark.parametrize("shape", [(1, 2), (5, 6), (17, 34), (0, 8)])
def test_weighted_swiglu(
    dtype: torch.dtype, tolerance: float, weights_dtype: torch.dtype | None, shape: tuple[int, int]
) -> None:
    if dtype == torch.float64 and weights_dtype is not None:
        tolerance = 1e-6
    rows, strided = random(*shape, dtype=dtype), random(shape[0], 2 * shape[1], dtype=dtype)[:, ::2]
    weights = random(shape[0], dtype=weights_dtype or dtype, seed=4)
    functions = [weighted_swiglu]
    if triton_problem("cpu", dtype) is None and weights.dtype != torch.float64:
        functions.append(weighted_swiglu_triton)
    for function in functions:
        compare(function, weighted_swiglu_reference, tolerance, rows, weights)
        compare(function, weighted_swiglu_reference, tolerance, strided, weights)


@needs_triton
def test_weighted_swiglu_wider_than_a_block() -> None:
    compare(weighted_swiglu_triton, weighted_swiglu_reference, 2e-6, random(3, 2 * 1500), random(3, seed=4))


def test_gradcheck() -> None:
    ends, route = ends_of([2, 0, 3]), routing(5, 4, 2)
    order = order_by_expert(route, 2)
    leaf = {"dtype": torch.float64}
    rows = random(5, 3, **leaf).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: grouped_linear(x, w, ends), (rows, random(3, 4, 3, **leaf).requires_grad_())
    )
    assert torch.autograd.gradcheck(lambda x: permute(x, order), rows)
    assert torch.autograd.gradcheck(lambda x: unpermute(x, order), random(10, 3, **leaf).requires_grad_())
    assert torch.autograd.gradcheck(
        weighted_swiglu, (random(4, 6, **leaf).requires_grad_(), random(4, **leaf).requires_grad_())
    )
