"""Documents of one sample that are kept apart: each is what it is alone, in every backend, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phd_megatron.kernels.phd_attention import BACKENDS, phd_attention
from phd_megatron.kernels.triton_support import triton_problem
from phd_megatron.phd.documents import (
    document_lengths,
    positions_in_documents,
    starts_of_first,
    starts_of_tokens,
)
from phd_megatron.phd.kv_policy import KVPolicy

POLICIES = [KVPolicy(1), KVPolicy(2), KVPolicy(2, 4, 8), KVPolicy(3, 5), KVPolicy(3, 16, 6)]
HAS_TRITON = triton_problem("cpu", torch.float32) is None
NAMES = [name for name, row in BACKENDS.items() if name != "flex" and (HAS_TRITON or not row.triton)]
# Of two samples; one has a document of one token, the other a single document.
LENGTHS = {"different": [[7, 1, 20, 5], [33]], "alike": [[16, 17], [16, 17]], "one": [[33], [33]]}


def starts_of(lengths: list[list[int]]) -> Tensor:
    rows = []
    for row in lengths:
        first = torch.tensor([0, *row[:-1]]).cumsum(0)
        rows.append(first.repeat_interleave(torch.tensor(row)))
    return torch.stack(rows)


def draw(policy: KVPolicy, dtype: torch.dtype, copies: int | None = None) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    kq = policy.repeat if copies is None else copies
    shapes = [(kq, 33, 2, 4, 8), (policy.repeat, 33, 2, 2, 8), (policy.repeat, 33, 2, 2, 8), (kq, 33, 2, 4, 8)]
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return inputs, grad


def values(inputs: list[Tensor], grad: Tensor, policy: KVPolicy, backend: str, starts: Tensor | None) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = phd_attention(*leaves, policy, backend=backend, starts=starts)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def test_where_documents_begin() -> None:
    tokens = torch.tensor([[5, 0, 7, 8, 0, 0, 3], [0, 1, 2, 3, 4, 5, 0]])
    starts = starts_of_tokens(tokens, 0)
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    positions = positions_in_documents(starts)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert torch.equal(starts_of_first(positions == 0), starts)
    assert starts_of_first(torch.tensor([False, False, True, False])).tolist() == [0, 0, 2, 2]
    assert [document_lengths(row) for row in starts] == [[2, 3, 1, 1], [1, 6]]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_the_mask_is_each_documents_own(policy: KVPolicy, lengths: list[list[int]]) -> None:
    """By the definition, entry by entry: what a document's mask says inside, and nothing outside."""
    mask = (
        policy.mask(33, starts=starts_of(lengths)).unflatten(1, (policy.repeat, 33)).unflatten(3, (policy.repeat, 33))
    )
    expected = torch.zeros_like(mask)
    for sample, row in enumerate(lengths):
        first = 0
        for length in row:
            inside = slice(first, first + length)
            own = policy.mask(length).unflatten(0, (policy.repeat, length)).unflatten(2, (policy.repeat, length))
            expected[sample, :, inside, :, inside] = own
            first += length
        assert int(mask[sample].sum()) == sum(policy.document_pairs(row))
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("copies", [None, 1], ids=["all", "pruned"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("backend", NAMES)
def test_against_the_mask(backend: str, policy: KVPolicy, lengths: list[list[int]], copies: int | None) -> None:
    from phd_megatron.kernels.phd_attention.reference import reference_attention

    dtype = torch.float32 if BACKENDS[backend].triton else torch.float64
    inputs, grad = draw(policy, dtype, copies)
    starts = starts_of(lengths)
    leaves = [x.double().requires_grad_() for x in inputs]
    out = reference_attention(*leaves, policy, starts=starts)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for found, wanted in zip(values(inputs, grad, policy, backend, starts), expected, strict=True):
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm().clamp_min(1e-3)


@pytest.mark.parametrize("backend", [name for name in NAMES if not BACKENDS[name].triton])
def test_nothing_leaks(backend: str) -> None:
    """One document is changed: no other one's output or gradient moves by a bit, and its own do."""
    policy, starts = KVPolicy(3, 5, 8), starts_of(LENGTHS["different"])
    inputs, grad = draw(policy, torch.float64)
    before = values(inputs, grad, policy, backend, starts)
    inside = slice(8, 28)  # the third of sample 0
    for x in (*inputs, grad):
        x[:, inside, 0] += 1
    for one, two in zip(before, values(inputs, grad, policy, backend, starts), strict=True):
        assert not torch.equal(one[:, inside, 0], two[:, inside, 0])
        one[:, inside, 0] = two[:, inside, 0]
        assert torch.equal(one, two)


def test_refusals() -> None:
    inputs, _ = draw(KVPolicy(2), torch.float32)
    with pytest.raises(ValueError, match=r"documents \(2, 32\) must be \[b, s\]"):
        phd_attention(*inputs, KVPolicy(2), starts=torch.zeros(2, 32, dtype=torch.long))
