"""Weights that Transformer Engine holds in FP8 (``fp8_param``), seen as plain tensors where values are set or saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict


@contextmanager
@torch.no_grad()
def plain_weights(
    model: nn.Module, dtype: torch.dtype, quantised: Callable[[Tensor], bool] = is_float8tensor
) -> Iterator[None]:
    """Inside, every quantised weight is an unset one of type ``dtype``; what it was set to is quantised at the end.

    The optimizer's main weight starts from the value before quantisation, as it would from a weight that is not
    quantised: Transformer Engine keeps that beside such a weight until the optimizer asks for it.
    """
    replaced = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and quantised(parameter)
    ]
    for module, name, parameter in replaced:
        plain = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
        module._parameters[name] = nn.Parameter(plain, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            plain_value, module._parameters[name] = module._parameters[name], parameter
            assert plain_value is not None
            parameter.copy_(plain_value)
            if (kept := getattr(parameter, "_high_precision_init_val", None)) is not None:
                kept.copy_(plain_value)


def dequantise(state: ShardedStateDict) -> None:
    """Give a sharded state dict plain tensors for quantised ones, in place; checkpoints hold the model's own type."""
    for entry in nested_values(dict(state)):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and is_float8tensor(entry.data):
            entry.data = dequantize_fp8_tensor(entry.data)
