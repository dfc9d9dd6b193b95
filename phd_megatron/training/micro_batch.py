"""Micro-batches: how one goes through the model, and what an engine is given of a step's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee
from typing import TypeAlias

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from phd_megatron.training.cuda_graph import Batch

Loss: TypeAlias = "Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]"
"""Of a model's output: summed loss, token count, and both for the report."""


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batches of one step.

    Attributes:
        batches: at least ``count`` are in it.
        device: where they go.
        micro_batch_size: samples of one.
        rows: that travel between pipeline stages, of a sample: K times its tokens.
        by_copy: the model has kept its copies, and the report has a row for each.
    """

    batches: Iterator[Batch]
    count: int
    device: torch.device
    micro_batch_size: int
    rows: int
    by_copy: bool = False

    @property
    def forward_step(self) -> Callable[..., tuple[Tensor, Loss]]:
        """:func:`forward_step` of an iterator of micro-batches and a model."""
        return partial(forward_step, device=self.device, by_copy=self.by_copy)

    def with_batches(self, batches: Iterator[Batch]) -> MicroBatches:
        """The same of other tensors."""
        return replace(self, batches=batches)


def run_schedule(models: Sequence[torch.nn.Module], step: MicroBatches, *, forward_only: bool) -> list[Tensor]:
    """Megatron-Core's schedule: the report of each micro-batch, as :func:`summed_loss` makes it."""
    # Every chunk of an interleaved pipeline reads all micro-batches at its own pace.
    iterators = list(tee(step.batches, len(models)))
    reports: list[Tensor] = get_forward_backward_func()(
        forward_step_func=step.forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(models),
        num_microbatches=step.count,
        forward_only=forward_only,
        micro_batch_size=step.micro_batch_size,
        seq_length=step.rows,
    )
    return reports


def forward_step(
    batches: Iterator[Batch],
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
    *,
    device: torch.device,
    by_copy: bool = False,
) -> tuple[Tensor, Loss]:
    """One micro-batch forward; the schedule calls the returned loss function on the last stage.

    With ``return_schedule_plan`` nothing runs yet: a schedule that overlaps micro-batches runs what it gets in pieces.
    """
    whole = dict(next(batches))
    starts = whole.pop("document_starts", None)  # stays on the host, which says how attention is cut
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in whole.items()}
    run: Callable[..., Tensor] = model.build_schedule_plan if return_schedule_plan else model  # type: ignore[assignment]
    output = run(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=starts,
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
