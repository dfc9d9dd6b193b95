"""One training step and one evaluation, through Megatron-Core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import tee

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from phd_megatron.checkpoint.state import whole_parameters
from phd_megatron.training.cuda_graph import Batch, StepGraph


@dataclass
class StepResult:
    """What a step leaves behind.

    Attributes:
        loss: ``[2]`` float64 on the device: summed loss and token count of the global batch, equal on all ranks.
        grad_norm: global norm before clipping.
        updated: false when the step was skipped: for gradients that are not finite (fp16 loss scaling), or too large
            (``grad_norm_skip_threshold``).
    """

    loss: Tensor
    grad_norm: float
    updated: bool


class Stepper:
    """Runs steps of one model over micro-batches.

    Args:
        models: the wrapped model chunks of this rank. Those that keep their copies can only be evaluated.
        optimizer: ``None`` for evaluation only.
        device: where batches go.
        micro_batch_size: samples per forward pass.
        seq_length: original tokens per sample.
        repeat: K; between pipeline stages travel ``K * seq_length`` rows.
        graph: of the forward and backward of training steps, where the run asks for one.
    """

    def __init__(
        self,
        models: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        device: torch.device,
        micro_batch_size: int,
        seq_length: int,
        repeat: int,
        graph: StepGraph | None = None,
    ) -> None:
        self.models = list(models)
        self.optimizer = optimizer
        self.device = device
        self.graph = graph
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.shape = {"micro_batch_size": micro_batch_size, "seq_length": repeat * seq_length}
        self.by_copy = bool(self.models[0].config.keep_copies)
        self.report_shape: tuple[int, ...] = (repeat, 2) if self.by_copy else (2,)

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
            ValueError: without an optimizer.
        """
        if self.optimizer is None:
            raise ValueError("this stepper has no optimizer, so it only evaluates")
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._run(batches, num_microbatches, forward_only=False, watched=watched)
        for look in on_gradients:
            look()
        updated, grad_norm, _ = self.optimizer.step()
        return StepResult(loss, float(grad_norm or 0.0), bool(updated))

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_batches: int, num_microbatches: int) -> Tensor:
        """``[2]``: summed loss and token count over ``num_batches`` global batches; of kept copies ``[K, 2]``."""
        for model in self.models:
            model.eval()
        total = torch.zeros(self.report_shape, dtype=torch.float64, device=self.device)
        with whole_parameters(self.models), self.graph.outside() if self.graph is not None else nullcontext():
            for _ in range(num_batches):
                total += self._run(batches, num_microbatches, forward_only=True)
        for model in self.models:
            model.train()
        return total

    def _run(
        self, batches: Iterator[Batch], num_microbatches: int, forward_only: bool, watched: bool = False
    ) -> Tensor:
        run = partial(self._schedule, num_microbatches=num_microbatches, forward_only=forward_only)
        if forward_only or self.graph is None:
            reports = run(batches)
        else:
            reports = self.graph(run, batches, num_microbatches, watched)
        total = torch.zeros(self.report_shape, dtype=torch.float64, device=self.device)
        for report in reports:  # empty on all but the last pipeline stage
            total += report
        torch.distributed.all_reduce(total, group=self.groups.dp_cp)
        pipeline = torch.distributed.get_process_group_ranks(self.groups.pp)
        torch.distributed.broadcast(total, src=pipeline[-1], group=self.groups.pp)
        return total

    def _schedule(self, batches: Iterator[Batch], num_microbatches: int, forward_only: bool) -> list[Tensor]:
        """Megatron-Core's schedule: the report of each micro-batch, as :func:`summed_loss` makes it."""
        # Every chunk of an interleaved pipeline reads all micro-batches at its own pace.
        iterators = list(tee(batches, len(self.models)))
        reports: list[Tensor] = get_forward_backward_func()(
            forward_step_func=partial(forward_step, device=self.device, by_copy=self.by_copy),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models,
            num_microbatches=num_microbatches,
            forward_only=forward_only,
            **self.shape,
        )
        return reports


def forward_step(
    batches: Iterator[Batch],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
    *,
    device: torch.device,
    by_copy: bool = False,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """One micro-batch forward; the schedule calls the returned loss function on the last stage.

    With ``return_schedule_plan`` nothing runs yet: a schedule that overlaps micro-batches runs what it gets in pieces.
    """
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    run: Callable[..., Tensor] = model.build_schedule_plan if return_schedule_plan else model  # type: ignore[assignment]
    output = run(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
    )
    return output, partial(summed_loss_by_copy if by_copy else summed_loss, loss_mask=batch["loss_mask"])


def summed_loss(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masked sum of ``losses`` ``[b, s]``, token count, and both for the report.

    Megatron-Core divides the gradient by the token count of the global batch, so no average is formed here.
    """
    loss = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    return loss, num_tokens.clone(), torch.stack([loss.detach().double(), num_tokens.double()])


def summed_loss_by_copy(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`summed_loss` of the last copy of ``losses`` ``[K, b, s]``; the report ``[K, 2]`` has a row a copy."""
    copies = [summed_loss(copy, loss_mask) for copy in losses]
    loss, num_tokens, _ = copies[-1]
    return loss, num_tokens, torch.stack([report for _, _, report in copies])
