"""From a sweep file to complete run configurations, one a member, with what each costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phd_megatron.config.load import merge_layers
from phd_megatron.config.plain import Plain, Values
from phd_megatron.config.presets import preset_values
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.validate import require_for_pretraining
from phd_megatron.errors import UserError
from phd_megatron.planning.run_plan import RunPlan, plan_run
from phd_megatron.sweep.definition import Member, Sweep

MEMBERS = "members"
RUN_FILE, METRICS_FILE, LOG_FILE, STATUS_FILE = "run.yaml", "metrics.jsonl", "log.txt", "status.json"
CHECKPOINTS = "checkpoints"
_SAVES = 5  #: saves of a member whose configuration names no interval


@dataclass(frozen=True)
class PlannedMember:
    """A member with its configuration (as ``run.yaml`` says it), its length and its costs."""

    name: str
    axes: Mapping[str, str]
    config: RunConfig
    iterations: int
    seq_length: int
    plan: RunPlan

    @property
    def samples(self) -> int:
        """Samples of the whole run."""
        return self.plan.samples


def plan_members(
    sweep: Sweep, directory: Path, flags: Values | None = None, check: bool = True
) -> tuple[list[PlannedMember], list[str]]:
    """Complete every member.

    Args:
        sweep: the file.
        directory: where the sweep is going to live.
        flags: fields from the command line, for all members.
        check: also look at the data.

    Returns:
        The members, and notes for the user.

    Raises:
        UserError: with the member's name, when a member cannot run.
    """
    flags = dict(flags or {})
    for member in sweep.members:
        for name in member.values.keys() & flags.keys():
            raise UserError(f"--{name.replace('_', '-')} is also an axis of the sweep; leave the flag out")
    configs = {member.name: _configure(sweep, member, flags, directory) for member in sweep.members}
    ranks = sweep.launcher.ranks * sweep.launcher.nodes
    found, notes = [], []
    for member in sweep.members:
        try:
            found.append(_planned(member, configs[member.name], ranks))
        except UserError as error:
            raise UserError(f"member {member.name}: {error}") from None
    horizon = max(member.samples for member in found)
    for planned in found:
        if planned.config.data.data_horizon_samples is None:
            planned.config.data.data_horizon_samples = horizon
    lengths = {planned.seq_length for planned in found}
    if len(lengths) > 1:
        notes.append(
            f"members have seq_length {', '.join(map(str, sorted(lengths)))}: a sample is not the same text for "
            "all, so their batches differ"
        )
    if len({planned.config.data.data_horizon_samples for planned in found}) > 1:
        notes.append("members have different data_horizon_samples, so they do not see the same samples in order")
    if check:
        _check_data(found)
    return found, notes


def _configure(sweep: Sweep, member: Member, flags: Values, directory: Path) -> RunConfig:
    values = dict(member.values)
    names = ",".join(str(name) for name in (sweep.base_preset, values.pop("preset", None)) if name)
    layers: list[tuple[dict[str, Plain], str]] = [
        (preset_values(names) if names else {}, f"preset {names}"),
        *((dict(fields), where) for fields, where in sweep.base_layers),
        (dict(flags), "flags"),
        (values, f"member {member.name}"),
    ]
    tokens: Plain = None
    for fields, _ in layers:
        if "train_samples" in fields or "train_iters" in fields:
            tokens = None
        tokens = fields.pop("tokens", tokens)
    config = merge_layers(layers).config
    training, checkpoint = config.training, config.checkpoint
    if isinstance(tokens, (int, float)):
        batch = training.global_batch_size or training.micro_batch_size
        training.train_samples = math.ceil(math.ceil(tokens / config.model.seq_length) / batch) * batch
        training.train_iters = None
    home = directory.resolve() / MEMBERS / member.name
    checkpoint.save = checkpoint.load = str(home / CHECKPOINTS)
    checkpoint.keep_last = checkpoint.keep_last or 1
    config.logging.metrics_file = str(home / METRICS_FILE)
    config.logging.progress = "off"
    _make_absolute(config)
    try:
        require_for_pretraining(config)
    except UserError as error:
        raise UserError(f"member {member.name}: {error}") from None
    return config


def _make_absolute(config: RunConfig) -> None:
    """Members may start in another directory than the sweep (a SLURM node's), so paths are written in full."""
    data = config.data
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(data, name)
        if words:
            setattr(data, name, [str(Path(w).resolve()) if Path(f"{w}.idx").exists() else w for w in words])
    for name in ("tokenizer", "data_cache_path"):
        value = getattr(data, name)
        if value is not None and Path(value).is_dir():
            setattr(data, name, str(Path(value).resolve()))


def _planned(member: Member, config: RunConfig, ranks: int) -> PlannedMember:
    from phd_megatron.training.start import fix_size

    complete = copy.deepcopy(config)
    resolve(complete)
    samples, iterations = fix_size(complete, ranks)
    config.training.global_batch_size = complete.training.global_batch_size
    if config.checkpoint.save_interval is None:
        config.checkpoint.save_interval = max(1, iterations // _SAVES)
    plan = plan_run(complete, samples, ranks)
    return PlannedMember(member.name, member.axes, config, iterations, complete.model.seq_length, plan)


def _check_data(members: Sequence[PlannedMember]) -> None:
    from phd_megatron.data.datasets import check_data, resolve_tokenizer

    for member in members:
        config = replace(member.config)
        evaluated = config.training.eval_iters * (config.training.global_batch_size or 1)
        try:
            check_data(config, resolve_tokenizer(config), (member.samples, evaluated, 0))
        except UserError as error:
            raise UserError(f"member {member.name}: {error}") from None
