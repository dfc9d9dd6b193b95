"""The plugin for vLLM's own operations on a GPU: as on a CPU, and recorded as a CUDA graph. Without vLLM itself."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.serving.vllm.attend import Batch, add_hidden, attend_originals, write

GROUPS, RATIO, WIDTH, BLOCK = 4, 4, 64, 16


@pytest.mark.parametrize("policy", [KVPolicy(2, 16, 32), KVPolicy(3, 7), KVPolicy(5)], ids=lambda policy: policy.name)
def test_decoding_step_as_a_graph(policy: KVPolicy) -> None:
    """32 requests of unequal lengths, one token each; what is recorded reads the values of its replay."""
    generator, copies = torch.Generator().manual_seed(0), policy.repeat
    lengths = torch.randint(1, 300, (32,), generator=generator, dtype=torch.int32)
    table = torch.arange(1, 1 + 32 * 20, dtype=torch.int32).view(32, 20)
    slots = table[torch.arange(32), (lengths - 1) // BLOCK].long() * BLOCK + (lengths - 1) % BLOCK
    cache = torch.randn(1 + 32 * 20, (copies - 1) * GROUPS, BLOCK, 2 * WIDTH, generator=generator)
    originals = torch.randn(1 + 32 * 20, GROUPS, BLOCK, 2 * WIDTH, generator=generator)
    query = torch.randn(32, GROUPS, copies, RATIO, WIDTH, generator=generator)
    entry = torch.randn(2, 32, (copies - 1) * GROUPS, WIDTH, generator=generator)

    def on(device: str) -> tuple[Batch, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        starts = torch.arange(33, dtype=torch.int32)
        batch = Batch(*(x.to(device, copy=True) for x in (starts, lengths, table, slots)), 1, 300)
        q, kept = query.to(device, copy=True), cache.to(device, copy=True)
        out, lse = attend_originals(q.flatten(2, 3), originals.to(device), batch, 0.1)
        return batch, q, kept, out.unflatten(2, (copies, RATIO)), lse.unflatten(2, (copies, RATIO)), entry.to(device)

    def step(batch: Batch, q: torch.Tensor, kept: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        out, lse, new = rest
        write(kept, batch.slots, new[0], new[1])
        return add_hidden(out, lse, q, kept, batch, policy, 0.1)

    expected = step(*on("cpu"))
    inputs = on("cuda")
    torch.testing.assert_close(step(*inputs).cpu(), expected, rtol=1e-4, atol=1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*inputs)
    inputs[1].neg_()  # other queries than those recorded
    graph.replay()
    torch.testing.assert_close(found, step(*inputs), rtol=1e-5, atol=1e-6)
