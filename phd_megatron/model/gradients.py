"""The one gradient reduction that Megatron-Core does not know: per-head norms shared by tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads as finalize_with_megatron
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


def finalize_model_grads(model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Megatron-Core's reductions, then the sum over TP of gradients marked by the norm module.

    The order does not matter for the values: scaling by the token count and the sum commute.
    """
    finalize_with_megatron(model, num_tokens, **kwargs)
    sum_marked_gradients(model, kwargs["pg_collection"].tp)


def sum_marked_gradients(model: list[Any], tp_group: Any) -> None:
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
