"""Run ``phd-megatron`` commands one after the other, some of them with one thing about context parallelism broken.

The argument is a JSON file with a list of ``[name, broken or null, arguments]``. The name is printed before each case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from phd_megatron.cli.main import main
from phd_megatron.phd.kv_policy import KVPolicy

genuine_slices = KVPolicy.context_parallel_slices


def no_halo(policy: KVPolicy, slice_start: int) -> int:
    """Hidden tokens stop seeing what lies before their slice."""
    return 0


def contiguous_slices(policy: KVPolicy, length: int, size: int, rank: int) -> tuple[range, ...]:
    """The ranks cut the sequence in order, while attention goes by zigzag order."""
    genuine_slices(policy, length, size, rank)
    half = length // size // 2
    return tuple(range((2 * rank + i) * half, (2 * rank + i + 1) * half) for i in (0, 1))


def mean_of_each_rank(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every rank divides by its own token count instead of the global one."""
    loss = (losses.float() * loss_mask).sum() / loss_mask.sum()
    one = torch.ones((), dtype=torch.int)
    return loss, one, torch.stack([loss.detach().double(), one.double()])


def broken(what: str | None) -> Any:
    """A context in which one thing is wrong."""
    if what is None:
        return mock.patch.dict(os.environ)  # changes nothing
    if what == "loss":
        from phd_megatron.training import micro_batch

        return mock.patch.object(micro_batch, "summed_loss", mean_of_each_rank)
    name, replacement = {
        "halo": ("halo", no_halo),
        "zigzag": ("context_parallel_slices", contiguous_slices),
    }[what]
    return mock.patch.object(KVPolicy, name, replacement)


def run(cases: list[tuple[str, str | None, list[str]]]) -> None:
    for name, what, arguments in cases:
        if os.environ.get("RANK", "0") == "0":
            print(f"CASE {name}", flush=True)
        with broken(what):
            if main(arguments):
                raise SystemExit(f"{name}: {' '.join(arguments)} failed")


run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
