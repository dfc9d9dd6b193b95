"""Are two runs of one model the same run? Losses and gradient norms of every step, every gradient of the first."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.config.schema import RunConfig
from phd_megatron.training.observers.gradient_dump import load_gradients

STEPS = 3
METRICS = "metrics.jsonl"
GRADIENTS = "gradients"


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors, all of one number type; none is set per case.

    Attributes:
        value: of losses, gradient norms and gradients. A gradient's error is the Frobenius norm of the difference over
            max(norm of the reference, ``floor`` x global gradient norm).
    """

    name: str
    value: float
    floor: float


FLOAT32 = Tolerance("float32", 1e-5, 1e-6)
#: Transformer Engine's float32 products run in TF32, with 10 bits of mantissa
TF32 = Tolerance("TF32", 5e-3, 1e-3)
#: 8 bits of mantissa: sums over ranks round at other places
HALF = Tolerance("half precision", 3e-2, 1e-2)


def tolerance_of(config: RunConfig, transformer_engine: bool) -> Tolerance:
    """The tolerance of the types a run computes in."""
    if config.training.bf16 or config.training.fp16:
        return HALF
    return TF32 if transformer_engine else FLOAT32


@dataclass(frozen=True)
class Comparison:
    """Largest relative errors over the steps, and over the parameters."""

    loss: float
    grad_norm: float
    gradient: float
    parameter: str  #: the one with the largest error

    def within(self, tolerance: Tolerance) -> bool:
        """Whether every error is small enough."""
        return max(self.loss, self.grad_norm, self.gradient) <= tolerance.value


def compare(reference: Path, other: Path, tolerance: Tolerance) -> Comparison:
    """Compare what two runs left in their directories: ``metrics.jsonl`` and ``gradients/``.

    Raises:
        ValueError: when one of them has not written all steps or all of every parameter, or they have other parameters.
    """
    expected, found = _metrics(reference), _metrics(other)
    gradients, others = (load_gradients(path / GRADIENTS / "iter_0000001") for path in (reference, other))
    if gradients.keys() != others.keys():
        names = ", ".join(sorted(gradients.keys() ^ others.keys())[:3])
        raise ValueError(f"{reference} and {other} do not have the same parameters: {names}")
    floor = tolerance.floor * math.hypot(*(float(g.double().norm()) for g in gradients.values()))
    errors = {}
    for key, gradient in gradients.items():
        scale = max(float(gradient.double().norm()), floor)
        difference = float((others[key].double() - gradient.double()).norm())
        errors[key] = difference / scale if scale and math.isfinite(difference) else (math.inf if difference else 0.0)
    worst = max(errors, key=errors.__getitem__)
    return Comparison(
        loss=max(relative(one["lm_loss"], two["lm_loss"]) for one, two in zip(expected, found, strict=True)),
        grad_norm=max(relative(one["grad_norm"], two["grad_norm"]) for one, two in zip(expected, found, strict=True)),
        gradient=errors[worst],
        parameter=worst,
    )


def relative(expected: float, found: float) -> float:
    """Relative error of one number; infinite where only one of the two is finite."""
    if expected == found:
        return 0.0
    error = abs(found - expected) / max(abs(expected), 1e-30)
    return error if math.isfinite(error) else math.inf


def _metrics(directory: Path) -> list[dict[str, float]]:
    lines = (directory / METRICS).read_text(encoding="utf-8").splitlines()
    if len(lines) != STEPS:
        raise ValueError(f"{directory / METRICS} has {len(lines)} steps, not {STEPS}")
    return [json.loads(line) for line in lines]
