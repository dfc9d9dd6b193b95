"""Which learning rate a variant is compared with: the best of its grids, where that is not at a grid's edge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from phd_megatron.sweep.store import write

from .queue import RATE, RATES, VARIANT, Queue

WARM_UP = "lr_warmup_tokens"
Rates = dict[str, dict[str, dict[str, float]]]

_HEADER = """\
# The rate of each variant: that of its grids' run with the lowest validation loss at the end, where a lower and a
# higher rate were tried too. Written by `python -m evidence rates`, which adds what is not here and changes nothing.
"""


def read_records(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Records of finished runs, of the checkout and of the piece that is going on."""
    found = [json.loads(path.read_text("utf-8")) for folder in folders for path in sorted(folder.glob("*.json"))]
    return [record for record in found if record["state"] == "finished"]


def choose_rates(queue: Queue, records: Iterable[Mapping[str, Any]]) -> Rates:
    """The queue's rates and those that its grids now give.

    Args:
        queue: whose ``rates`` stay as they are.
        records: of finished runs; one that has been compared already says its variant's rate.
    """
    rates: Rates = {text: {name: dict(rate) for name, rate in of.items()} for text, of in queue.rates.items()}
    sections = {section.name: section for section in queue.sections}
    grids: dict[tuple[str, str], dict[tuple[float, float], float]] = {}
    for record in records:
        section = sections.get(record["section"])
        text, variant = record["text"], record["axes"].get(VARIANT)
        rate = record["config"].get(RATE), record["config"].get(WARM_UP)
        if section is None or None in rate:
            continue
        if section.rates == "chosen" and variant not in queue.rates_like and not section.fields:
            rates.setdefault(text, {}).setdefault(variant, _fields(*rate))
        elif section.is_grid:
            loss = [loss for loss in record["steps"]["validation_loss"] if loss is not None][-1]
            grids.setdefault((text, variant), {})[rate] = loss
    for (text, variant), losses in grids.items():
        best = min(losses, key=losses.__getitem__)
        beside = [rate for rate, warm_up in losses if warm_up == best[1]]
        if min(beside) < best[0] < max(beside):
            rates.setdefault(text, {}).setdefault(variant, _fields(*best))
    return rates


def write_rates(queue: Queue, rates: Rates) -> Path:
    """Write them beside the queue."""
    path = queue.path.with_name(RATES)
    write(path, _HEADER + yaml.safe_dump(rates))
    return path


def _fields(rate: float, warm_up: float) -> dict[str, float]:
    return {RATE: rate, WARM_UP: warm_up}
