"""Dense feed-forward network of a block, over tensor-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class PHDMLP(nn.Module):
    """Feed-forward network of a width, gated or plain."""

    def __init__(self, config: PreTrainedConfig, width: int, prefix: str) -> None:
        super().__init__()
        h, f, bias = config.hidden_size, width, config.mlp_bias
        self.gated = config.mlp_gated
        if self.gated:
            self.gate_up_proj = MergedColumnParallelLinear(h, [f, f], bias=bias, prefix=f"{prefix}.gate_up_proj")
        else:
            self.up_proj = ColumnParallelLinear(h, f, bias=bias, prefix=f"{prefix}.up_proj")
        self.down_proj = RowParallelLinear(f, h, bias=bias, prefix=f"{prefix}.down_proj")
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., h]`` to the same shape."""
        if self.gated:
            gate, up = self.gate_up_proj(hidden)[0].chunk(2, dim=-1)
            return self.down_proj(self.activation(gate) * up)[0]
        return self.down_proj(self.activation(self.up_proj(hidden)[0]))[0]
