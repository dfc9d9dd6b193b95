"""What a sweep file says: a base run, the axes it varies, how members are started and compared.

An axis is a field with a list of values, or a name of your own with labelled settings of several fields. A grid is the
product of its axes, several grids are put together, and ``members`` adds single members. Two names stand for more than
one field: ``preset``, and ``tokens``, the training budget in original tokens.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phd_megatron.config.catalog import fields, nearest, sections
from phd_megatron.config.plain import Annotations, Plain, Values
from phd_megatron.config.presets import preset_values
from phd_megatron.config.serialize import flatten, read_yaml
from phd_megatron.config.values import check_value
from phd_megatron.errors import UserError, shown
from phd_megatron.sweep.options import Launcher, Planning, read_options

SEED = "seed"
_OWN = frozenset({"save", "load", "metrics_file", "exit_interval", "exit_duration_in_mins", "finetune", "rewind"})
_SHORT = {"phd_repeat": "K", "phd_window": "W", "phd_chunk": "C", "seed": "seed", "num_layers": "L", "hidden_size": "h"}
_MOST_MEMBERS = 10_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+*=,-]*")
_KEYS = ("name", "title", "unit", "base", "grid", "members", "baseline", "size_axis", "launcher", "planning")


@dataclass(frozen=True)
class Setting:
    """One label of one axis, and the fields it sets (already checked)."""

    label: str
    values: Values


@dataclass(frozen=True)
class Member:
    """One run: its place on every axis, and the fields that the axes set."""

    name: str
    axes: Mapping[str, str]
    values: Values


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked.

    Attributes:
        base_preset: names of presets, or None.
        base_layers: what all members share: (fields, where from), weaker ones first.
        baseline: axis -> label of the member that others are compared with.
        size_axis: axis along which models grow; scaling laws are fitted along it.
        unit: of the loss, for plots.
    """

    name: str
    title: str
    unit: str
    base_preset: str | None
    base_layers: tuple[tuple[dict[str, Plain], str], ...]
    members: tuple[Member, ...]
    baseline: Mapping[str, str] = field(default_factory=dict)
    size_axis: str | None = None
    launcher: Launcher = field(default_factory=Launcher)
    planning: Planning = field(default_factory=Planning)


def read_sweep(path: str | Path, transformer_fields: Annotations) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: for unknown keys and fields, values of the wrong type, members with the same name, or a baseline that
            is not on an axis.
    """
    path = Path(path)
    return sweep_of(read_yaml(path), path, transformer_fields)


def sweep_of(data: Values, path: Path, transformer_fields: Annotations) -> Sweep:
    """The same of a sweep file's content; ``path`` names it in messages, and ``config`` is relative to it."""
    for key in data:
        if key not in _KEYS:
            raise UserError(
                f"{path}: unknown key {shown(key)}; {nearest(str(key), _KEYS) or 'use ' + ', '.join(_KEYS)}"
            )
    reader = _Reader(path, transformer_fields)
    preset, layers = reader.base(_mapping(data, "base", path))
    grid = data.get("grid")
    grids = grid if isinstance(grid, list) else [_mapping(data, "grid", path)]
    members = (
        *(member for grid in grids for member in reader.grid(_mapping({"grid": grid}, "grid", path))),
        *reader.singles(data.get("members") or []),
    )
    if not members:
        raise UserError(f"{path} has no members; write axes below `grid:` or runs below `members:`")
    _check_unique(path, members)
    name = str(data.get("name") or path.stem)
    if not name.isprintable():  # it becomes a line of a script for SLURM
        raise UserError(f"{path}: name holds {shown(name)}; use one line of text")
    axes = list(dict.fromkeys(axis for member in members for axis in member.axes))
    size_axis = data.get("size_axis")
    if size_axis is not None and size_axis not in axes:
        raise UserError(f"{path}: size_axis={shown(size_axis)} is no axis; use one of {', '.join(axes)}")
    return Sweep(
        name=name,
        title=str(data.get("title") or name),
        unit=str(data.get("unit") or "nats per token"),
        base_preset=preset,
        base_layers=layers,
        members=members,
        baseline=_baseline(path, _mapping(data, "baseline", path), members),
        size_axis=str(size_axis) if size_axis else next((axis for axis in ("size", "preset") if axis in axes), None),
        launcher=read_options(Launcher, _mapping(data, "launcher", path), f"{path}, launcher"),
        planning=read_options(Planning, _mapping(data, "planning", path), f"{path}, planning"),
    )


