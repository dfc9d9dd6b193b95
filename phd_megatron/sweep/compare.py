"""Two runs at equal tokens, equal FLOPs and equal time."""

from __future__ import annotations

from pathlib import Path

from phd_megatron.errors import UserError
from phd_megatron.sweep import figures
from phd_megatron.sweep.curves import AXES, Axis, Curve, common_end, read_curve
from phd_megatron.sweep.document import Block, Figure, Table, Text, check_documents, markdown, write_document
from phd_megatron.sweep.members import METRICS_FILE

_SHARES = (0.25, 0.5, 0.75, 1.0)


def find_metrics(path: Path) -> Path:
    """The metrics file that a path means: itself, or the one in or beside a directory of checkpoints.

    Raises:
        UserError: when there is none.
    """
    for candidate in (path, path / METRICS_FILE, path.parent / METRICS_FILE):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path} is no metrics file and holds no {METRICS_FILE}; give the file of --metrics-file")


def read_named(argument: str) -> Curve:
    """A curve from ``PATH`` or ``NAME=PATH``."""
    name, separator, path = argument.partition("=")
    if not separator or Path(argument).exists():
        name, path = "", argument
    file = find_metrics(Path(path))
    return read_curve(name or (file.parent.name if file.name == METRICS_FILE else file.stem), file)


def rows_at(a: Curve, b: Curve, axis: Axis) -> list[list[str]]:
    """Losses of both and their difference at shares of what both have used."""
    rows = []
    end = common_end(axis, a, b)
    for share in _SHARES:
        x = share * end
        at_a, at_b = a.at(axis, x), b.at(axis, x)
        if at_a is not None and at_b is not None:
            rows.append([AXES[axis], f"{x:.4g}", f"{at_a:.4f}", f"{at_b:.4f}", f"{at_b - at_a:+.4f}"])
    return rows


def reach_rows(a: Curve, b: Curve) -> list[list[str]]:
    """What each needed to get to the higher of the two final losses, which both have reached."""
    goal = max(a.smoothed[-1], b.smoothed[-1])
    rows = []
    for axis, label in AXES.items():
        needs = a.reaches(axis, goal), b.reaches(axis, goal)
        if needs[0] and needs[1]:
            rows.append([label, f"{needs[0]:.4g}", f"{needs[1]:.4g}", f"{needs[1] / needs[0]:.3f}"])
    return rows


def diverged_text(curve: Curve) -> str:
    """What a reader must know of a run that ended without a number."""
    return (
        f"{curve.name} has diverged: from iteration {curve.diverged_at} on its loss is not finite, and everything here "
        "is of the steps before."
    )


def comparison(a: Curve, b: Curve) -> list[Block]:
    """Tables of both runs."""
    blocks: list[Block] = [
        Table(
            ["run", "final loss", "of", *(f"all {label}" for label in AXES.values())],
            [[c.name, f"{c.final()[0]:.4f}", c.final()[1], *(f"{c.end(axis):.4g}" for axis in AXES)] for c in (a, b)],
        ),
        Table(
            ["at equal", "amount", a.name, b.name, "difference"],
            [row for axis in AXES for row in rows_at(a, b, axis)],
        ),
        Text("Smoothed training loss (EMA) at shares of what both runs have used. One run each: no spread is known."),
    ]
    blocks += [Text(diverged_text(curve)) for curve in (a, b) if curve.diverged_at is not None]
    reached = reach_rows(a, b)
    if reached:
        goal = max(a.smoothed[-1], b.smoothed[-1])
        blocks.append(Table([f"to reach a loss of {goal:.4f}", a.name, b.name, f"{b.name} / {a.name}"], reached))
    return blocks


def write_comparison(a: Curve, b: Curve, output: Path, unit: str) -> list[Block]:
    """Write ``compare.md`` with ``compare.png`` and ``compare.svg``; the tables."""
    if a.name == b.name:
        raise UserError(f"both runs are called {a.name!r}; name them: compare FIRST=PATH SECOND=PATH")
    check_documents(output, "compare.md", "compare.svg", "compare.png")
    blocks = comparison(a, b)
    figures.draw_costs([a, b], output, "compare", unit)
    picture = Figure("compare", "Smoothed training loss over tokens, FLOPs and time")
    write_document(output / "compare.md", markdown(f"{a.name} and {b.name}", [*blocks, picture]))
    return blocks
