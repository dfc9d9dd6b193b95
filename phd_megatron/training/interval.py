"""What is summed up from one row of metrics to the next, and the numbers that are made of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from phd_megatron.config.schema import RunConfig
from phd_megatron.planning.flops import forward_flops
from phd_megatron.planning.peak import peak_tflops
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.metrics import StepMetrics, Value
from phd_megatron.training.state import TrainState


@dataclass
class Interval:
    """Sums since the last row, and a stopwatch that runs from its making on; nothing here waits for the device.

    Attributes:
        losses: of each step ``[2]`` on the device: summed loss and token count.
        microbatches: of each data-parallel rank.
    """

    losses: list[Tensor] = field(default_factory=list)
    samples: int = 0
    steps: int = 0
    microbatches: int = 0
    skipped: int = 0
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
        self._flops = forward_flops(pruned, state.padded_vocab_size).training  # of one sample
        self._peak = peak_tflops(run.logging.peak_tflops, runtime.device_name)

    def measure(
        self,
        interval: Interval,
        seconds: float,
        losses: list[float],
        grad_norm: float,
        validation_loss: float | None,
        observed: Mapping[str, Value],
    ) -> StepMetrics:
        """The row of an interval of ``seconds``.

        Args:
            losses: :meth:`Interval.mean_losses`.
            grad_norm: of the last step.
            observed: what observers add.
        """
        model, counters = self._run.model, self._state.counters
        tokens_per_second = interval.samples * model.seq_length / seconds
        tflops = self._flops * interval.samples / seconds / self._runtime.world_size / 1e12
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
