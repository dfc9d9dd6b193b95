"""Decode attention over a KV cache against its definition, and the definition against whole-sequence attention."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from phd_megatron.kernels.decode_attention import decode_attention, decode_attention_reference
from phd_megatron.kernels.phd_attention import phd_attention
from phd_megatron.phd.kv_policy import KVPolicy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
GROUPS, RATIO = 2, 3
POLICIES = [KVPolicy(1), KVPolicy(2, 1), KVPolicy(2, 16, 32), KVPolicy(3, 4, 8), KVPolicy(4, 6), KVPolicy(5, 9, 4)]


def cache(policy: KVPolicy, lengths: list[int], padding: int, width: int, seed: int = 0) -> tuple[Tensor, ...]:
    """What a cache of sequences of such lengths holds once their last tokens are in, padded on the left, NaN there."""
    generator = torch.Generator().manual_seed(seed)
    batch, size, slots = len(lengths), max(lengths) + padding, policy.span
    nan = float("nan")
    key, value = torch.full((2, batch, GROUPS, size, width), nan, dtype=torch.float64)
    hidden_key, hidden_value = torch.full((2, batch, GROUPS, policy.repeat - 1, slots, width), nan, dtype=torch.float64)
    position, hidden_position = torch.full((batch, size), -1), torch.full((batch, slots), -1)
    whole = torch.randn(2, policy.repeat, max(lengths), batch, GROUPS, width, generator=generator, dtype=torch.float64)
    for row, length in enumerate(lengths):
        kept = range(policy.first_hidden_key(length - 1), length)
        position[row, size - length :] = torch.arange(length)
        hidden_position[row, slots - len(kept) :] = torch.arange(kept.start, kept.stop)
        for target, hidden, source in ((key, hidden_key, whole[0]), (value, hidden_value, whole[1])):
            target[row, :, size - length :] = source[0, :length, row].transpose(0, 1)
            hidden[row, :, :, slots - len(kept) :] = source[1:, kept.start : kept.stop, row].permute(2, 0, 1, 3)
    return whole, key, value, position, hidden_key, hidden_value, hidden_position


def arguments(policy: KVPolicy, lengths: list[int], copies: int, width: int, padding: int = 3) -> tuple[Tensor, list]:
    """(whole keys and values, arguments without the policy). Padding is zero: a product with NaN would be NaN."""
    whole, *rest = cache(policy, lengths, padding, width)
    query = torch.randn(copies, len(lengths), GROUPS * RATIO, width, dtype=torch.float64)
    return whole, [query, torch.tensor(lengths) - 1, *(x.nan_to_num(0.0) for x in rest)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_the_definition_is_the_last_row_of_the_whole(policy: KVPolicy) -> None:
    lengths = [9, 33, 16]
    for copies in {1, policy.repeat}:
        whole, given = arguments(policy, lengths, copies, 8)
        found = decode_attention_reference(*given, policy)
        for row, length in enumerate(lengths):
            keys = whole[:, :, :length, row : row + 1]
            query = torch.zeros(copies, length, 1, GROUPS * RATIO, 8, dtype=torch.float64)
            query[:, -1] = given[0][:, row : row + 1]
            full = phd_attention(query, keys[0], keys[1], policy, backend="reference")
            torch.testing.assert_close(found[:, row], full[:, -1, 0], rtol=1e-12, atol=1e-12)


def compare(policy: KVPolicy, lengths: list[int], copies: int, width: int, dtype: torch.dtype) -> None:
    given = arguments(policy, lengths, copies, width)[1]
    given = [x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE) for x in given]
    wide = [x.double() if x.is_floating_point() else x for x in given]
    expected = decode_attention_reference(*wide, policy)
    found = decode_attention(*given, policy)
    assert found.dtype == dtype and found.shape == expected.shape
    assert float((found.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


triton_only = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set, and there is no GPU"
)


@triton_only
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_kernel(policy: KVPolicy, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    compare(policy, [9, 90, 33], policy.repeat, 16, dtype)
    compare(policy, [1], 1, 16, dtype)
    front = "phd_megatron.kernels.decode_attention."
    # As many parts as a short cache can have, the hidden keys in the last of them or in one of their own.
    for name, value in (("TILE", 16), ("SHORTEST_PART", 1), ("MANY", 2)):
        monkeypatch.setattr(front + name, value)
    for own in (1, 1000):
        monkeypatch.setattr(front + "OWN_PART", own)
        compare(policy, [90], policy.repeat, 16, dtype)
        compare(policy, [90, 33], policy.repeat, 16, dtype)


@triton_only
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [48, 80, 128])
def test_kernel_of_other_widths(width: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    compare(KVPolicy(3, 4, 8), [21, 40], 3, width, dtype)


@triton_only
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_more_rows_than_a_tile_holds(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    monkeypatch.setattr("phd_megatron.kernels.decode_attention.MOST_ROWS", 16)
    compare(KVPolicy(9, 4, 8), [21, 40], 9, 16, dtype)
    compare(KVPolicy(9, 16, 32), [21, 40], 9, 16, dtype)  # and more hidden keys


@triton_only
def test_a_row_that_sees_nothing_gives_zeros() -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    policy = KVPolicy(2, 4, 8)
    given = [
        x.float().to(DEVICE) if x.is_floating_point() else x.to(DEVICE) for x in arguments(policy, [5, 9], 2, 16)[1]
    ]
    given[1][0], given[4][0], given[7][0] = -1, -1, -1
    found = decode_attention(*given, policy)
    assert not found[:, 0].any() and found[:, 1].isfinite().all()


def test_refusals() -> None:
    policy = KVPolicy(3, 4, 8)
    given = arguments(policy, [9, 12], 3, 16)[1]
    for index, bad, message in (
        (0, given[0][0], "is needed"),
        (0, given[0][:, :1], "batch"),
        (2, given[2][:, :, 1:], "is needed"),
        (4, given[4][:, 1:], "positions are"),
        (2, given[2].transpose(-1, -2).contiguous().transpose(-1, -2), "dense"),
        (5, None, "hidden copies"),
        (5, given[5][:, :, 1:], "not"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*[bad if i == index else x for i, x in enumerate(given)], policy)
