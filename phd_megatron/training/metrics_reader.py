"""Read ``--metrics-file`` files: one JSON object a line."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One line, as JSON has it."""


@dataclass(frozen=True)
class Run:
    """A run's name and its logged steps, each iteration once, in order."""

    name: str
    steps: list[Row]

    def curve(self, field: str) -> tuple[list[float], list[float]]:
        """(consumed samples, values) of the steps that have ``field``."""
        points = [(s["consumed_samples"], s[field]) for s in self.steps if s.get(field) is not None]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, field: str) -> float | None:
        """Newest value of ``field``, or None if no step has it."""
        values = self.curve(field)[1]
        return values[-1] if values else None

    def median(self, field: str) -> float | None:
        """Median of ``field`` over the steps that have it; unlike a mean it leaves out the slow first steps."""
        values = sorted(self.curve(field)[1])
        return values[len(values) // 2] if values else None


def read_run(name: str, path: Path) -> Run:
    """Read one file. A step logged twice (a run that was killed and repeated it) counts once, the later one.

    Raises:
        ValueError: if a line is no JSON object with ``iteration`` and ``consumed_samples``, or there is none; or if
            another run begins in between. All rows of a run have one id; files of releases before have none.
    """
    steps: dict[int, Row] = {}
    last: tuple[int, str | None] = (0, None)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                step = json.loads(line)
                if not isinstance(step["iteration"], int):
                    raise TypeError(f"iteration={step['iteration']!r:.40} is no number")
                steps[step["iteration"]] = {**steps.get(step["iteration"], {}), **step}
                step["consumed_samples"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}:{number} is no line of a metrics file ({error}): {line[:80]!r}") from error
            iteration, run = step["iteration"], step.get("run")
            if iteration <= last[0] and None not in (run, last[1]) and run != last[1]:
                raise ValueError(
                    f"{path}:{number} goes back from iteration {last[0]} to {iteration}, and is of another run: the "
                    "file holds two; cut it there"
                )
            last = iteration, run
    if not steps:
        raise ValueError(f"{path} is empty: the run has not logged a step yet")
    return Run(name, [steps[iteration] for iteration in sorted(steps)])


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``NAME=FILE`` arguments, read with :func:`runs_of`."""
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=FILE", help="name in the result, and metrics file, of each run"
    )


def runs_of(parser: argparse.ArgumentParser, arguments: list[str]) -> list[Run]:
    """The runs that the arguments name; a mistake ends the program with a message."""
    runs = []
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        if not name:
            parser.error(f"{argument!r} does not say what to call the run; write NAME={argument}")
        try:
            runs.append(read_run(name, Path(path)))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    return runs
