"""What makes gradients final: Megatron-Core's reductions, and the one that it does not know, of per-head norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import finalize_model_grads as finalize_with_megatron
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed import ProcessGroup


def finalize_model_grads(
    model: Sequence[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    *,
    pg_collection: ProcessGroupCollection,
    **kwargs: bool | None,
) -> None:
    """Megatron-Core's reductions, then the sum over TP of gradients marked by the norm module.

    The order does not matter for the values: scaling by the token count and the sum commute.
    """
    finalize_with_megatron(model, None, pg_collection=pg_collection, **kwargs)
    if num_tokens is not None:
        divide_by_tokens(model, num_tokens, pg_collection)
    sum_marked_gradients(model, pg_collection.tp)


def divide_by_tokens(
    model: Sequence[DistributedDataParallel], num_tokens: torch.Tensor, groups: ProcessGroupCollection
) -> None:
    """Divide gradients by the tokens of the global batch, as Megatron-Core does, without the host waiting for them.

    Megatron-Core asks on the host whether there are any, and leaves the gradients as they are where there are none.

    Args:
        num_tokens: 0-dimensional, int, of this rank's batch on the last pipeline stage; overwritten with the sum.
        groups: with ``pp`` and ``dp_cp``.
    """
    last = torch.distributed.get_process_group_ranks(groups.pp)[-1]
    torch.distributed.broadcast(num_tokens, src=last, group=groups.pp)
    torch.distributed.all_reduce(num_tokens, group=groups.dp_cp)
    scaling = 1.0 / num_tokens.clamp(min=1)
    for chunk in model:
        chunk.scale_gradients(scaling)


def sum_marked_gradients(model: Sequence[DistributedDataParallel], tp_group: ProcessGroup) -> None:
    """One all-reduce for all parameters marked ``sum_gradient_over_tensor_parallel``."""
    if tp_group.size() == 1:
        return
    gradients = [
        parameter.main_grad
        for chunk in model
        for parameter in chunk.parameters()
        if getattr(parameter, "sum_gradient_over_tensor_parallel", False) and parameter.requires_grad
    ]
    if not gradients:
        return
    flat = _flatten_dense_tensors(gradients)
    torch.distributed.all_reduce(flat, group=tp_group)
    for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(summed)
