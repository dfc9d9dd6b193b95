"""The queue: sections of experiments in order, and which of them have been run.

A section is what a sweep file is, said shorter: named variants times further axes times seeds, on each of its texts.
What has been run stands in ``runs/``, one file an experiment, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from phd_megatron.config.catalog import nearest
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import read_yaml
from phd_megatron.errors import UserError
from phd_megatron.runtime.mcore_versions import MUON_SINCE
from phd_megatron.runtime.requirements import require_optimizer
from phd_megatron.sweep.definition import SEED, Member, Sweep, check_fields, sweep_of
from phd_megatron.sweep.members import PlannedMember, plan_members
from phd_megatron.sweep.options import read_options

RUNS, RATES = "runs", "rates.yaml"
VARIANT, RATE = "variant", "lr"
_KEYS = ("base", "anchor", "variants", "rates_like", "sections")


@dataclass(frozen=True)
class Section:
    """Experiments that belong together.

    Attributes:
        name: part of the experiments' names.
        item: of the plan of experiments (``how.md``).
        about: what it asks, in a line.
        texts: what is trained on; all experiments of the first text come first.
        tokens: training budget in original tokens.
        variants: names out of the queue's ``variants``.
        seeds: of initial weights and order of data.
        axes: further axes, as in a sweep file's grid.
        rates: ``own``: the axes and variants say the learning rate; ``chosen``: ``rates.yaml`` does, by variant.
        folders: whether the held-out folders are evaluated too, after the training.
        baseline: the variant that the report compares with.
        compare: further pairs, ``VARIANT : BASELINE`` each.
        fields: what all members have beside the variant's.
        continues: ``SECTION VARIANT``: each member begins with the parameters of that one's run of the same seed,
            trained in the same piece.
    """

    name: str
    item: int
    about: str
    texts: list[str]
    tokens: float
    variants: list[str]
    seeds: list[int]
    rates: Literal["own", "chosen"] = "own"
    folders: bool = True
    baseline: str | None = None
    compare: list[str] = field(default_factory=list)
    continues: str | None = None
    axes: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_grid(self) -> bool:
        """Whether it looks for learning rates; its seeds take part in no comparison."""
        return RATE in self.axes


@dataclass(frozen=True)
class Experiment:
    """One run: ``TEXT-SECTION-MEMBER`` is its name, and its file's."""

    section: Section
    text: str
    member: Member
    waits_for: str | None = None  #: why it cannot be run yet
    start: Experiment | None = None  #: whose parameters it begins with

    @property
    def name(self) -> str:
        return f"{self.text}-{self.section.name}-{self.member.name}"


