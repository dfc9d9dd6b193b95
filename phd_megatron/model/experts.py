"""The experts of a rank as two grouped products, with their weights stacked: nothing waits for the host.

In the place of Megatron-Core's ``SequentialMLP`` and ``TEGroupedMLP``. The three compute the same and their checkpoints
are the same, expert by expert: a weight here is cut into those of its experts when it is saved, and put together when
it is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from phd_megatron.kernels.grouped_mm import grouped_linear
from phd_megatron.kernels.swiglu import weighted_swiglu

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict
    from megatron.core.process_groups_config import ProcessGroupCollection

    from phd_megatron.model.transformer_config import PHDTransformerConfig

_OUT, _IN = 0, 1  #: axes of one expert's weight


class GroupedLinear(nn.Module):
    """One linear layer of all experts of a rank, without biases.

    Args:
        shape: ``[experts, out, in]`` of the weight.
        split: axis of an expert's weight that is divided over the tensor ranks of the experts, ``_OUT`` or ``_IN``.
        halves: the output is two branches, gate and up, each of which is divided.

    Attributes:
        weight: ``[experts, out, in]``.
    """

    def __init__(
        self, config: PHDTransformerConfig, shape: tuple[int, int, int], split: int, halves: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=config.device))
        self.split, self.halves = split, halves
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1 + split, stride=1)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """``[rows, in]``, sorted by expert, to ``[rows, out]``; see :func:`~phd_megatron.kernels.grouped_mm`."""
        return grouped_linear(rows, self.weight, ends)

    def sharded(
        self, key: str, offsets: tuple[tuple[int, int, int], ...], experts: StackedExperts
    ) -> ShardedTensorFactory:
        """The weight as it lies in checkpoints, one tensor an expert and branch.

        Args:
            key: name there.
            offsets: of axes before the experts'.
            experts: whose layer it is.
        """
        expert_group, tensor_group = experts.ep_group, experts.tp_group
        local, branches = self.weight.size(0), 2 if self.halves else 1
        first, total = expert_group.rank() * local, expert_group.size() * local
        prepended = len(offsets) + 1

        def cut(key: str, weight: Tensor, replica_id: ReplicaId, flattened: slice | None) -> list[ShardedTensor]:
            assert flattened is None, "no optimizer state is saved flattened"
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    branch,
                    *offsets,
                    (len(offsets), first + expert, total),
                    (
                        prepended + self.split,
                        tensor_group.rank() + number * tensor_group.size(),
                        tensor_group.size() * branches,
                    ),
                    replica_id=replica_id,
                    prepend_axis_num=prepended,
                )
                for expert in range(local)
                for number, branch in enumerate(weight[expert].chunk(branches, dim=_OUT))
            ]

        def join(parts: list[Tensor]) -> Tensor:
            shape = (local, branches * parts[0].size(_OUT), parts[0].size(_IN))
            return torch.stack(parts).view(shape)  # [experts * branches, out / branches, in]

        return ShardedTensorFactory(key, self.weight, cut, join, replica_id=(0, 0, experts.dp_group.rank()))


class StackedExperts(MegatronModule):
    """FFNs of the experts of a rank: SwiGLU or a plain activation, weighted by the router.

    Args:
        num_local_experts: of this rank.
        pg_collection: with ``ep``, ``expt_tp`` and ``expt_dp``.
        name: what Megatron-Core 0.18 and later call the module.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: PHDTransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        gated, width = config.gated_linear_unit, config.moe_ffn_hidden_size // self.tp_group.size()
        into, out_of = (width * (1 + gated), config.hidden_size), (config.hidden_size, width)
        self.linear_fc1 = GroupedLinear(config, (num_local_experts, *into), _OUT, halves=gated)
        self.linear_fc2 = GroupedLinear(config, (num_local_experts, *out_of), _IN)
        self.recompute = config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """``[rows, h]``, sorted by expert, to the same; and no bias.

        Args:
            tokens_per_expert: ``[experts]``, integers, on any device.
            weights: ``[rows]`` of the router.
        """
        ends = tokens_per_expert.to(rows.device, non_blocking=True).cumsum(0).to(torch.int32)
        hidden = self.linear_fc1(rows, ends)
        if not self.recompute:
            return self.linear_fc2(self._activate(hidden, weights), ends), None
        checkpoint = CheckpointWithoutOutput()
        activated = checkpoint.checkpoint(self._activate, hidden, weights)
        output = self.linear_fc2(activated, ends)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def _activate(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """``[rows, f]``, or ``[rows, 2f]`` with gates, to ``[rows, f]``."""
        if self.config.gated_linear_unit:
            return weighted_swiglu(hidden, weights)
        return (self.config.activation_func(hidden) * weights.unsqueeze(-1)).to(hidden.dtype)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Names and places of Megatron-Core's other experts."""
        layers = {"linear_fc1": self.linear_fc1, "linear_fc2": self.linear_fc2}
        return {
            f"{prefix}{name}.weight": layer.sharded(f"{prefix}experts.{name}.weight", sharded_offsets, self)
            for name, layer in layers.items()
        }
