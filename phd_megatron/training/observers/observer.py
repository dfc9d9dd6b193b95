"""What an observer of training steps is, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from phd_megatron.config.schema import RunConfig
    from phd_megatron.runtime.context import Runtime
    from phd_megatron.training.interval import Interval
    from phd_megatron.training.metrics import Value
    from phd_megatron.training.state import TrainState


@dataclass
class Step:
    """One training step as observers see it.

    Attributes:
        iteration: the step's number in the run, from 1.
        microbatches: of this rank.
        state: what is trained; :attr:`iteration` is one of its counters when the update is done.
        groups: process groups of the run.
        interval: what is summed up for the next row of metrics, this step included when the update is done. Around what
            is no part of training its clock is to be :meth:`~phd_megatron.training.interval.Interval.paused`.
        log: prints a line on the main rank.
        watched: set in :meth:`Observer.around_step` where hooks on the model want to see this step, so that it is not
            replayed from a CUDA graph.
        reported: set by an observer that has something for the metrics, so that their row is written after this step.
    """

    iteration: int
    microbatches: int
    state: TrainState
    groups: ProcessGroupCollection
    interval: Interval
    log: Callable[[str], None]
    watched: bool = False
    reported: bool = False


class Observer:
    """Looks at the steps of a run without taking part in them. Every hook does nothing unless it is overridden.

    The hooks of a step come in the order in which they stand here, each for all observers in the order of
    :data:`~phd_megatron.training.observers.registry.OBSERVERS`. Every rank calls them, so they may be collective; an
    observer that only some ranks have (:meth:`of_run`) must not be.
    """

    @classmethod
    def of_run(cls, run: RunConfig, runtime: Runtime, first: int, last: int) -> Observer | None:
        """This rank's observer of a run, or ``None`` where there is nothing to look at; before the model is built.

        Args:
            run: the resolved configuration.
            first: step that this start begins with.
            last: step that it ends with.

        Raises:
            UserError: on every rank, for what the run asks and cannot be.
        """
        return cls()

    def around_step(self, step: Step) -> AbstractContextManager[None]:
        """Entered before the first micro-batch is read, left when the update is done."""
        return nullcontext()

    def on_gradients(self, step: Step) -> None:
        """Between backward and update: gradients are final, and not clipped yet."""

    def after_step(self, step: Step) -> None:
        """The step is done and counted."""

    def on_report(self, step: Step) -> Mapping[str, Value]:
        """A row of metrics is about to be written: what stands in it beside the others."""
        return {}

    def close(self) -> None:
        """The run has ended, maybe in the middle; no hook comes after this."""
