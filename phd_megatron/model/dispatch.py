"""From rows in the order of tokens to rows in the order of experts and back, without waiting for the host.

Megatron-Core's dispatchers read on the host how many rows an expert gets, with one GPU too, and its permutation does so
again. Where nothing is dropped and nothing padded, that number is known for all experts together: tokens times
``moe_router_topk``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from torch import Tensor

from phd_megatron.config.moe import UNCOUNTED
from phd_megatron.kernels.moe_permute import Order, order_by_expert, permute, permute_weights, unpermute

if TYPE_CHECKING:
    from phd_megatron.model.transformer_config import PHDTransformerConfig


class LocalDispatcher(MoETokenDispatcher):
    """All experts of a layer are on this rank, whole: rows are sorted, and nothing is sent."""

    def __init__(self, config: PHDTransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self._shape = torch.Size()
        self._order: Order | None = None

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """``[s, b, h]`` and twice ``[s*b, experts]`` to rows ``[s*b*topk, h]`` and their weights."""
        self._shape = tokens.shape
        self._order = order_by_expert(routing_map, self.config.moe_router_topk)
        return permute(tokens.reshape(-1, tokens.size(-1)), self._order), permute_weights(probs, self._order)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, rows of each expert (on the device), weights."""
        assert self._order is not None
        return hidden_states, self._order.counts, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """As it is."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """As it is."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """``[s*b*topk, h]`` to ``[s, b, h]``, the sum over the experts of a token."""
        assert self._order is not None
        order, self._order = self._order, None
        return unpermute(hidden_states, order).view(self._shape)


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-Core's, whose first and last permutation do not wait.

    What is left is its one copy of the splits to the host, which it starts before the first permutation on a stream of
    its own, and for which it waits before the rows are sent.
    """

    _order: Order | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """``[s, b, h]`` and twice ``[s*b, experts]`` to rows ``[s*b*topk, h]`` by expert, and their weights."""
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self._order = order_by_expert(routing_map, self.config.moe_router_topk)
        rows = permute(hidden_states.reshape(-1, hidden_states.size(-1)), self._order)
        return rows, permute_weights(probs, self._order)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """``[s*b*topk, h]`` to ``[s, b, h]``, the sum over the experts of a token, and the shared ones."""
        shared = self.shared_experts
        if shared is not None and shared.cached_fc2_input is not None:  # later Megatron-Cores have computed it by now
            shared.linear_fc2_forward(permutated_local_input_tokens)
            shared.post_forward_comm()
        order, self._order = self._order, None
        assert order is not None
        output = unpermute(permutated_local_input_tokens, order).view(self.hidden_shape)
        return output if shared is None else output + shared.get_output()


def replace_dispatchers(model: torch.nn.Module) -> None:
    """Give each layer with experts the dispatcher here that does what its own does, if there is one.

    Experts that are computed one after another keep Megatron-Core's own, and so does what :data:`UNCOUNTED` names.
    """
    for layer in model.modules():
        if isinstance(layer, MoELayer) and layer.config.experts_backend != "sequential":
            layer.token_dispatcher = _equal_dispatcher(layer)


def _equal_dispatcher(layer: MoELayer) -> MoETokenDispatcher:
    own, config = layer.token_dispatcher, layer.config
    uncounted = {name for name in UNCOUNTED if getattr(config, name)}
    groups = ProcessGroupCollection(ep=own.ep_group, expt_tp=own.tp_group, tp_ep=own.tp_ep_group)
    if own.ep_size == own.tp_size == 1:
        return own if uncounted else LocalDispatcher(config, groups)
    if uncounted - {"moe_shared_expert_overlap"} or not isinstance(own, MoEAlltoAllTokenDispatcher):
        return own
    found = AllToAllDispatcher(layer.num_local_experts, layer.local_expert_indices, config, groups)
    if own.shared_experts is not None:
        found.set_shared_experts(own.shared_experts)
    return found
