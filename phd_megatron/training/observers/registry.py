"""All observers of training steps: a new one is a file and a row here."""

from __future__ import annotations

from phd_megatron.config.schema import RunConfig
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.observers.exchange_report import ExchangeReport
from phd_megatron.training.observers.gradient_dump import GradientDump
from phd_megatron.training.observers.layer_statistics import LayerStatisticsObserver
from phd_megatron.training.observers.observer import Observer
from phd_megatron.training.observers.profiler import StepProfiler
from phd_megatron.training.observers.router_metrics import RouterMetrics

#: In the order in which their hooks are called; the first is around all others, which its trace then shows.
OBSERVERS: list[type[Observer]] = [
    StepProfiler,
    GradientDump,
    LayerStatisticsObserver,
    RouterMetrics,
    ExchangeReport,
]


def observers_of(run: RunConfig, runtime: Runtime, first: int, last: int) -> list[Observer]:
    """This rank's observers of a run; the arguments are those of :meth:`Observer.of_run`."""
    found = (kind.of_run(run, runtime, first, last) for kind in OBSERVERS)
    return [observer for observer in found if observer is not None]
