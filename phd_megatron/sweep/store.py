"""A sweep's directory: ``plan.json``, the lock, and one folder for each member.

A member's folder holds its ``run.yaml``, ``metrics.jsonl``, ``log.txt``, checkpoints and ``status.json``. Files are
replaced in one step, so a reader never sees half of one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar

import yaml

from phd_megatron.config.catalog import fields
from phd_megatron.config.files import read_json
from phd_megatron.config.plain import Annotation, Json, Plain, Values
from phd_megatron.config.serialize import changed, read_yaml
from phd_megatron.errors import UserError, shown
from phd_megatron.sweep.definition import Sweep, is_member_name
from phd_megatron.sweep.members import MEMBERS, METRICS_FILE, RUN_FILE, STATUS_FILE, PlannedMember

PLAN_FILE = "plan.json"
_LARGEST = 1e30  # no number of ours is larger; it is below what a float or a clock can show
Record = TypeVar("Record")
_MEMBER = "# Member"  # start of a member's configuration
State = Literal["waiting", "running", "finished", "stopped", "failed", "diverged"]


@dataclass(frozen=True)
class Status:
    """How a member's last start went. ``seconds`` is the time of all its starts."""

    state: State = "waiting"
    exit_code: int | None = None
    starts: int = 0
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Entry:
    """A member as ``plan.json`` has it."""

    name: str
    axes: Mapping[str, str]
    iterations: int
    samples: int
    seq_length: int
    plan: Mapping[str, Any]  #: of :class:`phd_megatron.planning.run_plan.RunPlan`


