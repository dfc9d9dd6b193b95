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
from typing import Any

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
    from scipy.optimize import least_squares
    from scipy.stats import t

    log_loss = np.log(np.asarray(losses, dtype=float))
    # Sizes and budgets about their middle: the amplitudes are then losses, and hardly hang together with the powers.
    middle_n, middle_d = (float(np.exp(np.mean(np.log(np.asarray(values, float))))) for values in (sizes, tokens))
    log_n = np.log(np.asarray(sizes, dtype=float) / middle_n)
    log_d = np.log(np.asarray(tokens, dtype=float) / middle_d)

    def log_law(parameters: Any) -> Any:
        """Amplitudes are given as logarithms, so they stay positive."""
        p = dict(zip(names, parameters, strict=True))
        terms = [p["A"] - p["alpha"] * log_n]
        if "E" in p:
            terms.append(np.full_like(log_n, p["E"]))
        if "B" in p:
            terms.append(p["B"] - p["beta"] * log_d)
        return np.logaddexp.reduce(terms, axis=0)

    low = float(np.min(losses))
    starts = {
        "E": [math.log(low * share) for share in (0.3, 0.6, 0.9)],
        "A": [math.log(low * share) for share in (0.1, 0.5)],
        "B": [math.log(low * share) for share in (0.1, 0.5)],
        "alpha": [0.1, 0.4],
        "beta": [0.1, 0.4],
    }
    best = None
    for start in itertools.product(*(starts[name] for name in names)):
        found = least_squares(lambda p: log_law(p) - log_loss, start, method="trf", x_scale="jac", max_nfev=2000)
        if found.success and (best is None or found.cost < best.cost):
            best = found
    if best is None:
        return "the fit did not converge"
    freedom = len(losses) - len(names)
    half = _half_widths(best.jac, best.cost, freedom, float(t.ppf((1 + CONFIDENCE) / 2, freedom)) if freedom > 0 else 0)
    estimates = {}
    for index, name in enumerate(names):
        value, width = float(best.x[index]), None if half is None else half[index]
        interval = None if width is None else (value - width, value + width)
        if name in ("alpha", "beta"):
            estimates[name] = Estimate(value, interval)
            continue
        # A at the middle size is A0 = A middle^-alpha. Its interval is not carried over to A, which is N = 1.
        power, middle = {"E": (0.0, 1.0), "A": ("alpha", middle_n), "B": ("beta", middle_d)}[name]
        exponent = float(best.x[names.index(power)]) if isinstance(power, str) else 0.0
        ends = (math.exp(interval[0]), math.exp(interval[1])) if interval is not None and name == "E" else None
        estimates[name] = Estimate(math.exp(value) * middle**exponent, ends)
    residuals = np.exp(log_loss - log_law(best.x)) - 1
    return Fit(formula, estimates, [float(value) for value in residuals], freedom)


def _half_widths(jacobian: Any, cost: float, freedom: int, quantile: float) -> list[float] | None:
    """Half widths of the parameters' intervals; None when the points do not determine them."""
    import numpy as np

    if freedom < 1:
        return None
    information = jacobian.T @ jacobian
    if np.linalg.cond(information) > 1e12:
        return None
    covariance = np.linalg.inv(information) * (2 * cost / freedom)
    return [float(quantile * math.sqrt(max(0.0, value))) for value in np.diag(covariance)]
