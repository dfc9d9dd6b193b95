"""Which experiment may start: runs share a GPU, and none is started that would make one not end in time.

The GPU does a certain number of FLOPs a second however many runs share it, once there are enough of them; each gets an
equal part. Both are measured while runs are at work, from the seconds that they log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """What a GPU does.

    Attributes:
        flops: a second, of all runs together.
        filled_by: so many runs fill it; fewer have the same part each and leave the rest.
        start_seconds: until a run's first step.
        margin: factor on times, for what is not known.
    """

    flops: float
    filled_by: int = 3
    start_seconds: float = 40.0
    margin: float = 1.1


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


def fits(running: Sequence[float], candidate: float, seconds_left: float, speed: Speed) -> bool:
    """Whether all that run and the candidate end in the time that is left; all in FLOPs."""
    last = max(end_times([*running, candidate], speed))
    return speed.margin * last + speed.start_seconds <= seconds_left


def choose(running: Sequence[float], candidates: Sequence[float], seconds_left: float, speed: Speed) -> int | None:
    """Index of the first candidate that fits; None when none does."""
    for index, candidate in enumerate(candidates):
        if fits(running, candidate, seconds_left, speed):
            return index
    return None
