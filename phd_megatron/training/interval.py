"""What is summed up from one row of metrics to the next, and the numbers that are made of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.planning.flops import attention_flops_at, forward_flops
from phd_megatron.planning.peak import peak_tflops
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.cuda_graph import Batch
from phd_megatron.training.metrics import StepMetrics, Value
from phd_megatron.training.state import TrainState


@dataclass
class Interval:
    """Sums since the last row, and a stopwatch that runs from its making on; nothing here waits for the device.

    Attributes:
        losses: of each step ``[2]`` on the device: summed loss and token count.
        microbatches: of each data-parallel rank.
        attention: operations of attention over this rank's tokens, where documents are kept apart.
    """

    losses: list[Tensor] = field(default_factory=list)
    samples: int = 0
    steps: int = 0
    microbatches: int = 0
    skipped: int = 0
    attention: int = 0
    _started: float = field(default_factory=lambda: time.perf_counter())

    @property
    def seconds(self) -> float:
        """Time so far, without the pauses."""
        return time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the stopwatch stands still: what is done there is no part of a training step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began

    def mean_losses(self) -> list[float]:
        """The mean loss of each step. Waits for the device."""
        return [total / tokens for total, tokens in (loss.tolist() for loss in self.losses)]


class Meter:
    """Makes rows of metrics of intervals.

    Args:
        run: the resolved configuration.
        state: whose counters and rate stand in the rows.
    """

    def __init__(self, run: RunConfig, runtime: Runtime, state: TrainState) -> None:
        self._run, self._runtime, self._state = run, runtime, state
        pruned = replace(run.model, phd_last_layer_pruning=state.model_config.phd_last_layer_pruning)
        forward = forward_flops(pruned, state.padded_vocab_size)
        self._flops = forward.training  # of one sample
        self._documents: DocumentMeter | None = None
        if run.data.reset_attention_mask:
            self._flops_of_rows = 3 * (forward.linear + forward.head)
            self._documents = DocumentMeter(pruned, runtime.device, run.data.reset_position_ids)
        self._peak = peak_tflops(run.logging.peak_tflops, runtime.device_name)

    def count(self, interval: Interval, batch: Batch) -> None:
        """Add what depends on where documents begin in a micro-batch of this rank."""
        if self._documents is not None:
            interval.attention += self._documents.flops(batch)

    def measure(
        self,
        interval: Interval,
        seconds: float,
        losses: list[float],
        grad_norm: float,
        validation_loss: float | None,
        observed: Mapping[str, Value],
    ) -> StepMetrics:
        """The row of an interval of ``seconds``; collective.

        Args:
            losses: :meth:`Interval.mean_losses`.
            grad_norm: of the last step.
            observed: what observers add.
        """
        model, counters = self._run.model, self._state.counters
        tokens_per_second = interval.samples * model.seq_length / seconds
        flops: float = self._flops * interval.samples
        if self._documents is not None:
            total, of_most = self._documents.of_all_ranks(interval.attention)
            flops = self._flops_of_rows * interval.samples + total
            observed = {**observed, "attention_max_over_mean": of_most}
        tflops = flops / seconds / self._runtime.world_size / 1e12
        return StepMetrics(
            iteration=counters.iteration,
            consumed_samples=counters.consumed_samples,
            consumed_tokens=counters.consumed_samples * model.seq_length,
            consumed_flops=float(counters.consumed_samples * self._flops),
            lm_loss=sum(losses) / len(losses),
            grad_norm=grad_norm,
            learning_rate=self._state.learning_rate,
            global_batch_size=interval.samples // interval.steps,
            iteration_seconds=seconds / interval.steps,
            tokens_per_second=tokens_per_second,
            processed_tokens_per_second=tokens_per_second * model.phd_repeat,
            tflops_per_gpu=tflops,
            mfu=None if self._peak is None else tflops / self._peak,
            skipped_iterations=interval.skipped,
            validation_loss=validation_loss,
            observed=observed,
        )


class DocumentMeter:
    """Counts attention's operations, forward and backward, over documents that are kept apart.

    Args:
        restart: the data's positions count from each document's start.
    """

    def __init__(self, model: ModelConfig, device: torch.device, restart: bool) -> None:
        original, hidden = attention_flops_at(model, torch.arange(model.seq_length))
        self._at = 3 * (original + hidden)
        self._device, self._restart = device, restart

    def flops(self, batch: Batch) -> int:
        """Of the tokens of a micro-batch on the host."""
        positions = batch["position_ids"] if self._restart else batch["position_ids"] - batch["document_starts"]
        return int(self._at[positions].sum())

    def of_all_ranks(self, own: int) -> tuple[float, float]:
        """The sum over all ranks that have tokens of their own, and how much more than the mean the busiest one has."""
        group = ProcessGroupCollection.use_mpu_process_groups().dp_cp
        total, most = (torch.tensor(float(own), dtype=torch.float64, device=self._device) for _ in range(2))
        dist.all_reduce(total, group=group)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        return float(total), float(most) * group.size() / float(total)
