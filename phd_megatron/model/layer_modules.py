"""Classes of linear layers and of norms of the model's width, of Megatron-Core or of Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from phd_megatron.norm.modules import norm_class

if TYPE_CHECKING:
    from phd_megatron.model.transformer_config import PHDTransformerConfig


@dataclass(frozen=True)
class LayerModules:
    """What a layer is made of.

    Attributes:
        column, row: linear layers whose output, or input, is split over the tensor-parallel ranks.
        norm: of the model's width.
        norm_and_column: a norm and the linear layer that alone reads it in one, where there is such a module. It cannot
            give the normed rows back, so it does not do for a residual that is normed, nor for experts.
    """

    column: type
    row: type
    norm: Callable[..., nn.Module]
    norm_and_column: type | None = None


def layer_modules(config: PHDTransformerConfig) -> LayerModules:
    """Classes of the chosen implementation."""
    if not config.transformer_engine:
        return LayerModules(ColumnParallelLinear, RowParallelLinear, norm_class(config.normalization))
    from megatron.core.extensions import transformer_engine as te

    fused = te.TELayerNormColumnParallelLinear if config.fused_norms else None
    return LayerModules(te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm, fused)


def wide_norm(config: PHDTransformerConfig) -> nn.Module:
    """A norm of the model's width."""
    return layer_modules(config).norm(config, config.hidden_size, config.layernorm_epsilon)
