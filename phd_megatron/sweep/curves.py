"""A run's loss over tokens, FLOPs and time, from its metrics file alone.

Tokens and FLOPs are the file's own counts. Time is the sum of the steps' seconds: training alone, without evaluation,
saving, starts and steps that a restart repeated.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phd_megatron.config.plain import Json
from phd_megatron.errors import UserError, shown
from phd_megatron.training.metrics_reader import Run, read_run

Axis = Literal["tokens", "flops", "seconds"]
AXES: dict[Axis, str] = {"tokens": "original tokens", "flops": "FLOPs", "seconds": "training seconds"}


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start; few values (below 50) stay as they are, lag would show."""
    weight = max(0.0, 1 - 50 / len(values)) if values else 0.0
    average, norm, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(average / norm)
    return result


@dataclass(frozen=True)
class Curve:
    """One run. ``loss`` is the training loss of each logged interval, ``smoothed`` its moving average (EMA)."""

    name: str
    tokens: list[float]
    flops: list[float]
    seconds: list[float]
    loss: list[float]
    smoothed: list[float]
    validation: list[tuple[int, float]]  #: (index of the step, loss)
    run: Run

    def along(self, axis: Axis) -> list[float]:
        """The values of one axis."""
        return {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}[axis]

    def end(self, axis: Axis) -> float:
        """Where the curve ends on an axis."""
        return self.along(axis)[-1]

    def at(self, axis: Axis, x: float) -> float | None:
        """The smoothed loss at ``x``, linear between steps; None outside the curve."""
        xs = self.along(axis)
        if not xs[0] <= x <= xs[-1]:
            return None
        right = bisect.bisect_left(xs, x)
        if xs[right] == x or right == 0:
            return self.smoothed[right]
        share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
        return (1 - share) * self.smoothed[right - 1] + share * self.smoothed[right]

    def reaches(self, axis: Axis, loss: float) -> float | None:
        """Where the smoothed loss first falls to ``loss``; None if it never does."""
        return next((x for x, value in zip(self.along(axis), self.smoothed, strict=True) if value <= loss), None)

    @property
    def diverged_at(self) -> int | None:
        """The iteration from which on no logged loss is finite; None for a run whose last one is."""
        first = None
        for step in reversed(self.run.steps):
            if math.isfinite(step["lm_loss"]):
                break
            first = step["iteration"]
        return first

    def final(self) -> tuple[float, str]:
        """The last validation loss, when it was taken at the end, else the smoothed training loss; and which it is."""
        if self.validation and self.validation[-1][0] == len(self.loss) - 1:
            return self.validation[-1][1], "validation"
        return self.smoothed[-1], "training (EMA)"


def read_curve(name: str, path: Path) -> Curve:
    """Read a metrics file. Steps whose loss is not finite are left out.

    Raises:
        UserError: when the file is missing or empty, or was written before files held tokens and FLOPs.
    """
    try:
        run = read_run(name, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a metrics file, or a directory with one") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if "consumed_flops" not in run.steps[-1]:
        raise UserError(
            f"{path} holds no consumed_tokens and consumed_flops: it was written by an older version; train again"
        )
    return curve_of(run, path)


def curve_of(run: Run, source: Path) -> Curve:
    """The same of steps that have been read; ``source`` names them in messages."""
    seconds, elapsed, previous = [], 0.0, 0
    steps = []
    for step in run.steps:
        _check_numbers(step, source)
        elapsed += step["iteration_seconds"] * (step["iteration"] - previous)
        previous = step["iteration"]
        if math.isfinite(step["lm_loss"]):
            steps.append(step)
            seconds.append(elapsed)
    if not steps:
        raise UserError(f"{source} holds no finite loss: the run diverged before its first line")
    loss = [step["lm_loss"] for step in steps]
    validation = [
        (index, step["validation_loss"])
        for index, step in enumerate(steps)
        if step.get("validation_loss") is not None and math.isfinite(step["validation_loss"])
    ]
    return Curve(
        name=run.name,
        tokens=[step["consumed_tokens"] for step in steps],
        flops=[step["consumed_flops"] for step in steps],
        seconds=seconds,
        loss=loss,
        smoothed=smooth(loss),
        validation=validation,
        run=run,
    )


def _check_numbers(step: Json, source: Path) -> None:
    for name in ("iteration", "iteration_seconds", "lm_loss", "consumed_tokens", "consumed_flops"):
        if isinstance(step.get(name), bool) or not isinstance(step.get(name), int | float):
            raise UserError(
                f"{source}, iteration {shown(step['iteration'])}: {name}={shown(step.get(name))} is no number; give a "
                "file that --metrics-file wrote, or train again"
            )


def common_end(axis: Axis, *curves: Curve) -> float:
    """The furthest point that all curves reach."""
    return min(curve.end(axis) for curve in curves)
