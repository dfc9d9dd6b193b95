"""Megatron-Core's engine: DDP with its gradient buffers, pipeline schedules, and the (distributed) optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from phd_megatron.checkpoint.state import whole_parameters
from phd_megatron.config.schema import RunConfig
from phd_megatron.model.gpt_model import PHDGPTModel
from phd_megatron.training.cuda_graph import StepGraph
from phd_megatron.training.micro_batch import MicroBatches, run_schedule
from phd_megatron.training.optimizer import build_optimizer, let_go, wrap_data_parallel


class MegatronEngine:
    """See :class:`~phd_megatron.training.engine.Engine`.

    Args:
        models: wrapped chunks of this rank.
        optimizer: None for one that only evaluates.
        graph: of the forward and backward of training steps, where the run asks for one.
    """

    def __init__(
        self,
        models: Sequence[MegatronModule],
        optimizer: MegatronOptimizer | None = None,
        graph: StepGraph | None = None,
    ) -> None:
        self.models, self.graph, self._optimizer = list(models), graph, optimizer

    @classmethod
    def of_run(
        cls, models: Sequence[PHDGPTModel], run: RunConfig, device: torch.device, log: Callable[[str], None]
    ) -> MegatronEngine:
        """Of bare chunks.

        Raises:
            UserError: the installed packages do not have the optimizer.
        """
        wrapped = wrap_data_parallel(models, run)
        try:
            return cls(wrapped, build_optimizer(wrapped, run), StepGraph.of_run(run, wrapped, device, log))
        except BaseException:
            let_go(wrapped)
            raise

    @property
    def optimizer(self) -> MegatronOptimizer:
        """Whose rates a schedule sets."""
        if self._optimizer is None:
            raise ValueError("this engine has no optimizer, so it only evaluates")
        return self._optimizer

    def forward_backward(self, step: MicroBatches, watched: bool) -> list[Tensor]:
        """Reports of the micro-batches, through Megatron-Core's schedule or a graph of it."""
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.graph is None:
            return run_schedule(self.models, step, forward_only=False)

        def run(batches: Iterator[dict[str, Tensor]]) -> list[Tensor]:
            return run_schedule(self.models, step.with_batches(batches), forward_only=False)

        return self.graph(run, step.batches, step.count, watched)

    def update(self) -> tuple[bool, float]:
        """Clip and take the step."""
        updated, grad_norm, _ = self.optimizer.step()
        return bool(updated), float(grad_norm or 0.0)

    def forward(self, step: MicroBatches) -> list[Tensor]:
        """Reports of micro-batches."""
        return run_schedule(self.models, step, forward_only=True)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Whole parameters, and no graph."""
        for model in self.models:
            model.eval()
        with whole_parameters(self.models), self.graph.outside() if self.graph is not None else nullcontext():
            yield
        for model in self.models:
            model.train()

    @contextmanager
    def final_gradients(self) -> Iterator[Sequence[MegatronModule]]:
        """As they are."""
        yield self.models

    @contextmanager
    def state(self, *, loading: bool) -> Iterator[tuple[Sequence[MegatronModule], MegatronOptimizer]]:
        """As they are."""
        yield self.models, self.optimizer

    def loss_scale(self) -> float:
        """Of float16."""
        return float(self.optimizer.get_loss_scale())

    def let_go(self) -> None:
        """Free what the wrappers hold."""
        let_go(self.models)
