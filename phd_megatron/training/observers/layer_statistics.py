"""Statistics by layer of one step (``--log-layer-statistics``): what layers do, and the norms of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from phd_megatron.config.schema import RunConfig
from phd_megatron.model.layer_statistics import ATTENDED, LayerRecorder
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.metrics import Value
from phd_megatron.training.observers.observer import Observer, Step

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


class LayerStatisticsObserver(Observer):
    """Takes the statistics of the first step of a run and of every so many; each has a row of metrics.

    Args:
        every: so many steps.
        length: original tokens of a sequence.
    """

    def __init__(self, every: int, length: int) -> None:
        self._every, self._length = every, length
        self._taking: LayerStatistics | None = None
        self._found: dict[str, dict[int, float]] = {}

    @classmethod
    def of_run(cls, run: RunConfig, runtime: Runtime, first: int, last: int) -> LayerStatisticsObserver | None:
        """Only where statistics are asked for."""
        every = run.logging.log_layer_statistics
        return cls(every, run.model.seq_length) if every else None

    @contextmanager
    def around_step(self, step: Step) -> Iterator[None]:
        """With hooks on the model; collective."""
        if not is_due(self._every, step.iteration):
            yield
            return
        models = step.state.models
        scale = step.state.loss_scale  # of this step; the optimizer may change it
        step.watched = True
        self._taking = LayerStatistics(models, step.groups, self._length)
        with self._taking.watching():
            yield
        self._found = self._taking.collect(step.state.model_config.num_layers, scale)
        self._taking, step.reported = None, bool(self._found)

    def on_gradients(self, step: Step) -> None:
        """Their norms."""
        if self._taking is not None:
            with step.state.engine.final_gradients():
                self._taking.take_gradients()

    def on_report(self, step: Step) -> Mapping[str, Value]:
        """The statistics of this step, by name and layer number."""
        found, self._found = self._found, {}
        return {"layer_statistics": found} if found else {}


class LayerStatistics:
    """Statistics of one step. Forward and backward run inside :meth:`watching`, then come the two other methods.

    Args:
        models: the wrapped model chunks of this rank.
        groups: of the run.
        length: original tokens of a sequence.
    """

    def __init__(self, models: Sequence[DistributedDataParallel], groups: ProcessGroupCollection, length: int) -> None:
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


def own_gradients(
    model: DistributedDataParallel, groups: ProcessGroupCollection
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
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
