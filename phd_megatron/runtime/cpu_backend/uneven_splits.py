"""Gathers and reduce-scatters whose shares differ from rank to rank, which NCCL does and gloo refuses.

Experts with tensor parallelism exchange as many rows as were routed to them. Megatron calls ``all_gather`` and
``reduce_scatter`` with the sizes; here both go through ``all_to_all_single``, for which gloo takes any sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Collective = Callable[..., torch.Tensor]


def gather(stock: Collective) -> Collective:
    """Takes the place of ``_gather_along_first_dim``: ``[n_r, ...]`` of every rank r to ``[sum of n_r, ...]``."""

    @functools.wraps(stock)
    def run(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        *rest: bool,
        **kwargs: bool,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return stock(input_, group, output_split_sizes, *rest, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        output = input_.new_empty(sum(sizes), *input_.shape[1:])
        sent = torch.cat([input_] * group.size())
        dist.all_to_all_single(output, sent, sizes, [input_.size(0)] * group.size(), group=group)
        return output

    return run


def reduce_scatter(stock: Collective) -> Collective:
    """Takes the place of ``_reduce_scatter_along_first_dim``: ``[sum of n_r, ...]`` to the summed ``[n_rank, ...]``."""

    @functools.wraps(stock)
    def run(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: Sequence[int] | None = None,
        *rest: bool,
        **kwargs: bool,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return stock(input_, group, input_split_sizes, *rest, **kwargs)
        sizes = [int(size) for size in input_split_sizes]
        mine = sizes[group.rank()]
        received = input_.new_empty(group.size() * mine, *input_.shape[1:])
        dist.all_to_all_single(received, input_.contiguous(), [mine] * group.size(), sizes, group=group)
        return received.unflatten(0, (group.size(), mine)).sum(dim=0)

    return run