def check_fields(values: Values, where: str, transformer_fields: Annotations) -> dict[str, Plain]:
    """Flat fields of a member, checked; also ``preset`` and ``tokens``.

    Raises:
        UserError: for an unknown name, a field that the sweep sets itself, or a value of the wrong type.
    """
    checked: dict[str, Plain] = {}
    for name, value in values.items():
        if name == "preset":
            preset_values(str(value))
            checked[name] = str(value)
        elif name == "tokens":
            tokens = checked[name] = check_value(name, value, float, where)
            if not isinstance(tokens, (int, float)) or tokens < 1:
                raise UserError(
                    f"{where}: tokens={shown(value)} is no training budget; use a number of original tokens"
                )
        elif name in _OWN:
            raise UserError(f"{where}: {name} is set by the sweep for each member; leave it out")
        elif name in fields():
            checked[name] = check_value(name, value, fields()[name].annotation, where)
        elif name in transformer_fields:
            checked[name] = check_value(name, value, transformer_fields[name], where)
        else:
            hint = nearest(str(name), [*fields(), *transformer_fields, "preset", "tokens"])
            raise UserError(
                f"{where}: unknown field {shown(name)}; {hint or 'phd-megatron pretrain --help lists them'}"
            )
    return checked


def label_of(axis: str, value: Plain) -> str:
    """How a value is called in the names of members."""
    if isinstance(value, str):
        return re.sub(r"[^A-Za-z0-9._+*=,-]+", "_", value)
    text = {None: "none", True: "on", False: "off"}.get(value) if value is None or isinstance(value, bool) else None
    number = f"{value:g}" if isinstance(value, float) else str(value)
    text = text or re.sub(r"[^A-Za-z0-9._+-]+", "_", number).strip("_")
    return f"{_SHORT.get(axis, axis + '=')}{text}"


