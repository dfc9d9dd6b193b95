"""Pipeline sends and receives over gloo.

Megatron's own functions rely on two things that NCCL gives and gloo does not: messages of one pair of ranks keep the
order in which both sides list them, and a tensor that is being sent may be freed by the host. Here forward and
backward traffic have their own tags, and what is sent holds its own reference to the storage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

FORWARD_TAG = 1
BACKWARD_TAG = 2


def p2p_ops(
    *,
    tensor_send_prev: torch.Tensor | None,
    tensor_recv_prev: torch.Tensor | None,
    tensor_send_next: torch.Tensor | None,
    tensor_recv_next: torch.Tensor | None,
    group: dist.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> dict[str, dist.Work | None]:
    """Start up to four transfers; returns the request of each by its name. Takes the place of ``_p2p_ops``."""
    requests: dict[str, dist.Work | None] = {}
    if tensor_recv_prev is not None:
        requests["recv_prev"] = dist.irecv(tensor_recv_prev, prev_pipeline_rank, group, FORWARD_TAG)
    if tensor_recv_next is not None:
        requests["recv_next"] = dist.irecv(tensor_recv_next, next_pipeline_rank, group, BACKWARD_TAG)
    # The schedule swaps out the storage of an activation once it is "sent" (deallocate_pipeline_outputs) while gloo
    # may still be reading it: detach() keeps the storage alive.
    if tensor_send_next is not None:
        requests["send_next"] = dist.isend(tensor_send_next.detach(), next_pipeline_rank, group, FORWARD_TAG)
    if tensor_send_prev is not None:
        requests["send_prev"] = dist.isend(tensor_send_prev.detach(), prev_pipeline_rank, group, BACKWARD_TAG)
    return requests


def batched_p2p_ops(**transfers: Any) -> list[dist.Work | None]:
    """Takes the place of ``_batched_p2p_ops``, which returns a list."""
    return list(p2p_ops(**transfers).values())
