"""What holds and updates the model of a rank: the one interface of the training loop, and the choice behind it.

Megatron-Core's engine has gradient buffers, pipeline schedules and the distributed optimizer; DeepSpeed's divides
states, gradients and parameters over data-parallel ranks, and moves them to the host (``--deepspeed``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from phd_megatron.config.schema import RunConfig
from phd_megatron.training.micro_batch import MicroBatches

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from phd_megatron.model.gpt_model import PHDGPTModel


class HasGroups(Protocol):
    """What a schedule of rates needs of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Options of parameters that are treated alike."""


class Engine(Protocol):
    """A model and what trains it. All of it is collective."""

    @property
    def models(self) -> Sequence[MegatronModule]:
        """The wrapped chunks of this rank, each with ``module`` and ``config``."""

    @property
    def optimizer(self) -> HasGroups:
        """Whose rates a schedule sets."""

    def forward_backward(self, step: MicroBatches, watched: bool) -> list[Tensor]:
        """Reports of the micro-batches of a step, from zeroed to final gradients.

        ``watched``: hooks on the model want to see it.
        """

    def update(self) -> tuple[bool, float]:
        """Clip and take the step: whether it was taken, and the gradient norm before clipping."""

    def forward(self, step: MicroBatches) -> list[Tensor]:
        """Reports of micro-batches, inside :meth:`evaluating`."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Around forward passes that train nothing."""

    def final_gradients(self) -> AbstractContextManager[Sequence[MegatronModule]]:
        """Between backward and update: chunks in the form of Megatron-Core's DDP, with every ``main_grad``."""

    def state(self, *, loading: bool) -> AbstractContextManager[tuple[Sequence[MegatronModule], MegatronOptimizer]]:
        """Chunks and optimizer in the form of Megatron-Core's, to be saved, or to be filled from a checkpoint."""

    def loss_scale(self) -> float:
        """What the loss of the next step, and its gradients with it, is multiplied by."""

    def let_go(self) -> None:
        """Free what the models hold; they cannot be used afterwards."""


def build_engine(
    models: Sequence[PHDGPTModel], run: RunConfig, device: torch.device, log: Callable[[str], None]
) -> Engine:
    """The engine that a run asks for.

    Args:
        models: bare chunks of this rank.
        log: says what is worth telling, once.

    Raises:
        UserError: the installed packages do not have it.
    """
    if run.parallel.deepspeed:
        from phd_megatron.training.zero_engine import ZeroEngine

        (model,) = models
        return ZeroEngine(model, run, device)
    from phd_megatron.training.megatron_engine import MegatronEngine

    return MegatronEngine.of_run(models, run, device, log)
