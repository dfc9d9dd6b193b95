"""How a sublayer's output joins the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phd_megatron.model.layer_modules import wide_norm
from phd_megatron.phd.copies import last_copy

if TYPE_CHECKING:
    from phd_megatron.model.transformer_config import PHDTransformerConfig
    from phd_megatron.norm.schemes import SublayerNorm


class SublayerResidual(nn.Module):
    """Takes the place of Megatron-Core's bias-dropout-add: ``residual + dropout(output + bias)``.

    Args:
        config: the transformer configuration.
        norms: the sublayer's record: scale of the residual, norm of the output or of the sum. Dropout comes after a
            norm of the output, as in OLMo 2.
        drop_copies: this sublayer's output holds the last copy only (see ``phd_last_layer_pruning``), or shall from
            here on; the rows of the other copies leave the residual.
    """

    def __init__(self, config: PHDTransformerConfig, norms: SublayerNorm, drop_copies: bool) -> None:
        super().__init__()
        self.repeat = config.kv_policy.repeat if drop_copies else 1
        self.scale = norms.residual_scale
        self.norms_branch = norms.output_norm == "branch"
        self.output_norm: nn.Module | None = None
        if norms.output_norm is not None:
            norm = wide_norm(config)
            nn.init.constant_(norm.get_parameter("weight"), norms.output_norm_init)
            self.output_norm = norm

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Megatron-Core asks for the function first, then calls it."""

        def join(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            residual = last_copy(residual, self.repeat)
            if output.size(0) != residual.size(0):
                output = last_copy(output, self.repeat)
            if bias is not None:
                output = output + bias
            if self.norms_branch and self.output_norm is not None:
                output = self.output_norm(output)
            if dropout:
                output = F.dropout(output, dropout, training)
            joined = residual + output if self.scale == 1 else torch.add(output, residual, alpha=self.scale)
            return joined if self.output_norm is None or self.norms_branch else self.output_norm(joined)

        return join