@dataclass(frozen=True)
class Store:
    """A sweep's directory, planned."""

    directory: Path
    name: str
    title: str
    unit: str
    baseline: Mapping[str, str]
    size_axis: str | None
    launcher: Mapping[str, Any]
    entries: tuple[Entry, ...]

    def home(self, name: str) -> Path:
        """Folder of one member."""
        return self.directory / MEMBERS / name

    def entry(self, name: str) -> Entry:
        """The member of that name.

        Raises:
            UserError: when there is none.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise UserError(f"{self.directory} has no member {name!r}; it has {', '.join(e.name for e in self.entries)}")

    def status(self, name: str) -> Status:
        """What the member's last start left behind; ``running`` may also mean that it was killed."""
        path = self.home(name) / STATUS_FILE
        if not os.path.lexists(path):
            return Status()
        cure = "delete it to start the member again"
        return _record(Status, read_json(path, cure), path, cure)

    def write_status(self, name: str, status: Status) -> None:
        """Replace the member's status."""
        write(self.home(name) / STATUS_FILE, json.dumps({**asdict(status)}, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def create(directory: Path, sweep: Sweep, members: Sequence[PlannedMember]) -> Store:
    """Write the plan and the members' configurations; members that have begun keep theirs, which must be the same.

    Raises:
        UserError: when a member that has begun would get another configuration, with the fields that differ.
    """
    entries = tuple(_entry(member) for member in members)
    _check_ours(directory, sweep, members)
    store = Store(
        directory, sweep.name, sweep.title, sweep.unit, sweep.baseline, sweep.size_axis, asdict(sweep.launcher), entries
    )
    for member in members:
        _check_unchanged(store.home(member.name), member)
    for member in members:
        header = f"{_MEMBER} {member.name} of the sweep {sweep.name}; written by `phd-megatron sweep`.\n"
        write(
            store.home(member.name) / RUN_FILE,
            header + yaml.safe_dump(changed(member.config), sort_keys=False, allow_unicode=True),
        )
    plain = {key: value for key, value in asdict(store).items() if key != "directory"}
    write(directory / PLAN_FILE, json.dumps(plain, indent=1) + "\n")
    return store


def _check_ours(directory: Path, sweep: Sweep, members: Sequence[PlannedMember]) -> None:
    """Refuse a directory whose plan is another sweep's, or in which files of others stand where the members' go."""
    cure = "give the sweep another --output"
    if os.path.lexists(directory / PLAN_FILE):
        before = open_store(directory)
        if before.name != sweep.name:
            raise UserError(f"{directory} holds the sweep {before.name!r}, and this one is {sweep.name!r}; {cure}")
    for member in members:
        path = directory / MEMBERS / member.name / RUN_FILE
        if not os.path.lexists(path):
            continue
        try:
            ours = path.is_file() and path.read_bytes().startswith(_MEMBER.encode())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {cure}") from error
        if not ours:
            raise UserError(f"{path} exists and was not written by a sweep, so it is not replaced; {cure}")


def open_store(directory: str | Path) -> Store:
    """Read a sweep's directory.

    Raises:
        UserError: when it is none, or a name or value in its plan is none that a sweep writes.
    """
    directory = Path(directory)
    path = directory / PLAN_FILE
    if not os.path.lexists(path):
        raise UserError(f"{directory} is no sweep: it has no {PLAN_FILE}; give the --output of a sweep")
    cure = "it is no plan of a sweep, or a damaged one: delete that and start the sweep again, it goes on where it was"
    data = _mapping(read_json(path, cure), path, cure)
    entries = data.pop("entries", None)
    if not isinstance(entries, list):
        raise UserError(f"{path} cannot be read (it has no list of entries); {cure}")
    members = tuple(_record(Entry, entry, path, cure) for entry in entries)
    names = [member.name for member in members]
    for number, name in enumerate(names):
        if not is_member_name(name) or name in names[:number]:
            raise UserError(f"{path} cannot be read ({shown(name)} cannot name a member's directory); {cure}")
        for key in ("parameters", "non_embedding_parameters"):
            if not _fits(members[number].plan.get(key), float):
                raise UserError(f"{path} cannot be read (member {name} has no number of {key}); {cure}")
    return _record(Store, {**data, "directory": directory, "entries": members}, path, cure)


def _mapping(value: Plain, path: Path, cure: str) -> Json:
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read ({shown(value)} is no mapping); {cure}")
    return dict(value)


def _record(cls: type[Record], value: Plain | Json, path: Path, cure: str) -> Record:
    """A record of JSON, whose names and types are those of the class."""
    data = _mapping(value, path, cure)
    annotations = typing.get_type_hints(cls)
    known = dataclasses.fields(cls)  # type: ignore[arg-type]
    unknown = sorted(data.keys() - annotations.keys())
    missing = [f.name for f in known if f.name not in data and f.default is dataclasses.MISSING]
    if unknown or missing:
        words = f"unknown key {shown(unknown[0])}" if unknown else f"{missing[0]} is missing"
        raise UserError(f"{path} cannot be read ({words}); {cure}")
    for name, field_value in data.items():
        if not _fits(field_value, annotations[name]):
            raise UserError(f"{path} cannot be read ({name}={shown(field_value)} cannot be); {cure}")
    return cls(**data)


def _fits(value: Plain, kind: Annotation) -> bool:
    """Whether a value is of an annotated type; NaN and infinities are no numbers here."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (UnionType, typing.Union):
        return any(_fits(value, each) for each in arguments)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(each, arguments[1]) for each in value.values())
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if kind is int or kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return (kind is float or isinstance(value, int)) and 0 <= abs(value) < _LARGEST
    return isinstance(kind, type) and isinstance(value, kind)


def _entry(member: PlannedMember) -> Entry:
    plan = member.plan.as_dict()
    return Entry(member.name, dict(member.axes), member.iterations, member.samples, member.seq_length, plan)


def _check_unchanged(home: Path, member: PlannedMember) -> None:
    if not (home / METRICS_FILE).exists() or not (home / RUN_FILE).exists():
        return
    before, after = _flat(read_yaml(home / RUN_FILE)), _flat(changed(member.config))
    differing = [name for name in {**before, **after} if _value(before, name) != _value(after, name)]
    if differing:
        changes = ", ".join(f"{n}: {_value(before, n)!r} -> {_value(after, n)!r}" for n in differing)
        raise UserError(
            f"member {member.name} has begun with another configuration ({changes}); give the sweep another --output, "
            f"or delete {home} to train it anew"
        )


def _flat(data: Mapping[str, Values]) -> dict[str, Plain]:
    return {name: value for section in data.values() for name, value in section.items()}


def _value(flat: Values, name: str) -> Plain:
    return flat.get(name, fields()[name].default if name in fields() else None)
