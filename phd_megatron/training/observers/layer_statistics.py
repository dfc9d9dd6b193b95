"""Statistics by layer of one step (``--log-layer-statistics``): what layers do, and the norms of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from phd_megatron.model.layer_statistics import ATTENDED, LayerRecorder

STATISTICS = (
    "gradient_norm",
    "residual_rms",
    "cosine_similarity",
    "attention_entropy",
    "attention_entropy_share",
    "copy_cosine",
    *ATTENDED,
)


def is_due(every: int, iteration: int) -> bool:
    """Whether statistics are taken: in the first step of a run and every so many steps; never for 0."""
    return every > 0 and (iteration == 1 or iteration % every == 0)


class LayerStatistics:
    """Statistics of one step. Forward and backward run inside :meth:`watching`, then come the two other methods.

    Args:
        models: the wrapped model chunks of this rank.
        groups: of the run.
        length: original tokens of a sequence.
    """

    def __init__(self, models: Sequence[DistributedDataParallel], groups: Any, length: int) -> None:
        self._models, self._groups = models, groups
        self._recorder = LayerRecorder(models, groups, length)
        self._squares: dict[int, Tensor] = {}

    def watching(self) -> AbstractContextManager[None]:
        """Hooks are there inside."""
        return self._recorder.watching()

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Look at the gradients of the step, which must be final and not yet clipped."""
        layers = {parameter: layer.layer_number for layer in self._recorder.layers for parameter in layer.parameters()}
        for model in self._models:
            for parameter, gradient in own_gradients(model, self._groups):
                if (number := layers.get(parameter)) is not None:
                    square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
                    self._squares[number] = self._squares.get(number, 0) + square

    def collect(self, num_layers: int, loss_scale: float) -> dict[str, dict[int, float]]:
        """Each statistic by 1-based layer number, where the layer has it; collective, the same on all ranks.

        Args:
            num_layers: of the whole model.
            loss_scale: what the gradients are multiplied by (float16).
        """
        device = next(self._models[0].parameters()).device
        table = torch.zeros(num_layers, len(STATISTICS), dtype=torch.float64, device=device)
        known = torch.zeros_like(table)  # ranks that give a share
        for number, square in self._squares.items():
            table[number - 1, 0], known[number - 1, 0] = square, 1
        for number, values in self._recorder.activations().items():
            for name, value in values.items():
                column = STATISTICS.index(name)
                table[number - 1, column], known[number - 1, column] = value, 1
        both = torch.stack([table, known])
        torch.distributed.all_reduce(both)
        table, known = both
        table[:, 0] = table[:, 0].sqrt() / loss_scale
        found = {
            name: {number: value for number, (value, ranks) in enumerate(zip(*columns, strict=True), 1) if ranks}
            for name, *columns in zip(STATISTICS, table.T.tolist(), known.T.tolist(), strict=True)
        }
        return {name: values for name, values in found.items() if values}


def own_gradients(model: DistributedDataParallel, groups: Any) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Parameters with the flat part of their final gradient that no other rank gives: together, all ranks give all.

    With the distributed optimizer a rank has reduced its shard of each bucket alone; without it all data-parallel ranks
    have the whole gradient and the first gives it. Of a parameter that tensor-parallel ranks share the first gives it.
    """
    for buffer in model.buffers + model.expert_parallel_buffers:
        rank, size = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
        for parameter, (start, _, bucket_number) in buffer.param_index_map.items():
            is_expert = not getattr(parameter, "allreduce", True)
            tensor_group = groups.expt_tp if is_expert else groups.tp
            if not param_is_not_tensor_parallel_duplicate(parameter, tensor_group):
                continue
            gradient = parameter.main_grad.view(-1)
            if model.ddp_config.use_distributed_optimizer:
                bucket = buffer.buckets[bucket_number]
                shard = bucket.grad_data.numel() // size
                first = bucket.offset + rank * shard - start
                gradient = gradient[max(first, 0) : max(first + shard, 0)]
            elif rank > 0:
                continue
            yield parameter, gradient
