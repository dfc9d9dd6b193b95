"""Feed-forward networks of a block: dense, or a mixture of experts with Megatron-Core's routing.

Nothing is dropped, whatever capacity a training run had. Shapes: ``rows`` of hidden size ``h``, ``e`` experts of which
``k`` compute a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_phd import PHDConfig


class PHDMLP(nn.Module):
    """Gated or plain feed-forward network of a given width."""

    def __init__(self, config: PHDConfig, width: int):
        super().__init__()
        sizes, bias = (config.hidden_size, width), config.mlp_bias
        self.gate_proj = nn.Linear(*sizes, bias=bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class PHDRouter(nn.Module):
    """Chooses the experts of every row, and their weights."""

    def __init__(self, config: PHDConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts) if config.use_expert_bias else None
        self.e_score_correction_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[rows, h]`` to weights and numbers of the chosen experts, both ``[rows, k]``."""
        config = self.config
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(config.router_dtype or "", rows.dtype)
        logits = F.linear(rows.to(dtype), self.weight.to(dtype))
        if config.scoring_func == "sigmoid":
            scores = logits.float().sigmoid().to(dtype)
            biased = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
            chosen = self._choose(biased)
            weights = scores.gather(1, chosen)
            if config.num_experts_per_tok > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        elif config.norm_topk_prob:  # softmax over the chosen ones
            chosen = self._choose(logits)
            weights = logits.gather(1, chosen).softmax(dim=-1, dtype=torch.float32).to(dtype)
        else:
            scores = logits.softmax(dim=-1, dtype=torch.float32).to(dtype)
            chosen = self._choose(scores)
            weights = scores.gather(1, chosen)
        return weights * config.routed_scaling_factor, chosen

    def _choose(self, scores: Tensor) -> Tensor:
        """The best ``k`` experts ``[rows, k]``, of the best groups where experts are grouped."""
        topk, groups = self.config.num_experts_per_tok, self.config.n_group
        kept = self.config.topk_group
        if groups and kept:
            grouped = scores.unflatten(1, (groups, -1))  # [rows, groups, e / groups]
            best = grouped.topk(topk // kept, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
            out = torch.ones(scores.size(0), groups, dtype=torch.bool, device=scores.device).scatter(1, best, False)
            scores = grouped.masked_fill(out[:, :, None], float("-inf")).flatten(1)
        return scores.topk(topk, dim=-1).indices


class PHDExperts(nn.Module):
    """Mixture of experts, with shared experts that compute every row where the model has them."""

    def __init__(self, config: PHDConfig):
        super().__init__()
        self.gate = PHDRouter(config)
        width = config.moe_intermediate_size or config.intermediate_size
        self.experts = nn.ModuleList(PHDMLP(config, width) for _ in range(config.num_experts))
        width = config.shared_expert_intermediate_size
        self.shared_experts = PHDMLP(config, width) if width else None
        has_gate = bool(width) and config.use_shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if has_gate else None

    def forward(self, hidden: Tensor) -> Tensor:
        """``[b, rows, h]`` to the same shape."""
        rows = hidden.flatten(0, 1)
        weights, chosen = self.gate(rows)
        traced = torch.compiler.is_compiling()
        output = (self._all if traced else self._chosen)(rows, weights, chosen)
        if self.shared_experts is not None:
            shared = self.shared_experts(rows)
            output = output + (
                shared if self.shared_expert_gate is None else shared * self.shared_expert_gate(rows).sigmoid()
            )
        return output.view_as(hidden)

    def _chosen(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """``[rows, h]``: each expert computes the rows that chose it."""
        output = torch.zeros_like(rows)
        for number in chosen.unique().tolist():  # experts that have rows
            row, place = torch.where(chosen == number)
            output.index_add_(0, row, (self.experts[number](rows[row]) * weights[row, place, None]).to(rows.dtype))
        return output

    def _all(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The same for a graph, in which no size may depend on what was chosen: each expert computes all rows.

        Those that did not choose it are zeros to it, so that it cannot overflow on them.
        """
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            chose = chosen == number
            weight = torch.where(chose, weights, 0).sum(1, keepdim=True)
            its_rows = torch.where(chose.any(1, keepdim=True), rows, 0)
            output = output + (expert(its_rows) * weight).to(rows.dtype)
        return output
