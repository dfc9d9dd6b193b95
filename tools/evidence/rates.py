"""Which learning rate a variant is compared with: the best of its grids, where that is not at a grid's edge."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from phd_megatron.sweep.store import write

from .queue import RATE, RATES, VARIANT, Queue

WARM_UP = "lr_warmup_tokens"
Rate = tuple[tuple[str, float], ...]  #: fields that belong together, and their values
Rates = dict[str, dict[str, dict[str, float]]]

_HEADER = """\
# The rate of each variant: that of its grids' run with the lowest validation loss at the end, where a lower and a
# higher rate were tried too. Written by `python -m evidence rates`, which adds what is not here and changes nothing.
"""


def read_records(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Records of runs that have ended, of the checkout and of the piece that is going on."""
    return [json.loads(path.read_text("utf-8")) for folder in folders for path in sorted(folder.glob("*.json"))]


def choose_rates(queue: Queue, records: Iterable[Mapping[str, Any]]) -> Rates:
    """The queue's rates and those that its grids now give: of a variant's grids, each of which has been run whole.

    Args:
        queue: whose ``rates`` stay as they are.
        records: one that has been compared already says its variant's rate.
    """
    rates: Rates = {text: {name: dict(rate) for name, rate in of.items()} for text, of in queue.rates.items()}
    recorded = {record["name"]: record for record in records}
    grids: dict[tuple[str, str, str], list[str]] = {}
    for experiment in queue.experiments:
        section, variant = experiment.section, experiment.member.axes[VARIANT]
        if section.is_grid:
            grids.setdefault((section.name, experiment.text, variant), []).append(experiment.name)
        elif experiment.name in recorded and variant not in queue.rates_like and not section.fields:
            rates.setdefault(experiment.text, {}).setdefault(variant, dict(_rate(recorded[experiment.name])))
    losses: dict[tuple[str, str], dict[Rate, float]] = {}
    for (_, text, variant), names in grids.items():
        if all(name in recorded for name in names):
            losses.setdefault((text, variant), {}).update((_rate(recorded[n]), _loss(recorded[n])) for n in names)
    for (text, variant), by_rate in losses.items():
        best = min(by_rate, key=by_rate.__getitem__)
        beside = [dict(rate)[RATE] for rate in by_rate if dict(rate)[WARM_UP] == dict(best)[WARM_UP]]
        if min(beside) < dict(best)[RATE] < max(beside):
            rates.setdefault(text, {}).setdefault(variant, dict(best))
    return rates


def _rate(record: Mapping[str, Any]) -> Rate:
    return tuple((name, record["config"][name]) for name in (RATE, WARM_UP))


def _loss(record: Mapping[str, Any]) -> float:
    """On the validation part at the end; infinite for a run that diverged."""
    found = [loss for loss in record["steps"]["validation_loss"] if loss is not None]
    return float(found[-1]) if record["state"] == "finished" else math.inf


def write_rates(queue: Queue, rates: Rates) -> Path:
    """Write them beside the queue."""
    path = queue.path.with_name(RATES)
    write(path, _HEADER + yaml.safe_dump(rates))
    return path