@dataclass(frozen=True)
class Queue:
    """``queue.yaml`` with the rates beside it."""

    path: Path
    base: Mapping[str, Any]
    anchor: str
    variants: Mapping[str, Mapping[str, Any]]
    blocked: Mapping[str, str]  #: variants whose fields this version does not have, and why
    rates_like: Mapping[str, str]
    sections: tuple[Section, ...]
    rates: Mapping[str, Mapping[str, Mapping[str, Any]]]  #: text -> variant -> fields
    transformer_fields: Mapping[str, Any]

    @property
    def runs(self) -> Path:
        """Where finished experiments stand."""
        return self.path.parent / RUNS

    @cached_property
    def experiments(self) -> list[Experiment]:
        """All of them in order, without the anchor."""
        return [
            experiment
            for section in self.sections
            if section.name != self.anchor
            for text in section.texts
            if not set(section.variants) <= set(self.blocked)
            for experiment in self._of(section, text)
        ]

    def anchors(self, text: str) -> list[Experiment]:
        """What every piece begins with, on this text."""
        section = next(section for section in self.sections if section.name == self.anchor)
        return list(self._of(section, text))

    def sweep(self, section: Section, text: str, ready: bool = False) -> Sweep:
        """The section on one text as a sweep; with ``ready``, of those variants only that have their rate."""
        grid = {
            VARIANT: {
                name: {**self.variants[name], **section.fields, **self._rate(section, text, name)}
                for name in section.variants
                if name not in self.blocked and not (ready and self._waits(section, text, name))
            },
            **section.axes,
            SEED: section.seeds,
        }
        data: dict[str, Plain] = {
            "name": f"{text}-{section.name}",
            "title": section.about,
            "base": {**self.base, "tokens": section.tokens},
            "grid": grid,
        }
        return sweep_of(data, self.path, self.transformer_fields)

    def plan(self, section: Section, text: str, directory: Path, flags: Mapping[str, Any]) -> list[PlannedMember]:
        """Complete configurations of a section's members on one text, of those that can be run."""
        return plan_members(self.sweep(section, text, ready=True), directory, flags, check=False)[0]

    def _of(self, section: Section, text: str) -> Iterator[Experiment]:
        """Seed by seed, so that what is compared is there together."""
        members = self.sweep(section, text).members
        for seed in dict.fromkeys(member.axes[SEED] for member in members):
            for member in members:
                if member.axes[SEED] == seed:
                    waits = self._waits(section, text, member.axes[VARIANT])
                    start = self._start(section, text, seed)
                    if start is not None:
                        waits = waits or start.waits_for
                    yield Experiment(section, text, member, waits, start)

    def _start(self, section: Section, text: str, seed: str) -> Experiment | None:
        """The experiment that those of this seed continue.

        Raises:
            UserError: when there is none.
        """
        if section.continues is None:
            return None
        name, _, variant = section.continues.partition(" ")
        for other in self.sections:
            for experiment in self._of(other, text) if other.name == name and other.continues is None else ():
                if (experiment.member.axes[VARIANT], experiment.member.axes[SEED]) == (variant, seed):
                    return experiment
        raise UserError(
            f"{self.path}, section {section.name}: continues={section.continues!r} is no SECTION VARIANT with {seed}"
        )

    def _rate(self, section: Section, text: str, variant: str) -> Mapping[str, Any]:
        if section.rates == "own":
            return {}
        return self.rates.get(text, {}).get(self.rates_like.get(variant, variant), {})

    def _waits(self, section: Section, text: str, variant: str) -> str | None:
        # The whole section: what is compared runs with one version.
        if any(self.variants[name].get("optimizer") == "muon" for name in section.variants) and not _has_muon():
            return f"megatron-core {MUON_SINCE} and emerging-optimizers"
        if section.rates == "own" or self._rate(section, text, variant):
            return None
        return f"a rate of {self.rates_like.get(variant, variant)} on {text} in {RATES}"


def read_queue(path: Path, transformer_fields: Mapping[str, Any]) -> Queue:
    """Read a queue and the chosen rates beside it.

    Raises:
        UserError: for unknown keys, variants and anchors, sections of the same name, or what a sweep file refuses.
    """
    data = read_yaml(path)
    for key in data:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(str(key), _KEYS) or 'use ' + ', '.join(_KEYS)}")
    variants: dict[str, Mapping[str, Any]] = dict(data.get("variants") or {})
    sections = []
    for number, entry in enumerate(data.get("sections") or [], 1):
        entry = dict(entry)
        free = {name: entry.pop(name, {}) for name in ("axes", "fields")}  # checked where the sweep is read
        section = read_options(Section, entry, f"{path}, section {number}")
        for name in section.variants:
            if name not in variants:
                raise UserError(
                    f"{path}, section {section.name}: no variant {name!r}; "
                    f"{nearest(name, variants) or 'use ' + ', '.join(variants)}"
                )
        sections.append(replace(section, **free))
    names = [section.name for section in sections]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two sections have one name among {', '.join(names)}; rename one")
    anchor = str(data.get("anchor"))
    if anchor not in names:
        raise UserError(f"{path}: anchor={anchor!r} is no section; use one of {', '.join(names)}")
    rates = path.with_name(RATES)
    return Queue(
        path=path,
        base=data.get("base") or {},
        anchor=anchor,
        variants=variants,
        blocked=_blocked(path, variants, transformer_fields),
        rates_like=data.get("rates_like") or {},
        sections=tuple(sections),
        rates=read_yaml(rates) if rates.exists() else {},
        transformer_fields=transformer_fields,
    )


def _has_muon() -> bool:
    run = RunConfig()
    run.optimizer.optimizer = "muon"
    try:
        require_optimizer(run)
    except UserError:
        return False
    return True


def _blocked(path: Path, variants: Mapping[str, Any], transformer_fields: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, values in variants.items():
        try:
            check_fields(values, f"{path}, variant {name}", transformer_fields)
        except UserError as error:
            found[name] = str(error)
    return found
