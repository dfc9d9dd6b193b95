"""How a sublayer's output joins the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from phd_megatron.norm.modules import norm_class
from phd_megatron.phd.copies import last_copy


class SublayerResidual(nn.Module):
    """Takes the place of Megatron-Core's bias-dropout-add: ``residual + dropout(output + bias)``.

    Args:
        config: the transformer configuration.
        output_norm: norm the sum (Post-Norm), as :class:`~phd_megatron.norm.schemes.SublayerNorm` says.
        drop_copies: this sublayer's output holds the last copy only (see ``phd_last_layer_pruning``), or shall from
            here on; the rows of the other copies leave the residual.
    """

    def __init__(self, config: Any, output_norm: bool, drop_copies: bool) -> None:
        super().__init__()
        self.repeat = config.kv_policy.repeat if drop_copies else 1
        self.output_norm = (
            norm_class(config.normalization)(config, config.hidden_size, config.layernorm_epsilon)
            if output_norm
            else None
        )

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Megatron-Core asks for the function first, then calls it."""

        def join(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            residual = last_copy(residual, self.repeat)
            if output.size(0) != residual.size(0):
                output = last_copy(output, self.repeat)
            if bias is not None:
                output = output + bias
            if dropout:
                output = F.dropout(output, dropout, training)
            joined = residual + output
            return joined if self.output_norm is None else self.output_norm(joined)

        return join
