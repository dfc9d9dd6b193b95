"""Which experiment may start: runs share a GPU, and none is started that would make one not end in time.

The GPU does a certain number of FLOPs a second however many runs share it, once there are enough of them; each gets an
equal part. The number is measured while runs are at work, from the seconds that they log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Load:
    """What a run asks of the GPU: FLOPs that it has still to do, and bytes as long as it is at work."""

    flops: float
    memory: float = 0.0


@dataclass(frozen=True)
class Speed:
    """What a GPU gives.

    Attributes:
        flops: a second, of all runs together.
        memory: bytes, for all runs together.
        filled_by: so many runs fill it; fewer have the same part each and leave the rest.
        start_seconds: of a run, beside its steps: start, validation, end.
        margin: factor on times, for what is not known.
    """

    flops: float
    memory: float = float("inf")
    filled_by: float = 3.0
    start_seconds: float = 60.0
    margin: float = 1.1

    def seen(self, rates: Sequence[float], all_places: bool) -> Speed:
        """The same after runs at work did so many FLOPs a second each; ``all_places`` when no more can be at work."""
        together = sum(rates)
        if len(rates) >= self.filled_by or all_places:
            return replace(self, flops=together)
        flops = max(self.flops, together)
        return replace(self, flops=flops, filled_by=min(self.filled_by, flops * len(rates) / together))


def end_times(work: Sequence[float], speed: Speed) -> list[float]:
    """Seconds from now to the end of each run, given the FLOPs that each has left, when no other is started."""
    ends = [0.0] * len(work)
    order = sorted(range(len(work)), key=lambda index: work[index])
    now = done = 0.0
    for place, index in enumerate(order):
        share = speed.flops / max(len(order) - place, speed.filled_by)
        now += (work[index] - done) / share
        done = work[index]
        ends[index] = now
    return ends


def fits(running: Sequence[Load], candidate: Load, seconds_left: float, speed: Speed) -> bool:
    """Whether all that run and the candidate have room, and end in the time that is left."""
    together = [*running, candidate]
    if sum(load.memory for load in together) > speed.memory:
        return False
    last = max(end_times([load.flops for load in together], speed))
    return speed.margin * last + speed.start_seconds <= seconds_left


def choose(running: Sequence[Load], candidates: Sequence[Load], seconds_left: float, speed: Speed) -> int | None:
    """Index of the first candidate that fits; None when none does."""
    for index, candidate in enumerate(candidates):
        if fits(running, candidate, seconds_left, speed):
            return index
    return None
