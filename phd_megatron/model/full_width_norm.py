"""QK norm over all heads at once (OLMo 2, OLMoE), where tensor-parallel ranks hold some heads each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from phd_megatron.norm.modules import mark, rms_norm

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch.distributed import ProcessGroup


class _SumOverRanks(torch.autograd.Function):
    """All-reduce, forward and backward: each rank's loss depends on the sum, so each rank's gradient adds to it."""

    group: ProcessGroup

    @staticmethod
    def forward(ctx: _SumOverRanks, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = part.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: _SumOverRanks, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


class FullWidthNorm(nn.Module):
    """RMSNorm or LayerNorm over ``[heads, head_dim]`` together, for a rank's share of the heads.

    The statistics are summed over the tensor-parallel ranks. The weight is sharded like the heads and its gradient is
    complete on each rank. With fewer (KV) heads than ranks, ranks share a head: the statistics then count each head
    equally often, and the weight is held whole by every rank, its gradient, of one head on each, to be summed (see
    :mod:`phd_megatron.model.gradients`).

    Args:
        config: of Megatron-Core; names the kind of norm, its epsilon and the parameters' type.
        heads: of the whole model.
        head_dim: size of one.
        tp_group: ranks that share them.
    """

    def __init__(self, config: TransformerConfig, heads: int, head_dim: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.centred = config.normalization == "LayerNorm"
        self.tp_group = tp_group
        ranks = tp_group.size()
        self.sharded = heads % ranks == 0
        size = heads * head_dim // (ranks if self.sharded else 1)
        start = 0 if self.sharded else tp_group.rank() * heads // ranks * head_dim
        self.place = slice(start, start + max(heads // ranks, 1) * head_dim)
        self.weight = nn.Parameter(torch.ones(size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(size, dtype=config.params_dtype)) if self.centred else None
        if not self.sharded:
            mark(self.parameters(), sum_gradient_over_tensor_parallel=True)
            return
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, states: Tensor) -> Tensor:
        """``[..., heads of this rank, head_dim]`` to the same."""
        flat = states.flatten(-2)
        weight, bias = (None if p is None else p[self.place] for p in (self.weight, self.bias))
        assert weight is not None
        if self.tp_group.size() > 1:
            normed = self._over_ranks(flat, weight, bias)
        elif self.centred:
            normed = F.layer_norm(flat, weight.shape, weight, bias, self.eps)
        else:
            normed = rms_norm(flat, weight, self.eps)
        return normed.view(states.shape)

    def _over_ranks(self, flat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        if self.centred:
            wide = wide - self._mean(wide)
        normed = (wide * (self._mean(wide.square()) + self.eps).rsqrt()).to(flat.dtype) * weight
        return normed if bias is None else normed + bias

    def _mean(self, values: Tensor) -> Tensor:
        total = _SumOverRanks.apply(values.sum(-1, keepdim=True), self.tp_group)
        return total / (values.size(-1) * self.tp_group.size())

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: Mapping[str, ProcessGroup] | None = None,
    ) -> ShardedStateDict:
        """Megatron-Core's protocol: the weight is cut along its only axis, or replicated."""
        assert metadata is not None
        axes = {"weight": 0, "bias": 0} if self.sharded else {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
