"""What the plugin for vLLM computes with, without vLLM: attention over paged caches against the dense definition.

Float32 against float64, relative 1e-5. Blocks lie anywhere, what nobody wrote is NaN, prompts are cut at any place.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.serving.vllm import attend
from phd_megatron.serving.vllm.attend import Batch, add_hidden, attend_originals, write

GROUPS, RATIO, WIDTH = 2, 3, 8
POLICIES = [KVPolicy(2), KVPolicy(2, 5), KVPolicy(3, 7, 8), KVPolicy(5, 4, 6), KVPolicy(2, 9, 4), KVPolicy(3, 16, 32)]


class Paged:
    """A cache whose requests' blocks are scattered; block 0 is nobody's."""

    def __init__(self, heads: int, size: int, lengths: list[int], source: random.Random) -> None:
        wanted = [-(-length // size) for length in lengths]
        numbers = source.sample(range(1, 1 + 2 * sum(wanted)), sum(wanted))
        self.cache = torch.full((1 + 2 * sum(wanted), heads, size, 2 * WIDTH), torch.nan)
        self.table = torch.zeros(len(lengths), max(wanted), dtype=torch.int32)
        for request, count in enumerate(wanted):
            self.table[request, :count] = torch.tensor([numbers.pop() for _ in range(count)])

    def slots(self, request: int, positions: range) -> list[int]:
        size = self.cache.size(2)
        return [int(self.table[request, position // size]) * size + position % size for position in positions]


def passes(lengths: list[int], source: random.Random) -> list[list[tuple[int, range]]]:
    """Forward passes, each of parts of some requests, until all are in."""
    done, found = [0] * len(lengths), []
    while done != lengths:
        parts = []
        for request, length in enumerate(lengths):
            count = min(source.randrange(0, 9), length - done[request])
            if count:
                parts.append((request, range(done[request], done[request] + count)))
                done[request] += count
        if parts:
            found.append(source.sample(parts, len(parts)))
    return found


@pytest.mark.parametrize("last_alone", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_paged_attention(policy: KVPolicy, last_alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "ROWS", 3)
    monkeypatch.setattr(attend, "BYTES", 20_000)  # a few tokens at a time
    source, generator = random.Random(1), torch.Generator().manual_seed(2)
    copies, lengths = policy.repeat, [1, 23, 40, 9, 2]
    scale = 0.3

    def draw(length: int, heads: int) -> Tensor:
        return torch.randn(length, copies, heads, WIDTH, generator=generator)

    queries = [draw(length, GROUPS * RATIO) for length in lengths]
    keys, values = ([draw(length, GROUPS) for length in lengths] for _ in range(2))
    originals = Paged(GROUPS, 4, lengths, source)
    hidden = Paged((copies - 1) * GROUPS, 3, lengths, source)
    wanted = [expected(*three, policy, scale) for three in zip(queries, keys, values, strict=True)]
    kept = slice(copies - 1, None) if last_alone else slice(None)
    for parts in passes(lengths, source):
        starts = torch.tensor([0, *(len(positions) for _, positions in parts)]).cumsum(0).to(torch.int32)
        ends = torch.tensor([positions.stop for _, positions in parts], dtype=torch.int32)
        requests = [request for request, _ in parts]

        def batch(paged: Paged) -> Batch:
            slots = [slot for request, positions in parts for slot in paged.slots(request, positions)]  # noqa: B023
            return Batch(starts, ends, paged.table[requests], torch.tensor(slots), 9, 40)  # noqa: B023

        def rows(tensors: list[Tensor]) -> Tensor:
            return torch.cat([tensors[request][positions.start : positions.stop] for request, positions in parts])  # noqa: B023

        query, key, value = rows(queries)[:, kept], rows(keys), rows(values)
        write(originals.cache, batch(originals).slots, key[:, 0], value[:, 0])
        write(hidden.cache, batch(hidden).slots, key[:, 1:].flatten(1, 2), value[:, 1:].flatten(1, 2))
        query = query.unflatten(2, (GROUPS, RATIO)).transpose(1, 2)  # [T, G, J, r, d]
        out, lse = attend_originals(query.flatten(2, 3), originals.cache, batch(originals), scale)
        by_copy = query.shape[2:4]
        out, lse = out.unflatten(2, by_copy), lse.unflatten(2, by_copy)
        found = add_hidden(out, lse, query, hidden.cache, batch(hidden), policy, scale)
        found = found.transpose(1, 2).flatten(2, 3)  # [T, J, heads, d]
        torch.testing.assert_close(found.double(), rows(wanted)[:, kept], rtol=1e-5, atol=1e-6)


def expected(query: Tensor, key: Tensor, value: Tensor, policy: KVPolicy, scale: float) -> Tensor:
    """``[length, K, heads, d]`` by the definition, in float64."""
    length, copies = query.shape[:2]
    position = torch.arange(length)[:, None, None, None]
    copy = torch.arange(1, copies + 1)[None, :, None, None]
    seen = policy.visible(position, copy, torch.arange(length)[None, None, :, None], torch.arange(1, copies + 1))
    keys, values = (x.double().repeat_interleave(RATIO, 2) for x in (key, value))
    scores = torch.einsum("njhd,mihd->hnjmi", query.double(), keys) * scale
    weights = scores.masked_fill(~seen, -torch.inf).flatten(3).softmax(-1).view(scores.shape)
    return torch.einsum("hnjmi,mihd->njhd", weights, values)


def test_padding_is_written_where_nobody_reads() -> None:
    cache = torch.full((3, 1, 4, 2 * WIDTH), torch.nan)
    key = torch.arange(3.0)[:, None, None].expand(3, 1, WIDTH)
    write(cache, torch.tensor([5, -1]), key, key + 10)
    assert cache[1, 0, 1].tolist() == [0.0] * WIDTH + [10.0] * WIDTH
    assert cache[2].isnan().all() and int(cache[1].isfinite().sum()) == 2 * WIDTH


def test_padded_rows_of_a_batch_are_finite() -> None:
    """A graph of a fixed size has rows after the last request's; they belong to it and change nothing."""
    batch = Batch(torch.tensor([0, 1]), torch.tensor([4]), torch.tensor([[1]]), torch.tensor([7, -1, -1]), 1, 4)
    request, position = batch.rows()
    assert request.tolist() == [0, 0, 0] and position.tolist()[0] == 3
