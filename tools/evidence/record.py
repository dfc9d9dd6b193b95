"""What is kept of a run: one small JSON file, from which the report is made.

The training curve is kept at the logged steps, as columns; the model and its checkpoint are not.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phd_megatron.config.serialize import changed
from phd_megatron.sweep.definition import SEED
from phd_megatron.sweep.members import METRICS_FILE, PlannedMember
from phd_megatron.sweep.process import present_status
from phd_megatron.sweep.store import Store
from phd_megatron.training.metrics_reader import Run, read_run

from .piece import ROOT
from .queue import Experiment
from .source import sources

COLUMNS = (
    "iteration",
    "consumed_samples",
    "consumed_tokens",
    "consumed_flops",
    "lm_loss",
    "grad_norm",
    "learning_rate",
    "iteration_seconds",
    "validation_loss",
)
_DIGITS = 6
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")
_PATHS = ("save", "load", "metrics_file", "train_data_path", "valid_data_path", "data_cache_path", "progress")


def make_record(
    experiment: Experiment,
    member: PlannedMember,
    store: Store,
    evaluations: Mapping[str, Any],
    about_piece: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a run that has ended: finished, or diverged.

    Args:
        experiment: which one.
        member: its configuration.
        store: where it ran.
        evaluations: name of a data set to what ``phd-megatron evaluate`` wrote.
        about_piece: of :func:`describe_piece`.
    """
    status = present_status(store, member.name)
    try:
        run = read_run(member.name, store.home(member.name) / METRICS_FILE)
    except (OSError, ValueError):  # it diverged before its first line
        run = Run(member.name, [])
    fields = {name: value for section in changed(member.config).values() for name, value in section.items()}
    plan = member.plan
    return {
        "name": experiment.name,
        "section": experiment.section.name,
        "text": experiment.text,
        "axes": dict(experiment.member.axes),
        "seed": experiment.member.axes[SEED],
        "state": status.state,
        "message": status.message,
        "starts": status.starts,
        "wall_seconds": round(status.seconds, 1),
        **{name: value for name, value in about_piece.items() if name != "texts"},
        "text_made_of": about_piece["texts"][experiment.text],
        "config": {name: value for name, value in fields.items() if name not in _PATHS},
        "plan": {
            "parameters": plan.parameters,
            "active_parameters": plan.active_parameters,
            "non_embedding_parameters": plan.non_embedding_parameters,
            "tokens": plan.tokens,
            "flops": plan.flops,
            "samples": plan.samples,
            "iterations": member.iterations,
            "seq_length": member.seq_length,
        },
        "evaluations": dict(evaluations),
        "steps": {column: [_short(step.get(column)) for step in run.steps] for column in COLUMNS},
    }


def describe_piece(name: str, text_folders: Mapping[str, Path]) -> dict[str, Any]:
    """What all runs of a piece share: machine, versions, sources, texts."""
    import torch

    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    digests = {text: json.loads((folder / "text.json").read_text("utf-8")) for text, folder in text_folders.items()}
    return {"piece": name, "device": device, "versions": versions, "sources": sources(ROOT), "texts": digests}


def steps_of(record: Mapping[str, Any]) -> Run:
    """The steps of a record, as a metrics file would give them."""
    columns: Mapping[str, Sequence[Any]] = record["steps"]
    rows = zip(*(columns[name] for name in COLUMNS), strict=True)
    return Run(record["name"], [dict(zip(COLUMNS, row, strict=True)) for row in rows])


def dump(record: Mapping[str, Any]) -> str:
    """The file's content: a line for each entry, so that a difference can be read."""
    steps = record["steps"]
    head = {name: value for name, value in record.items() if name != "steps"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    columns = [f"  {json.dumps(name)}: {json.dumps(values, separators=(',', ':'))}" for name, values in steps.items()]
    return "{\n" + ",\n".join([*lines, ' "steps": {\n' + ",\n".join(columns) + "\n }"]) + "\n}\n"


def _short(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