@dataclass(frozen=True)
class _Reader:
    path: Path
    transformer_fields: Annotations

    def base(self, data: Values) -> tuple[str | None, tuple[tuple[dict[str, Plain], str], ...]]:
        rest = dict(data)
        preset, config, tokens = rest.pop("preset", None), rest.pop("config", None), rest.pop("tokens", None)
        unknown = [key for key in rest if key not in sections()]
        if unknown:
            hint = f"it belongs below `{fields()[unknown[0]].section}:`" if unknown[0] in fields() else None
            raise UserError(
                f"{self.path}, base: unknown key {shown(unknown[0])}; "
                + (hint or f"use preset, config, tokens, or the sections {', '.join(sections())}")
            )
        layers = []
        if config is not None:
            file = self.path.parent / str(config)
            layers.append((flatten(read_yaml(file), str(file), self.transformer_fields), str(file)))
        inline = flatten(rest, f"{self.path}, base", self.transformer_fields)
        inline |= check_fields({"tokens": tokens} if tokens is not None else {}, f"{self.path}, base", {})
        layers.append((inline, f"{self.path}, base"))
        for values, where in layers:
            for name in values.keys() & _OWN:
                raise UserError(f"{where}: {name} is set by the sweep for each member; leave it out")
        if preset is not None:
            preset_values(str(preset))
        return (None if preset is None else str(preset)), tuple(layers)

    def grid(self, data: Values) -> Iterator[Member]:
        if not data:
            return
        axes = {str(name): self._axis(str(name), choices) for name, choices in data.items()}
        count = math.prod(map(len, axes.values()))
        if count > _MOST_MEMBERS:
            raise UserError(
                f"{self.path}, grid: its axes make {count} members, and at most {_MOST_MEMBERS:,} are taken; leave "
                "values out, or write several sweeps"
            )
        for chosen in itertools.product(*axes.values()):
            values: dict[str, Plain] = {}
            for setting in chosen:
                for name in setting.values.keys() & values.keys():
                    raise UserError(f"{self.path}, grid: {name} is set by two axes; keep it in one")
                values.update(setting.values)
            labels = {axis: setting.label for axis, setting in zip(axes, chosen, strict=True)}
            yield Member("-".join(labels.values()), labels, values)

    def _axis(self, name: str, choices: Plain) -> list[Setting]:
        where = f"{self.path}, grid, {name}"
        if isinstance(choices, Mapping):
            if name in fields() or name in ("preset", "tokens"):
                raise UserError(f"{where}: labelled settings need a name that is no field; call the axis otherwise")
            found = []
            for label, values in choices.items():
                if not isinstance(values, Mapping):
                    raise UserError(f"{where}, {label}: {shown(values)} is no setting; write fields below the label")
                found.append(
                    Setting(
                        label_of("", str(label)), check_fields(values, f"{where}, {label}", self.transformer_fields)
                    )
                )
        elif isinstance(choices, list) and choices:
            found = [self._single(name, value, where) for value in choices]
        else:
            raise UserError(
                f"{where}: {shown(choices)} is no axis; write a list of values, or labels with fields below them"
            )
        labels = [setting.label for setting in found]
        if not found or len(set(labels)) < len(labels):
            raise UserError(f"{where} names a value twice, or none: {', '.join(labels)}")
        return found

    def _single(self, name: str, value: Plain, where: str) -> Setting:
        checked = check_fields({name: value}, where, self.transformer_fields)
        return Setting(label_of(name, checked[name]), checked)

    def singles(self, listed: Plain) -> Iterator[Member]:
        where = f"{self.path}, members"
        if not isinstance(listed, list):
            raise UserError(f"{where}: {shown(listed)} is no list; write one member a line, each beginning with -")
        for number, entry in enumerate(listed, 1):
            if not isinstance(entry, Mapping):
                raise UserError(f"{where}, number {number}: {shown(entry)} is no member; write its fields")
            values = check_fields(
                {k: v for k, v in entry.items() if k != "name"}, f"{where}, number {number}", self.transformer_fields
            )
            labels = {name: label_of(name, value) for name, value in values.items()}
            yield Member(str(entry.get("name") or "-".join(labels.values())), labels, values)


def _mapping(data: Values, key: str, path: Path) -> Values:
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {key} holds {shown(value)}; write its entries below it, indented")
    return value


def is_member_name(name: str) -> bool:
    """Whether a member of this name has a directory of its own among the others', and nowhere else."""
    return _NAME.fullmatch(name) is not None


def _check_unique(path: Path, members: tuple[Member, ...]) -> None:
    seen: set[str] = set()
    for member in members:
        if not is_member_name(member.name):
            raise UserError(
                f"{path}: {shown(member.name)} cannot name a directory; use letters, digits and . _ + * = , -"
            )
        if member.name in seen:
            raise UserError(f"{path}: two members are called {shown(member.name)}; give one of them another `name`")
        seen.add(member.name)


def _baseline(path: Path, given: Values, members: tuple[Member, ...]) -> dict[str, str]:
    chosen = {}
    for axis, value in given.items():
        labels = {member.axes[axis] for member in members if axis in member.axes}
        label = value if value in labels else label_of(str(axis), value)
        if label not in labels:
            raise UserError(
                f"{path}: baseline {axis}={shown(value)} is not on that axis; use one of {', '.join(sorted(labels))}"
            )
        chosen[str(axis)] = str(label)
    return chosen
