"""One training step and one evaluation, whatever engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from phd_megatron.training.cuda_graph import Batch
from phd_megatron.training.engine import Engine
from phd_megatron.training.micro_batch import MicroBatches


@dataclass
class StepResult:
    """What a step leaves behind.

    Attributes:
        loss: ``[2]`` float64 on the device: summed loss and token count of the global batch, equal on all ranks.
        grad_norm: global norm before clipping.
        updated: false when the step was skipped: for gradients that are not finite (fp16 loss scaling, DeepSpeed), or
            too large (``grad_norm_skip_threshold``).
    """

    loss: Tensor
    grad_norm: float
    updated: bool


class Stepper:
    """Runs steps of one model over micro-batches.

    Args:
        engine: of the model. One whose chunks keep their copies can only evaluate.
        device: where batches go.
        micro_batch_size: samples per forward pass.
        seq_length: original tokens per sample.
        repeat: K; between pipeline stages travel ``K * seq_length`` rows.
    """

    def __init__(
        self, engine: Engine, device: torch.device, micro_batch_size: int, seq_length: int, repeat: int
    ) -> None:
        self.engine = engine
        self.device = device
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self._size, self._rows = micro_batch_size, repeat * seq_length
        self._by_copy = bool(engine.models[0].config.keep_copies)
        self.report_shape: tuple[int, ...] = (repeat, 2) if self._by_copy else (2,)

    def train(
        self,
        batches: Iterator[Batch],
        num_microbatches: int,
        on_gradients: Sequence[Callable[[], None]] = (),
        watched: bool = False,
    ) -> StepResult:
        """Forward, backward and update over one global batch.

        ``on_gradients`` are called between backward and update, when every gradient is final. ``watched``: hooks on the
        model want to see this step.

        Raises:
            ValueError: by an engine that only evaluates.
        """
        loss = self._sum(self.engine.forward_backward(self._micro_batches(batches, num_microbatches), watched))
        for look in on_gradients:
            look()
        updated, grad_norm = self.engine.update()
        return StepResult(loss, grad_norm, updated)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_batches: int, num_microbatches: int) -> Tensor:
        """``[2]``: summed loss and token count over ``num_batches`` global batches; of kept copies ``[K, 2]``."""
        total = torch.zeros(self.report_shape, dtype=torch.float64, device=self.device)
        with self.engine.evaluating():
            for _ in range(num_batches):
                total += self._sum(self.engine.forward(self._micro_batches(batches, num_microbatches)))
        return total

    def _micro_batches(self, batches: Iterator[Batch], count: int) -> MicroBatches:
        return MicroBatches(batches, count, self.device, self._size, self._rows, self._by_copy)

    def _sum(self, reports: Sequence[Tensor]) -> Tensor:
        """Of all ranks, on every rank."""
        total = torch.zeros(self.report_shape, dtype=torch.float64, device=self.device)
        for report in reports:  # empty on all but the last pipeline stage
            total += report
        torch.distributed.all_reduce(total, group=self.groups.dp_cp)
        pipeline = torch.distributed.get_process_group_ranks(self.groups.pp)
        torch.distributed.broadcast(total, src=pipeline[-1], group=self.groups.pp)
        return total
