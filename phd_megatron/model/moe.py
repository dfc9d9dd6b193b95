"""Mixture-of-experts layers: Megatron-Core's, with a router whose losses weigh the same for every layout and every K.

Rows that a router sees are *processed* tokens: K copies of every original one, except in a pruned last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from phd_megatron.model.experts import StackedExperts
from phd_megatron.model.routing_replay import choices_of
from phd_megatron.runtime.mcore_versions import submodules

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed import ProcessGroup

    from phd_megatron.model.transformer_config import PHDTransformerConfig

_COUNTERS = ("expert_bias", "local_tokens_per_expert", "global_tokens_per_expert", "ga_steps")


class PHDRouter(TopKRouter):
    """Megatron-Core's router, with its losses averaged over the micro-batches of a step and with statistics.

    The gradient is later divided by the original tokens of the global batch (``calculate_per_token_loss``), so each
    loss is multiplied by the original tokens it speaks of. Megatron-Core multiplies by the rows of this rank: K times
    too many for PHD, 1/TP and 1/CP of them where the sequence is split, and the sequence-level loss is left divided by
    ``micro_batch_size``.

    Statistics are added up in memory that stays where it is, so that a step as a CUDA graph counts too.

    Attributes:
        losses: name to sum since the last :meth:`take_statistics`, this rank's share, without the coefficient.
        load: ``[experts]`` rows computed by each expert since then, from this rank.
        entropy: ``[2]`` sum of :func:`routing_entropy` since then over this rank's rows, and their number.
    """

    def __init__(
        self, config: PHDTransformerConfig, pg_collection: ProcessGroupCollection | None = None, **further: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **further)
        self.router_replay = choices_of(self)
        self.losses: dict[str, Tensor] = {}
        self.load = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=config.device)
        self.entropy = torch.zeros(2, dtype=torch.float64, device=config.device)

    @property
    def copies(self) -> int:
        """Rows of this layer's FFN per original token."""
        pruned = self.layer_number == self.config.num_layers and self.config.phd_last_layer_pruning
        return 1 if pruned else self.config.kv_policy.repeat

    def take_statistics(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """``losses``, ``load`` and ``entropy``, which start afresh."""
        taken = {name: value.clone() for name, value in self.losses.items()}, self.load.clone(), self.entropy.clone()
        for value in (*self.losses.values(), self.load, self.entropy):
            value.zero_()
        return taken

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As Megatron-Core's, ``[s, b, experts]`` to twice ``[s*b, experts]``; counts what each expert gets."""
        probs, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            # Filled up to capacity, the map also holds rows that an expert computes for nothing.
            padded = self.config.moe_pad_expert_input_to_capacity
            rows = (routing_map & (probs > 0) if padded else routing_map).sum(dim=0)
            self.load += rows
            entropies = routing_entropy(logits.detach(), self.score_function)
            self.entropy[0] += entropies.sum(dtype=torch.float64)
            self.entropy[1] += entropies.numel()
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: ProcessGroup,
        *rest: Any,
        **further: Any,
    ) -> Tensor:
        """Add the gradient of ``aux_loss``, whose sum over ``reduce_group`` is the loss of the rows of that group.

        What else Megatron-Core hands over serves its own scaling and log, which this takes the place of.
        """
        return self._attach(activation, aux_loss, aux_loss_coeff, aux_loss_name, reduce_group)

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Add the gradient of the mean squared log-sum-exp (ST-MoE, Eq. 5) of ``[rows, experts]``."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not torch.is_grad_enabled():
            return logits
        share = z_loss_func(logits, coefficient / self.tp_cp_group.size())
        return self._attach(logits, share, coefficient, "z_loss", self.tp_cp_group)

    def _attach(self, activation: Tensor, loss: Tensor, coefficient: float, name: str, group: ProcessGroup) -> Tensor:
        originals = activation.shape[0] * group.size() / self.copies
        # A group that spans data-parallel ranks speaks of several micro-batches at once.
        microbatches = group.size() // self.tp_cp_group.size()
        value = loss.detach().double() / coefficient * microbatches
        if name not in self.losses:  # in a step before the one that a graph records
            self.losses[name] = torch.zeros_like(value)
        self.losses[name] += value
        return MoEAuxLossAutoScaler.apply(activation, loss * originals)

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the counters too: ``Float16Module`` makes them bfloat16, in which 256 + 1 is 256."""
        for name in _COUNTERS:
            counter = getattr(self, name, None)
            if counter is not None and counter.dtype != torch.float32:
                counter.data = counter.data.float()


def routing_entropy(logits: Tensor, score_function: str) -> Tensor:
    """Entropy in nats of each row's distribution over all experts, ``[..., experts]`` to ``[...]``.

    The distribution is the softmax, or the sigmoids over their sum; before any bias, top-k or group is applied.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_function == "softmax":
        return torch.special.entr(logits.softmax(-1)).sum(-1)
    scores = logits.sigmoid()
    return torch.special.entr(scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)).sum(-1)


def moe_spec(config: PHDTransformerConfig, activation: type | None) -> ModuleSpec:
    """Spec of an FFN with experts, in the place of a dense one.

    Args:
        activation: module of the gated activation, as in dense layers.
    """
    spec = get_moe_module_spec(
        use_te=config.transformer_engine,
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.experts_backend == "te",
    )
    parts = submodules(spec)
    parts.router = PHDRouter
    for experts in (parts.experts, parts.shared_experts):
        submodules(experts).activation_func = activation
    if config.experts_backend == "grouped_mm":
        parts.experts = StackedExperts
    return spec


def mark_expert_parameters(model: torch.nn.Module) -> None:
    """Reduce the gradients of experts over the ranks that hold the same expert, whatever the expert-parallel size.

    Megatron-Core marks them only when it is above 1; with TP above the experts' own tensor size they would then miss
    the tokens of the other tensor ranks. And checkpoints get the same optimizer groups for every size.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False
