"""Statistics by layer of a sweep's members, at steps that all of them recorded (``log_layer_statistics``)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from phd_megatron.sweep import figures
from phd_megatron.sweep.document import Block, Figure, Heading, Table, Text
from phd_megatron.sweep.statistics import Result

LABELS = {
    "gradient_norm": "gradient norm",
    "residual_rms": "residual RMS",
    "cosine_similarity": "token similarity (cosine)",
    "attention_entropy": "attention entropy (nats)",
    "attention_entropy_share": "attention entropy / its maximum",
    "copy_cosine": "original and last copy (cosine)",
    "attention_on_originals": "attention on originals",
    "attention_on_own": "attention on own hidden keys",
    "attention_on_window": "attention on the window's hidden keys",
}
_LOGARITHMIC = ("gradient_norm", "residual_rms")
_SHOWN = 3  #: steps

Layers = dict[int, dict[str, list[float]]]
"""Step to statistic to values from the first layer to the last that has it."""


def read_layers(result: Result) -> Layers:
    """What a member recorded."""
    return {
        step["iteration"]: {
            name: [table[number] for number in sorted(table, key=int)]
            for name, table in step["layer_statistics"].items()
        }
        for step in result.curve.run.steps
        if "layer_statistics" in step
    }


def shown_steps(members: Iterable[Iterable[int]]) -> list[int]:
    """The first, the middle and the last of the steps that all members have."""
    common = sorted(set[int].intersection(*map(set, members)))
    if len(common) <= _SHOWN:
        return common
    return [common[0], common[len(common) // 2], common[-1]]


def layer_blocks(panels: Mapping[str, Mapping[str, Sequence[Result]]], output: Path) -> Iterator[Block]:
    """The section: a figure for each statistic that there is; nothing when no finished member has any.

    Args:
        panels: size to group's name to its members, which differ in their seed.
        output: where figures go.
    """
    read = {
        (title, name): found
        for title, groups in panels.items()
        for name, results in groups.items()
        if (found := [layers for r in results if r.state == "finished" and (layers := read_layers(r))])
    }
    if not read:
        return
    yield Heading("Statistics by layer")
    steps = shown_steps([layers for found in read.values() for layers in found])
    if not steps:
        yield Text("The members have recorded no step in common: give them the same log_layer_statistics.")
        return
    columns: dict[str, list[str]] = {}
    for statistic, label in LABELS.items():
        lines: dict[str, dict[str, list[list[float]]]] = {}
        for (title, name), found in read.items():
            means = [_mean([layers[step].get(statistic, []) for layers in found]) for step in steps]
            lines.setdefault(title, {})[name] = means
        if not any(mean for groups in lines.values() for means in groups.values() for mean in means):
            continue
        stem = f"layers_{statistic}"
        figures.draw_layers(lines, steps, output, stem, label, statistic in _LOGARITHMIC)
        yield Figure(stem, f"By layer: {label}, at steps {', '.join(map(str, steps))}; mean over seeds")
        columns[label] = [_ends(lines[title][name][-1]) for title, name in read]
    names = [f"{title}, {name}" if title else name for title, name in read]
    yield Table(["members", *columns], [list(row) for row in zip(names, *columns.values(), strict=True)])
    yield Text(
        f"First layer / last layer that has the value, at step {steps[-1]}. Gradient norms are those of all parameters "
        "of a layer, before clipping. The others are of the last copy of each token of the step's first micro-batch: "
        "root mean square of the residual stream after the layer, mean cosine of all pairs of different tokens of a "
        "sequence, and the entropy of attention weights of up to 128 queries of a sequence, mean over heads; over its "
        "maximum means over the log of the number of keys that a query sees. Of models that repeat tokens also the "
        "mean cosine between the residual streams of a token's original and its last copy, and the shares of these "
        "queries' attention weights on originals, on hidden keys of the token itself and on those of earlier tokens."
    )


def _ends(values: Sequence[float]) -> str:
    return f"{values[0]:.3g} / {values[-1]:.3g}" if values else "-"


def _mean(members: Sequence[Sequence[float]]) -> list[float]:
    """By layer; empty where a member has none: a model without copies, or recorded by a version without the value."""
    if not all(members):
        return []
    return [statistics.fmean(values) for values in zip(*members, strict=True)]
