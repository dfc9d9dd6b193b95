"""How evenly the experts of a sweep's members are used, from what the metrics files count."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from phd_megatron.config.plain import Json
from phd_megatron.sweep import figures
from phd_megatron.sweep.curves import smooth
from phd_megatron.sweep.document import Block, Figure, Heading, Table, Text
from phd_megatron.sweep.statistics import Group, Result

_LOSSES = ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss", "z_loss")
_LAST_SHARE = 0.2


def load_entropy(loads: Sequence[float]) -> float:
    """Entropy of a layer's rows over its experts, as a share of the most there can be: 1 is balance, 0 one expert."""
    total = sum(loads)
    if total <= 0 or len(loads) < 2:
        return 1.0
    shares = [load / total for load in loads if load > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(len(loads))


def step_entropy(step: Json) -> float:
    """Mean over the layers with experts of one logged step."""
    return statistics.fmean(load_entropy(loads) for loads in step["tokens_per_expert"].values())


def router_entropy(step: Json) -> float | None:
    """Mean over the layers with experts of one logged step, in nats; None in files of an older version."""
    return statistics.fmean(step["router_entropy"].values()) if "router_entropy" in step else None


def _steps(result: Result) -> list[Json]:
    return [step for step in result.curve.run.steps if step.get("tokens_per_expert")]


def expert_blocks(groups: Sequence[Group], output: Path) -> Iterator[Block]:
    """The section on experts; nothing for a sweep of dense models."""
    rows, lines, decisions = [], {}, {}
    for group in groups:
        routed = [(result, _steps(result)) for result in group.results.values()]
        routed = [(result, steps) for result, steps in routed if steps]
        if not routed:
            continue
        aligned = list(zip(*(steps for _, steps in routed), strict=False))  # a shorter one ends the group's line
        tokens = [float(steps[0]["consumed_tokens"]) for steps in aligned]
        lines[group.name] = tokens, smooth([statistics.fmean(map(step_entropy, steps)) for steps in aligned])
        single = [[value for value in map(router_entropy, steps) if value is not None] for steps in aligned]
        if all(single):
            decisions[group.name] = tokens, smooth([statistics.fmean(values) for values in single])
        last = [step for _, steps in routed for step in steps[-max(1, int(_LAST_SHARE * len(steps))) :]]
        cells = [
            f"{statistics.fmean(map(step_entropy, last)):.4f}",
            f"{statistics.fmean(s['max_expert_load'] for s in last):.3f}",
        ]
        entropies = [value for value in map(router_entropy, last) if value is not None]
        cells.append(f"{statistics.fmean(entropies):.4f}" if entropies else "")
        for name in _LOSSES:
            values = [step[name] for step in last if step.get(name) is not None]
            cells.append(f"{statistics.fmean(values):.4f}" if values else "")
        rows.append([group.name, *cells])
    if not rows:
        return
    yield Heading("Experts")
    head = ["members", "load entropy", "busiest expert", "router entropy"]
    yield Table([*head, *(name.replace("_", " ") for name in _LOSSES)], rows)
    yield Text(
        f"Means over the last {_LAST_SHARE:.0%} of the logged steps and over seeds. Load entropy is that of the rows "
        "over a layer's experts, as a share of its maximum, mean over layers; the busiest expert is that of any layer, "
        "over its layer's mean. Router entropy is that of one row's probabilities over all experts, in nats, mean over "
        "rows and layers. Router losses are without their coefficients."
    )
    figures.draw_experts(lines, output, "experts", "entropy of the experts' load (1 = balanced)")
    yield Figure("experts", "Entropy of the experts' load over training, mean over seeds")
    if decisions:
        figures.draw_experts(decisions, output, "router", "router entropy of a row (nats)")
        yield Figure("router", "Router entropy over training, mean over seeds")
