"""Where a run is, and what is summed up since its last log line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run is. Saved with every checkpoint; data order follows from ``consumed_samples`` alone."""

    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    # what :class:`~phd_megatron.training.schedule.Position` reads
    first_batch_size: int | None = None
    counted_in: str | None = None
    schedule_total: int | None = None


@dataclass
class Interval:
    """Sums since the last log line; nothing here waits for the device."""

    started: float
    losses: list[Any] = field(default_factory=list)
    samples: int = 0
    steps: int = 0
    microbatches: int = 0  #: of each data-parallel rank
    skipped: int = 0
    layer_statistics: dict[str, dict[int, float]] = field(default_factory=dict)  #: of the step that ends the interval
