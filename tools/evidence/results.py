"""The runs that there are, as the groups that a sweep's report compares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phd_megatron.errors import UserError
from phd_megatron.sweep.curves import curve_of
from phd_megatron.sweep.statistics import Difference, Group, Result, make_groups, paired
from phd_megatron.sweep.store import Entry

from .corpus import PARTS
from .queue import VARIANT, Queue, Section
from .record import steps_of

_FOLDERS = PARTS[-1]
TWO_THIRDS = 2 / 3
_NEAR = 0.03  #: how far from two thirds of a run a validation may be
LASTING = 0.8

Measure = Callable[[Result, Result], "tuple[float, float] | None"]


@dataclass(frozen=True)
class Trained(Result):
    """A run with its record."""

    record: Mapping[str, Any]

    @property
    def folders(self) -> float | None:
        """Loss on the held-out folders; None where it was not asked for."""
        found = self.record["evaluations"].get(_FOLDERS)
        return None if found is None else float(found["loss"])

    def validation_near(self, share: float) -> float | None:
        """The validation loss nearest to a share of the run; None when there is none near it."""
        end = float(self.record["plan"]["tokens"])
        tokens = self.curve.tokens
        found = [(abs(tokens[step] / end - share), loss) for step, loss in self.curve.validation]
        distance, loss = min(found, default=(1.0, 0.0))
        return loss if distance <= _NEAR else None

    @property
    def trained_to(self) -> float:
        """Mean training loss of the last twentieth of the run."""
        last = [
            loss
            for loss, tokens in zip(self.curve.loss, self.curve.tokens, strict=True)
            if tokens > 0.95 * self.curve.tokens[-1]
        ]
        return sum(last) / len(last)


@dataclass(frozen=True)
class Diverged:
    """A run that did not reach its end."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """All runs of a queue."""

    queue: Queue
    trained: tuple[Trained, ...]
    diverged: tuple[Mapping[str, Any], ...]

    def of(self, section: Section, text: str) -> list[Trained]:
        """Runs of one section on one text."""
        return [r for r in self.trained if (r.record["section"], r.record["text"]) == (section.name, text)]

    def groups(self, section: Section, text: str) -> list[Group]:
        """Runs that differ in their seed only."""
        return make_groups(self.of(section, text))

    def pairs(self, section: Section, text: str) -> Iterator[tuple[Group, Group]]:
        """What the section compares, as far as both are there: each group with the one to compare it with.

        A baseline that is not in the section itself is taken from another one with chosen rates and the same budget.
        """
        wanted = [(name, section.baseline) for name in section.variants if section.baseline not in (None, name)]
        for pair in section.compare:
            name, separator, other = (word.strip() for word in pair.partition(":"))
            if not separator:
                raise UserError(f"{self.queue.path}, section {section.name}: {pair!r} is no pair; write A : B")
            wanted.append((name, other))
        others = [other for other in self.queue.sections if other.rates == "chosen" and other.tokens == section.tokens]
        known = [group for place in [section, *others] for group in self.groups(place, text)]
        for name, other in wanted:
            of_name = [group for group in known if group.axes[VARIANT] == name]
            for group in of_name if section.axes else of_name[:1]:
                found = (g for g in known if g.axes == {**group.axes, VARIANT: str(other)})
                baseline = next(found, None)
                if baseline is not None and (not section.axes or group.axes.keys() - {VARIANT}):
                    yield group, baseline


def read_results(queue: Queue) -> Results:
    """Read ``runs/``.

    Raises:
        UserError: for a file that is no record.
    """
    trained, diverged = [], []
    for path in sorted(queue.runs.glob("*.json")):
        try:
            record = json.loads(path.read_text("utf-8"))
            plan = record["plan"]
            if record["state"] != "finished":
                diverged.append(record)
                continue
            entry = Entry(record["name"], record["axes"], plan["iterations"], plan["samples"], plan["seq_length"], plan)
            trained.append(Trained(entry, "finished", curve_of(steps_of(record), path), record))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no record of a run ({error!r}); fold its piece again") from None
    return Results(queue, tuple(trained), tuple(diverged))


def by_folders(mine: Result, other: Result) -> tuple[float, float] | None:
    """Losses on the held-out folders."""
    assert isinstance(mine, Trained) and isinstance(other, Trained)
    return None if mine.folders is None or other.folders is None else (mine.folders, other.folders)


def at_two_thirds(mine: Result, other: Result) -> tuple[float, float] | None:
    """Validation losses at two thirds of the run."""
    assert isinstance(mine, Trained) and isinstance(other, Trained)
    found = mine.validation_near(TWO_THIRDS), other.validation_near(TWO_THIRDS)
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def lasting(group: Group, baseline: Group) -> tuple[Difference | None, str]:
    """The difference at two thirds of the run, and whether that at the end is at least 80 % of it."""
    early, end = paired(group, baseline, at_two_thirds), paired(group, baseline)
    if early is None or end is None:
        return early, "not known"
    if early.verdict not in ("lower", "higher"):
        return early, "nothing is separated at two thirds"
    share = end.mean / early.mean
    return early, f"{'yes' if share >= LASTING else 'no'}: {share:.0%} of it is left"
