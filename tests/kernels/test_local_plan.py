"""How the attention to hidden keys is cut into blocks: no key that a query sees lies outside of its block."""

from __future__ import annotations

import pytest
import torch

from phd_megatron.kernels.phd_attention.local import local_plan
from phd_megatron.phd.kv_policy import KVPolicy

POLICIES = [
    *(KVPolicy(2, window, chunk) for window in (2, 5, 16) for chunk in (3, 8, 32, None)),
    KVPolicy(3, 40, 4),
    KVPolicy(2, 20),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize(("length", "start", "halo"), [(70, 0, 0), (70, 64, 15), (45, 4, 4), (100, 33, 15), (9, 5, 3)])
def test_a_block_holds_what_its_queries_see(policy: KVPolicy, length: int, start: int, halo: int) -> None:
    plan = local_plan(policy, length, start, halo)
    query = torch.arange(start, start + length).view(-1, 1)
    key = torch.arange(start - halo, start + length)
    seen = policy.hidden_visible(query, torch.tensor(policy.repeat), key, torch.tensor(2))
    if plan is None:
        assert not (seen & (query != key)).any(), "a token sees more than its own copies"
        return
    assert plan.size * plan.number >= length
    first = start + (query - start) // plan.size * plan.size  # of the query's block
    held = (key >= first - plan.back) & (key < first + plan.size)
    assert not (seen & ~held).any()
