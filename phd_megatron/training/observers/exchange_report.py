"""What context-parallel ranks send each other in a step, counted in the first one."""

from __future__ import annotations

from phd_megatron.config.schema import RunConfig
from phd_megatron.model.attention import context_parallel_bytes
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.observers.observer import Observer, Step


class ExchangeReport(Observer):
    """Says once how many bytes a micro-batch sent in each layer.

    Args:
        first: the step that is counted, the first of this start.
    """

    def __init__(self, first: int) -> None:
        self._first = first

    @classmethod
    def of_run(cls, run: RunConfig, runtime: Runtime, first: int, last: int) -> ExchangeReport | None:
        """Only where there are context-parallel ranks."""
        return cls(first) if runtime.dims.cp > 1 else None

    def after_step(self, step: Step) -> None:
        """Print the counts, a line a layer."""
        if step.iteration != self._first:
            return
        for layer, sent in context_parallel_bytes(step.state.models).items():
            kinds = ", ".join(f"{kind} {count // step.microbatches}" for kind, count in sent.items() if count)
            step.log(f"context parallelism: bytes sent in layer {layer} per micro-batch: {kinds}")
