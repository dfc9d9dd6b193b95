"""What the members of a sweep reached, side by side. Every number is computed from their metrics files and the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.console.tables import short
from phd_megatron.errors import UserError
from phd_megatron.sweep import figures
from phd_megatron.sweep.curves import AXES, Axis, common_end, read_curve
from phd_megatron.sweep.document import (
    Block,
    Figure,
    Heading,
    Table,
    Text,
    check_documents,
    markdown,
    page,
    write_document,
)
from phd_megatron.sweep.experts import expert_blocks
from phd_megatron.sweep.layers import layer_blocks
from phd_megatron.sweep.members import METRICS_FILE
from phd_megatron.sweep.process import present_status
from phd_megatron.sweep.scaling import Estimate, Fit, fit_law
from phd_megatron.sweep.statistics import (
    CONFIDENCE,
    Difference,
    Group,
    Result,
    baseline_of,
    make_groups,
    paired,
    paired_over,
)
from phd_megatron.sweep.store import Status, Store, open_store


@dataclass(frozen=True)
class Context:
    """What every section reads."""

    store: Store
    statuses: dict[str, Status]
    results: list[Result]
    groups: list[Group]
    output: Path

    @property
    def pairs(self) -> list[tuple[Group, Group]]:
        """(group, its baseline), for all groups that have one."""
        found = ((group, baseline_of(group, self.groups, self.store.baseline)) for group in self.groups)
        return [(group, baseline) for group, baseline in found if baseline is not None]


Section = Callable[[Context], Iterator[Block]]


def write_report(directory: Path, output: Path | None = None) -> list[Path]:
    """Write ``report.md``, ``report.html`` and the figures.

    Returns:
        The two documents.

    Raises:
        UserError: when the directory is no sweep, or no member has logged a step.
    """
    store = open_store(directory)
    output = output or directory / "report"
    check_documents(output, "report.md", "report.html")
    statuses = {entry.name: present_status(store, entry.name) for entry in store.entries}
    results = []
    for entry in store.entries:
        path = store.home(entry.name) / METRICS_FILE
        if path.exists() and path.stat().st_size:
            try:
                curve = read_curve(entry.name, path)
            except UserError:
                if statuses[entry.name].state != "diverged":
                    raise
                continue  # it diverged before its first line; the table of members says so
            results.append(Result(entry, statuses[entry.name].state, curve))
    if not results:
        raise UserError(f"no member of {directory} has logged a step yet; wait, or see `phd-megatron sweep status`")
    context = Context(store, statuses, results, make_groups(results), output)
    blocks = [block for section in SECTIONS for block in section(context)]
    write_document(output / "report.md", markdown(store.title, blocks))
    write_document(output / "report.html", page(store.title, blocks, output))
    return [output / "report.md", output / "report.html"]


# ---------------------------------------------------------------- sections


def members(context: Context) -> Iterator[Block]:
    """Which members there are and how they ended."""
    rows = []
    curves = {result.entry.name: result.curve for result in context.results}
    for entry in context.store.entries:
        status, curve = context.statuses[entry.name], curves.get(entry.name)
        rows.append(
            [
                entry.name,
                status.state,
                short(entry.plan["parameters"]),
                short(entry.plan["non_embedding_parameters"]),
                short(curve.end("tokens")) if curve else "",
                f"{curve.end('flops'):.3g}" if curve else "",
                f"{curve.end('seconds'):,.1f}" if curve else "",
                f"{curve.final()[0]:.4f}" if curve else "",
                curve.final()[1] if curve else "",
            ]
        )
    yield Heading("Members")
    head = ["member", "state", "parameters", "N", "tokens", "FLOPs", "training s", "final loss", "of"]
    yield Table(head, rows)
    yield Text(
        "N is active parameters without embeddings. Tokens are original tokens; FLOPs count forward and backward by "
        "the model's formula; seconds are of training steps alone. All members with equal seeds see the same samples "
        "in the same order; another seed changes the initial weights and the order."
    )
    for entry in context.store.entries:
        status = context.statuses[entry.name]
        if status.state in ("failed", "diverged", "stopped", "running"):
            left = f": {status.message}" if status.message else ""
            yield Text(
                f"{entry.name} has not finished ({status.state}{left}); it is left out of every comparison below."
            )


def losses(context: Context) -> Iterator[Block]:
    """Loss curves, a panel for each size."""
    panels = {
        title: {name: [result.curve for result in results] for name, results in groups.items()}
        for title, groups in _panels(context).items()
    }
    figures.draw_losses(panels, context.output, "losses", context.store.unit)
    yield Heading("Loss curves")
    yield Figure("losses", "Training loss, moving average (lines, one for each seed) and validation loss (dots)")


def finals(context: Context) -> Iterator[Block]:
    """Final losses with the spread over seeds."""
    groups = [group for group in context.groups if group.finals]
    yield Heading("Final losses")
    if not groups:
        yield Text("No member has finished.")
        return
    kinds = {result.curve.final()[1] for group in groups for result in group.finished}
    rows = []
    for group in groups:
        spread = "one seed" if group.spread is None else f"{group.spread:.4f}"
        rows.append(
            [
                *(group.name, str(len(group.finals)), f"{group.mean:.4f}", spread),
                *(f"{loss:.4f}" for loss in (min(group.finals), max(group.finals))),
            ]
        )
    yield Table(["members", "seeds", "mean", "standard deviation", "lowest", "highest"], rows)
    yield Text(f"Loss in {context.store.unit}, {' and '.join(sorted(kinds))}.")
    figures.draw_finals([(group.name, group.finals) for group in groups], context.output, "finals", context.store.unit)
    yield Figure("finals", "Final losses by seed")


def differences(context: Context) -> Iterator[Block]:
    """Paired differences of final losses against the baseline."""
    yield Heading("Differences from the baseline")
    if not context.store.baseline:
        yield Text("The sweep file names no baseline.")
        return
    named = ", ".join(f"{axis} {label}" for axis, label in context.store.baseline.items())
    rows = []
    for group, baseline in context.pairs:
        difference = paired(group, baseline)
        if difference is not None:
            rows.append([group.name, baseline.name, *_difference_cells(difference), difference.verdict])
    for name, pairs in _families(context).items():
        difference = paired_over(pairs)
        if difference is not None and len(pairs) > 1:
            title = f"{name}, mean over {context.store.size_axis}"
            rows.append([title, "the same", *_difference_cells(difference), difference.verdict])
    if not rows:
        yield Text(f"No member has finished together with its baseline ({named}).")
        return
    head = ["members", "baseline", "pairs", "difference", f"{CONFIDENCE:.0%} interval", "seed spread", "loss is"]
    yield Table(head, rows)
    yield Text(
        f"Final loss minus that of the baseline ({named}) with the same seed, hence the same samples in the same "
        "order; mean over seeds, with Student's t interval. The spread is the larger standard deviation over seeds of "
        "the two. 'lower' or 'higher' stands only where the difference exceeds that spread and the interval leaves out "
        "0; everything else is no ordering. No correction is made for the number of comparisons."
    )


def _families(context: Context) -> dict[str, list[tuple[Group, Group]]]:
    """Pairs of group and baseline that differ along the size axis only, by their other labels."""
    families: dict[str, list[tuple[Group, Group]]] = {}
    for group, baseline in context.pairs:
        if context.store.size_axis in group.axes:
            families.setdefault(_without_size(context, group), []).append((group, baseline))
    return families


def _panels(context: Context) -> dict[str, dict[str, list[Result]]]:
    """Members by size, where sizes are compared, and by their other labels."""
    panels: dict[str, dict[str, list[Result]]] = {}
    axis = context.store.size_axis
    for group in context.groups:
        title = group.axes.get(axis, "") if axis else ""
        panels.setdefault(title, {}).setdefault(_without_size(context, group), []).extend(group.results.values())
    return panels


def _without_size(context: Context, group: Group) -> str:
    return "-".join(label for axis, label in group.axes.items() if axis != context.store.size_axis) or "all"


def equal_costs(context: Context) -> Iterator[Block]:
    """The same differences where both have used the same tokens, FLOPs or time."""
    rows = []
    for group, baseline in context.pairs:
        cells = []
        for axis in AXES:
            difference = paired(group, baseline, _at_common_end(axis))
            cells.append("" if difference is None else _difference_text(difference))
        if any(cells):
            rows.append([group.name, baseline.name, *cells])
    if not rows:
        return
    yield Heading("At equal tokens, equal FLOPs and equal time")
    yield Table(["members", "baseline", *(f"equal {label}" for label in AXES.values())], rows)
    yield Text(
        "Difference of the smoothed training loss at the largest tokens, FLOPs or seconds that both have used, with "
        "its interval where there are several seeds. Whoever has not used up its budget there is in the middle of its "
        "learning-rate schedule, which puts it at a disadvantage; a fair comparison at equal FLOPs needs members whose "
        "budgets are equal in FLOPs. Seconds depend on the machine and on what else ran on it."
    )


def scaling(context: Context) -> Iterator[Block]:
    """Scaling laws along the size axis, one for each of the other labels."""
    axis = context.store.size_axis
    if axis is None:
        return
    schemes: dict[str, list[Result]] = {}
    for group in context.groups:
        name = "-".join(label for key, label in group.axes.items() if key not in (axis, "tokens")) or "all"
        schemes.setdefault(name, []).extend(group.finished)
    fits, laws, residuals, reasons = [], [], [], []
    for name, results in schemes.items():
        if not results:
            continue
        sizes = [float(result.entry.plan["non_embedding_parameters"]) for result in results]
        tokens = [result.curve.end("tokens") for result in results]
        values = [result.final for result in results]
        fit = fit_law(sizes, tokens, values)
        laws.append((name, sizes, tokens, values, fit if isinstance(fit, Fit) else None))
        if isinstance(fit, str):
            reasons.append(f"{name}: {fit}")
            continue
        estimates = [_estimate_text(fit.estimates.get(key)) for key in ("E", "A", "alpha", "B", "beta")]
        fits.append([name, fit.formula, *estimates, str(len(results)), str(fit.freedom)])
        residuals += [
            [result.entry.name, f"{result.final:.4f}", f"{result.final / (1 + rest):.4f}", f"{rest:+.2%}"]
            for result, rest in zip(results, fit.residuals, strict=True)
        ]
    if not laws:
        return
    yield Heading("Scaling laws")
    if fits:
        figures.draw_scaling(laws, context.output, "scaling", context.store.unit)
        yield Figure("scaling", "Final losses over model size, with the fitted laws")
        head = ["members", "law", "E", "A", "alpha", "B", "beta", "points", "degrees of freedom"]
        yield Table(head, fits)
        yield Text(
            f"Least squares on log L over final losses; N is active parameters without embeddings, D original tokens. "
            f"{CONFIDENCE:.0%} intervals in brackets, from the linearised fit; none where the points do not determine "
            "them. A law fitted over so narrow a range of sizes is a summary of these runs, not a forecast."
        )
        yield Table(["member", "measured", "fitted", "residual"], residuals)
    for reason in reasons:
        yield Text(f"No law for {reason}.")


def experts(context: Context) -> Iterator[Block]:
    """Load of the experts, of members that have any."""
    yield from expert_blocks(context.groups, context.output)


def layers(context: Context) -> Iterator[Block]:
    """Statistics by layer, of members that recorded them."""
    yield from layer_blocks(_panels(context), context.output)


SECTIONS: tuple[Section, ...] = (members, losses, finals, differences, equal_costs, scaling, layers, experts)
"""In the order of the report. Another analysis is one more function here that reads the members' folders."""


# ---------------------------------------------------------------- cells


def _at_common_end(axis: Axis) -> Callable[[Result, Result], tuple[float, float] | None]:
    def measure(mine: Result, other: Result) -> tuple[float, float] | None:
        x = common_end(axis, mine.curve, other.curve)
        found = mine.curve.at(axis, x), other.curve.at(axis, x)
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    return measure


def _difference_cells(difference: Difference) -> Sequence[str]:
    interval = "" if difference.interval is None else "{:+.4f} to {:+.4f}".format(*difference.interval)
    spread = "" if difference.spread is None else f"{difference.spread:.4f}"
    return [str(difference.pairs), f"{difference.mean:+.4f}", interval, spread]


def _difference_text(difference: Difference) -> str:
    if difference.interval is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} ({difference.interval[0]:+.4f} to {difference.interval[1]:+.4f})"


def _estimate_text(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.interval is None:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} [{estimate.interval[0]:.4g}, {estimate.interval[1]:.4g}]"
