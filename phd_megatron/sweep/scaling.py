"""Scaling laws fitted to final losses: L(N) = E + A N^-alpha, and with budgets L(N, D) = E + A N^-alpha + B D^-beta.

N is active parameters without embeddings, D original tokens. Least squares on log L from several starts; intervals are
of the linearised fit with Student's t, so they are rough where few points decide. With fewer than four sizes E cannot
be told from the rest, and L(N) = A N^-alpha is fitted instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from scipy.optimize import OptimizeResult

CONFIDENCE = 0.95
_SIZES_FOR_OFFSET = 4


@dataclass(frozen=True)
class Estimate:
    """A fitted number and its confidence interval; None where the points do not determine one."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        formula: which law.
        estimates: E, A, alpha (B, beta) as far as the law has them.
        residuals: measured over fitted loss, minus one, in the order of the points.
        freedom: points minus parameters.
    """

    formula: str
    estimates: dict[str, Estimate]
    residuals: list[float]
    freedom: int

    def predict(self, n: float, d: float | None = None) -> float:
        """The law's loss."""
        value = {name: estimate.value for name, estimate in self.estimates.items()}
        loss = value.get("E", 0.0) + value["A"] * n ** -value["alpha"]
        if "B" in value and d is not None:
            loss += value["B"] * d ** -value["beta"]
        return float(loss)


def fit_law(sizes: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Fit | str:
    """Fit the law that the points allow.

    Returns:
        The fit, or in words why there is none.
    """
    different_sizes, different_tokens = len(set(sizes)), len(set(tokens))
    if different_sizes < 3:
        return f"{different_sizes} model size{'s' * (different_sizes != 1)}: a law needs three or more"
    if different_tokens > 1:
        if len(losses) < 6 or len(set(zip(sizes, tokens, strict=True))) < 6:
            return (
                f"{different_tokens} token budgets and {different_sizes} sizes in {len(losses)} points: L(N, D) has "
                "five parameters and needs six different points or more, and L(N) equal budgets"
            )
        return _fit("E + A N^-alpha + B D^-beta", sizes, tokens, losses, ["E", "A", "alpha", "B", "beta"])
    if different_sizes < _SIZES_FOR_OFFSET:
        return _fit("A N^-alpha", sizes, tokens, losses, ["A", "alpha"])
    return _fit("E + A N^-alpha", sizes, tokens, losses, ["E", "A", "alpha"])


def _fit(
    formula: str, sizes: Sequence[float], tokens: Sequence[float], losses: Sequence[float], names: list[str]
) -> Fit | str:
    import numpy as np
    from scipy.stats import t

    points = _Points.of(sizes, tokens, losses, names)
    best = points.fit()
    if best is None:
        return "the fit did not converge"
    freedom = len(losses) - len(names)
    half = _half_widths(best.jac, best.cost, freedom, float(t.ppf((1 + CONFIDENCE) / 2, freedom)) if freedom > 0 else 0)
    estimates = {}
    for index, name in enumerate(names):
        width = None if half is None else half[index]
        estimates[name] = points.estimate(name, best.x, width)
    residuals = np.exp(points.log_loss - points.log_law(best.x)) - 1
    return Fit(formula, estimates, [float(value) for value in residuals], freedom)


@dataclass(frozen=True)
class _Points:
    """What a law is fitted to. Parameters stand in the order of ``names``; amplitudes are given as logarithms.

    Sizes and budgets are about their middle: the amplitudes are then losses, and hardly hang together with the powers.
    """

    names: list[str]
    lowest: float
    log_loss: np.ndarray
    log_n: np.ndarray
    log_d: np.ndarray
    middle_n: float
    middle_d: float

    @classmethod
    def of(cls, sizes: Sequence[float], tokens: Sequence[float], losses: Sequence[float], names: list[str]) -> _Points:
        """Of measured numbers."""
        import numpy as np

        middle_n, middle_d = (float(np.exp(np.mean(np.log(np.asarray(values, float))))) for values in (sizes, tokens))
        log_n = np.log(np.asarray(sizes, dtype=float) / middle_n)
        log_d = np.log(np.asarray(tokens, dtype=float) / middle_d)
        log_loss = np.log(np.asarray(losses, dtype=float))
        return cls(names, float(np.min(losses)), log_loss, log_n, log_d, middle_n, middle_d)

    def log_law(self, parameters: np.ndarray) -> np.ndarray:
        """Logarithm of the law's losses. Amplitudes are given as logarithms, so they stay positive."""
        import numpy as np

        p = dict(zip(self.names, parameters, strict=True))
        terms = [p["A"] - p["alpha"] * self.log_n]
        if "E" in p:
            terms.append(np.full_like(self.log_n, p["E"]))
        if "B" in p:
            terms.append(p["B"] - p["beta"] * self.log_d)
        return np.logaddexp.reduce(terms, axis=0)

    def fit(self) -> OptimizeResult | None:
        """Least squares from several starts; None where none converges."""
        from scipy.optimize import least_squares

        low = self.lowest
        starts = {
            "E": [math.log(low * share) for share in (0.3, 0.6, 0.9)],
            "A": [math.log(low * share) for share in (0.1, 0.5)],
            "B": [math.log(low * share) for share in (0.1, 0.5)],
            "alpha": [0.1, 0.4],
            "beta": [0.1, 0.4],
        }
        best = None
        for start in itertools.product(*(starts[name] for name in self.names)):
            found = least_squares(
                lambda p: self.log_law(p) - self.log_loss, start, method="trf", x_scale="jac", max_nfev=2000
            )
            if found.success and (best is None or found.cost < best.cost):
                best = found
        return best

    def estimate(self, name: str, parameters: np.ndarray, width: float | None) -> Estimate:
        """A parameter as the law's formula has it, with its interval of half that width."""
        value = float(parameters[self.names.index(name)])
        interval = None if width is None else (value - width, value + width)
        if name in ("alpha", "beta"):
            return Estimate(value, interval)
        # A at the middle size is A0 = A middle^-alpha. Its interval is not carried over to A, which is N = 1.
        power, middle = {"E": (None, 1.0), "A": ("alpha", self.middle_n), "B": ("beta", self.middle_d)}[name]
        exponent = 0.0 if power is None else float(parameters[self.names.index(power)])
        ends = (math.exp(interval[0]), math.exp(interval[1])) if interval is not None and name == "E" else None
        return Estimate(math.exp(value) * middle**exponent, ends)


def _half_widths(jacobian: np.ndarray, cost: float, freedom: int, quantile: float) -> list[float] | None:
    """Half widths of the parameters' intervals; None when the points do not determine them."""
    import numpy as np

    if freedom < 1:
        return None
    information = jacobian.T @ jacobian
    if np.linalg.cond(information) > 1e12:
        return None
    covariance = np.linalg.inv(information) * (2 * cost / freedom)
    return [float(quantile * math.sqrt(max(0.0, value))) for value in np.diag(covariance)]
