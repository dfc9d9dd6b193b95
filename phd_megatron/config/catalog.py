"""The list of all fields with what is known of each, read from :mod:`phd_megatron.config.schema`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from phd_megatron.config.facts import Belongs, Bound, Needs, Role, bounds_of, groups_of, needs_of, role_of
from phd_megatron.config.plain import Annotation
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.transformer_fields import transformer_role

PASSTHROUGH = "transformer"
"""The one field of ``ModelConfig`` that is no flag: it holds further ``TransformerConfig`` fields by name."""

ALTERNATIVES: tuple[tuple[str, ...], ...] = (
    ("train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens", "lr_warmup_fraction"),
    ("eval_interval", "evals_per_run"),
    ("bf16", "fp16"),
    ("data_path", "train_data_path"),
    ("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
)
"""Fields that say the same thing in different ways: at most one of each group is given, and one that is given replaces
the others of weaker sources."""

_HELP_LINE = re.compile(r"^ {4}#: (.+)\n {4}(\w+):", re.MULTILINE)


@dataclass(frozen=True)
class FieldInfo:
    """One field of one section.

    ``annotation`` is its type without facts, ``default`` a fresh value where the field has a factory.
    """

    section: str
    name: str
    annotation: Annotation
    default: Any
    help: str
    role: Role
    bounds: tuple[Bound, ...]
    needs: Needs | None
    groups: frozenset[Belongs]

    @property
    def flag(self) -> str:
        """The field's spelling on the command line, such as ``--num-layers``."""
        return "--" + self.name.replace("_", "-")


@lru_cache(maxsize=1)
def sections() -> dict[str, type]:
    """Section name -> dataclass, in the order of :class:`RunConfig`."""
    return typing.get_type_hints(RunConfig)


@lru_cache(maxsize=1)
def fields() -> dict[str, FieldInfo]:
    """Every field by name, which is unique over all sections. ``model.transformer`` is left out."""
    found: dict[str, FieldInfo] = {}
    for section, cls in sections().items():
        annotations, facts = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
        texts = _help_texts(cls)
        for field in dataclasses.fields(cls):
            if field.name == PASSTHROUGH:
                continue
            if field.name in found:
                raise TypeError(f"field {field.name!r} is in sections {found[field.name].section!r} and {section!r}")
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            found[field.name] = FieldInfo(
                section,
                field.name,
                annotations[field.name],
                default,
                texts.get(field.name, ""),
                role_of(facts[field.name]),
                bounds_of(facts[field.name]),
                needs_of(facts[field.name]),
                groups_of(facts[field.name]),
            )
    return found


def role(name: str) -> Role:
    """The role of a field, ours or ``TransformerConfig``'s."""
    return fields()[name].role if name in fields() else transformer_role(name)


def _help_texts(cls: type) -> dict[str, str]:
    """Field name -> text of the line ``#:`` above it. Empty where the source is not there (a frozen program)."""
    try:
        return {name: text for text, name in _HELP_LINE.findall(inspect.getsource(cls))}
    except OSError:
        return {}


def nearest(name: str, choices: Iterable[str], template: str = "did you mean {}?") -> str | None:
    """The choice most like ``name`` put into ``template``, or None when nothing is close."""
    if len(name) > 200:  # comparing takes the square of the length
        return None
    near = difflib.get_close_matches(name, list(choices), 1, cutoff=0.6)
    return template.format(near[0]) if near else None
