"""Members with the same settings and other seeds as one group, and groups against a baseline, seed by seed."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from phd_megatron.sweep.curves import Curve
from phd_megatron.sweep.definition import SEED
from phd_megatron.sweep.store import Entry, State

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Result:
    """A member that has a curve."""

    entry: Entry
    state: State
    curve: Curve

    @property
    def seed(self) -> str:
        """Its place on the seed axis; empty without one."""
        return self.entry.axes.get(SEED, "")

    @property
    def final(self) -> float:
        """Final loss; see :meth:`Curve.final`."""
        return self.curve.final()[0]


@dataclass(frozen=True)
class Group:
    """Members that differ in their seed only."""

    axes: Mapping[str, str]
    results: dict[str, Result] = field(default_factory=dict)  #: by seed

    @property
    def name(self) -> str:
        """Its labels."""
        return "-".join(self.axes.values()) or "all"

    @property
    def finished(self) -> list[Result]:
        """Members that reached their end: the only ones whose final losses compare."""
        return [result for result in self.results.values() if result.state == "finished"]

    @property
    def finals(self) -> list[float]:
        """Final losses of the finished members."""
        return [result.final for result in self.finished]

    @property
    def mean(self) -> float | None:
        """Mean final loss."""
        return statistics.fmean(self.finals) if self.finals else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the final loss over seeds; None below two."""
        return statistics.stdev(self.finals) if len(self.finals) > 1 else None


def make_groups(results: Sequence[Result]) -> list[Group]:
    """Groups in the order of the members."""
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for result in results:
        axes = {axis: label for axis, label in result.entry.axes.items() if axis != SEED}
        group = groups.setdefault(tuple(axes.items()), Group(axes))
        group.results[result.seed] = result
    return list(groups.values())


def baseline_of(group: Group, groups: Sequence[Group], baseline: Mapping[str, str]) -> Group | None:
    """The group at the baseline's labels and this one's others; None for the baseline itself or without one."""
    if not baseline or not baseline.keys() <= group.axes.keys():
        return None
    wanted = {**group.axes, **baseline}
    if wanted == group.axes:
        return None
    return next((other for other in groups if other.axes == wanted), None)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences (group minus baseline, equal seeds) with its confidence interval."""

    pairs: int
    mean: float
    interval: tuple[float, float] | None  #: None for one pair
    spread: float | None  #: the larger standard deviation over seeds of the two groups

    @property
    def verdict(self) -> str:
        """``lower`` or ``higher`` only where the difference exceeds the seeds' spread and the interval excludes 0."""
        if self.interval is None or self.spread is None:
            return "one seed: no statement"
        if self.interval[0] <= 0 <= self.interval[1] or abs(self.mean) <= self.spread:
            return "not separated from the seeds' spread"
        return "lower" if self.mean < 0 else "higher"


def paired(
    group: Group, baseline: Group, measure: Callable[[Result, Result], tuple[float, float] | None] | None = None
) -> Difference | None:
    """Compare two groups seed by seed.

    Args:
        group: what is compared.
        baseline: what it is compared with.
        measure: losses of (member, baseline's member); default the final losses. None leaves a pair out.

    Returns:
        None when no seed has finished in both.
    """
    measure = measure or (lambda mine, other: (mine.final, other.final))
    others = {result.seed: result for result in baseline.finished}
    measured = [
        losses
        for result in group.finished
        if result.seed in others and (losses := measure(result, others[result.seed])) is not None
    ]
    return _summarise(measured)


def paired_over(pairs: Sequence[tuple[Group, Group]]) -> Difference | None:
    """Compare families of groups, such as one scheme and the baseline at every size, by their means of final losses.

    A seed counts when it has finished everywhere. The mean is taken before seeds are compared, since the differences
    of one seed at several sizes come from the same samples and are not independent.
    """
    finals = [[{r.seed: r.final for r in side.finished} for side in pair] for pair in pairs]
    if not finals:
        return None
    seeds = [seed for seed in finals[0][0] if all(seed in side for pair in finals for side in pair)]
    means = [tuple(statistics.fmean(pair[side][seed] for pair in finals) for side in (0, 1)) for seed in seeds]
    return _summarise([(mine, other) for mine, other in means])


def _summarise(measured: Sequence[tuple[float, float]]) -> Difference | None:
    """Mean difference, interval and spread of (loss, baseline's loss) by seed."""
    if not measured:
        return None
    differences = [mine - other for mine, other in measured]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(1, mean, None, None)
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():  # of equal differences, whose interval is their mean
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = ttest_rel(*zip(*measured, strict=True)).confidence_interval(CONFIDENCE)
    spread = max(statistics.stdev(side) for side in zip(*measured, strict=True))
    return Difference(len(differences), mean, (float(interval.low), float(interval.high)), spread)
