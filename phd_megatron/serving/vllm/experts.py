"""Experts of an export in vLLM: its fused products, with the exported code's router."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import ReplicatedLinear

from phd_megatron.huggingface.installed import bundled
from phd_megatron.serving.vllm.feed_forward import PHDMLP

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class PHDExperts(nn.Module):
    """Mixture of experts, with shared experts where the model has them.

    Raises:
        ValueError: for experts that vLLM's fused products do not compute.
    """

    def __init__(self, config: PreTrainedConfig, prefix: str) -> None:
        super().__init__()
        if not config.mlp_gated or config.hidden_act != "silu" or config.mlp_bias:
            raise ValueError(
                f"experts with hidden_act={config.hidden_act!r}, mlp_gated={config.mlp_gated}, "
                f"mlp_bias={config.mlp_bias}: vLLM's fused experts are SwiGLU without biases; "
                "generate with transformers or phd-megatron serve"
            )
        self.gate = bundled("feed_forward_phd").PHDRouter(config)
        if (bias := self.gate.e_score_correction_bias) is not None:
            bias.data = bias.data.float()  # the model is made in its own type, and this is never rounded
        width = config.shared_expert_intermediate_size
        self.shared_experts = PHDMLP(config, width, f"{prefix}.shared_experts") if width else None
        self.shared_expert_gate: ReplicatedLinear | None = None
        if width and config.use_shared_expert_gate:
            name = f"{prefix}.shared_expert_gate"
            self.shared_expert_gate = ReplicatedLinear(config.hidden_size, 1, bias=False, prefix=name)
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size or config.intermediate_size,
            custom_routing_function=self._route,
            prefix=f"{prefix}.experts",
        )

    def _route(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        weights, chosen = self.gate(hidden_states)
        return weights.float(), chosen.to(torch.int32)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[T, copies, h]`` to the same shape."""
        rows = hidden.flatten(0, 1)
        # The router reads the rows themselves; vLLM wants logits of this shape and looks at nothing in them.
        output = self.experts(hidden_states=rows, router_logits=rows.new_zeros(rows.size(0), len(self.gate.weight)))
        if self.shared_experts is not None:
            shared = self.shared_experts(rows)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(rows)[0].sigmoid()
            output = output + shared
        return output.view_as(hidden)
