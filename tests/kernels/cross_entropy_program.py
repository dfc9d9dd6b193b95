"""Program for torchrun: each rank has half of the vocabulary, the second one's end is padding."""

from __future__ import annotations

import torch
import torch.distributed as dist

from phd_megatron.kernels.cross_entropy import cross_entropy, cross_entropy_reference

dist.init_process_group("gloo")
rank, half = dist.get_rank(), 12
for true in (19, 12):  # a padded end; a second rank with nothing but padding
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, true, generator=generator)
    labels = torch.randint(0, true, (7,), generator=generator)
    wide = logits.double().requires_grad_()
    expected = cross_entropy_reference(wide, labels)
    expected.sum().backward()
    assert wide.grad is not None
    padding = logits.new_full((7, 2 * half - true), float("-inf"))
    mine = torch.cat([logits, padding], 1)[:, rank * half : (rank + 1) * half].contiguous().requires_grad_()
    losses = cross_entropy(mine * 1, labels, dist.group.WORLD)
    losses.sum().backward()
    assert mine.grad is not None
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    wanted = wide.grad[:, rank * half : (rank + 1) * half]
    torch.testing.assert_close(mine.grad[:, : wanted.size(1)].double(), wanted, rtol=1e-5, atol=1e-6)
    assert not mine.grad[:, wanted.size(1) :].any()
print(f"OK rank {rank}\n", end="", flush=True)
dist.destroy_process_group()
