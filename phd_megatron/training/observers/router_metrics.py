"""Router losses and the load of every expert, summed over all ranks, for the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from phd_megatron.config.moe import MoE, router_losses
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.model.moe import PHDRouter
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.metrics import Row, Value
from phd_megatron.training.observers.observer import Observer, Step


class RouterMetrics(Observer):
    """Adds what routers counted since the last row of metrics.

    Args:
        options: of the resolved run.
        ranks: data-parallel ones.
        device: of this rank.
    """

    def __init__(self, options: ModelConfig, ranks: int, device: torch.device) -> None:
        self._options, self._ranks, self._device = options, ranks, device

    @classmethod
    def of_run(cls, run: RunConfig, runtime: Runtime, first: int, last: int) -> RouterMetrics | None:
        """Only of a model with experts."""
        if MoE.from_model(run.model) is None:
            return None
        return cls(run.model, runtime.dims.dp, runtime.device)

    def on_report(self, step: Step) -> Mapping[str, Value]:
        """Collective."""
        microbatches = step.interval.microbatches * self._ranks
        return collect_router_metrics(step.state.models, self._options, microbatches, self._device)


@torch.no_grad()
def collect_router_metrics(
    models: Sequence[nn.Module], options: ModelConfig, num_microbatches: int, device: torch.device
) -> Row:
    """What the routers counted since the last call; collective, the same on all ranks.

    Args:
        models: the wrapped model chunks of this rank.
        options: of a resolved run.
        num_microbatches: over all data-parallel ranks, since the last call.

    Returns:
        Nothing for a dense model. Else each router loss (Megatron-Core's name; mean over micro-batches and layers,
        without its coefficient), ``max_expert_load`` (rows of the busiest expert of any layer over the layer's mean; 1
        is balance), ``tokens_per_expert`` (1-based layer number to the rows of each expert: processed tokens times
        topk, less what a capacity drops) and ``router_entropy`` (layer number to the mean over rows of
        :func:`~phd_megatron.model.moe.routing_entropy`, in nats).
    """
    moe = MoE.from_model(options)
    if moe is None:
        return {}
    names = router_losses(options)
    # One row a layer: losses, rows of each expert, sum of entropies and their number. Layers of other stages stay 0;
    # no two ranks count the same.
    last = len(names) + moe.experts
    table = torch.zeros(len(moe.layers), last + 2, dtype=torch.float64, device=device)
    for router in (module for model in models for module in model.modules() if isinstance(module, PHDRouter)):
        losses, load, entropy = router.take_statistics()
        row = table[router.layer_number - 1]
        for column, name in enumerate(names):
            if name in losses:
                row[column] = losses[name]
        row[len(names) : last] = load
        row[last:] = entropy
    torch.distributed.all_reduce(table)
    layers = [index for index, has_experts in enumerate(moe.layers) if has_experts]
    means = (table[layers, : len(names)].mean(dim=0) / num_microbatches).tolist()
    loads = table[layers, len(names) : last]
    entropies = (table[layers, last] / table[layers, last + 1].clamp(min=1)).tolist()
    imbalance = (loads.max(dim=1).values / loads.mean(dim=1).clamp(min=1)).max()
    return {
        **dict(zip(names, means, strict=True)),
        "max_expert_load": float(imbalance),
        "tokens_per_expert": {
            index + 1: list(map(int, load)) for index, load in zip(layers, loads.tolist(), strict=True)
        },
        "router_entropy": {index + 1: entropy for index, entropy in zip(layers, entropies, strict=True)},
    }
