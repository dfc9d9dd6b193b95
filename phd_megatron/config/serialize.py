"""A run configuration as plain data and as YAML, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from phd_megatron.config.aliases import ALIASES, Rename, Set
from phd_megatron.config.catalog import PASSTHROUGH, fields, nearest, sections
from phd_megatron.config.plain import Annotations, Plain, Values
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.values import check_value, refuse_shell_slips
from phd_megatron.config.yaml_text import read_yaml_file
from phd_megatron.errors import UserError, shown


def to_dict(config: RunConfig) -> dict[str, dict[str, Plain]]:
    """Section -> field -> value, made of plain YAML types and independent of ``config``."""
    return dataclasses.asdict(config)


def from_dict(data: Values, where: str = "configuration") -> RunConfig:
    """The inverse of :func:`to_dict`. Absent fields take their defaults.

    Raises:
        UserError: for an unknown section or field, or a value of the wrong type. ``where`` names the source.
    """
    return of_values(flatten(data, where, None))


def values_of(config: RunConfig) -> dict[str, Plain]:
    """Field name -> value: all of ours, then what is given of ``TransformerConfig``; independent of ``config``."""
    flat = {name: value for section in to_dict(config).values() for name, value in section.items()}
    further = flat.pop(PASSTHROUGH)
    assert isinstance(further, dict)
    return flat | further


def of_values(values: Values) -> RunConfig:
    """The configuration with these values, checked before, and defaults for other fields."""
    config = RunConfig()
    for name, value in values.items():
        assign(config, name, value)
    return config


def changed(config: RunConfig) -> dict[str, dict[str, Plain]]:
    """Section -> field -> value of what is not the default, for a file that people read."""
    found: dict[str, dict[str, Plain]] = {section: {} for section in sections()}
    for name, info in fields().items():
        value = lookup(config, name)
        if value != info.default:
            found[info.section][name] = value
    found["model"].update(config.model.transformer)
    return {section: values for section, values in found.items() if values}


def dump_yaml(config: RunConfig, path: str | Path) -> None:
    """Write every field of the configuration."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def load_yaml(path: str | Path) -> RunConfig:
    """Read what :func:`dump_yaml` wrote, strictly.

    Raises:
        UserError: if the file cannot be read, or says something that is no configuration.
    """
    return from_dict(read_yaml(path), str(path))


def assign(config: RunConfig, name: str, value: Plain) -> None:
    """Set one field by its unique name; a name that is not ours is a ``TransformerConfig`` field."""
    info = fields().get(name)
    if info is None:
        config.model.transformer[name] = value
    else:
        setattr(getattr(config, info.section), name, value)


def lookup(config: RunConfig, name: str) -> Any:
    """The value of one field by its unique name; None for a ``TransformerConfig`` field that is not set."""
    info = fields().get(name)
    return config.model.transformer.get(name) if info is None else getattr(getattr(config, info.section), name)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: if the file is missing, is not UTF-8 or YAML, says a key twice, stands for more than a configuration
            can hold, or is not a mapping.
    """
    data = read_yaml_file(path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, not sections; write `model:` and its fields below it")
    return data


def flatten(data: Values, where: str, transformer_fields: Annotations | None) -> dict[str, Plain]:
    """Sections to ``field name -> checked value``.

    ``transformer_fields`` are the names and annotations that may stand under ``model:``, also below
    ``model: transformer:``. With None, whatever stands below ``transformer`` is taken as it is: it was checked when it
    was written.
    """
    flat: dict[str, Plain] = {}
    for section, content in data.items():
        if section not in sections():
            raise UserError(f"{where}: unknown section {shown(section)}; {_section_hint(str(section))}")
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise UserError(f"{where}: section {section!r} holds {shown(content)}; write its fields below it, indented")
        for name, value in content.items():
            if section == "model" and name == PASSTHROUGH:
                flat.update(_passthrough(value, where, transformer_fields))
            elif name in fields() and fields()[name].section == section:
                flat[name] = check_value(name, value, fields()[name].annotation, f"{where}, section {section}")
                if transformer_fields is not None:  # what a checkpoint says was checked when it was written
                    refuse_shell_slips(name, value, f"{where}, section {section}")
            elif section == "model" and name not in fields() and name in (transformer_fields or {}):
                flat.update(_passthrough({name: value}, where, transformer_fields))
            else:
                hint = _field_hint(str(name), section, transformer_fields or {})
                raise UserError(f"{where}: unknown field {shown(name)} in section {section!r}; {hint}")
    return flat


def _passthrough(values: Plain, where: str, annotations: Annotations | None) -> dict[str, Plain]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: model.transformer holds {shown(values)}; write TransformerConfig fields below it")
    checked = {}
    for name, value in values.items():
        if name in fields():
            raise UserError(
                f"{where}: {name} does not belong below model.transformer; write it in section {fields()[name].section}"
            )
        if annotations is None:
            checked[name] = value
        elif name in annotations:
            checked[name] = check_value(name, value, annotations[name], f"{where}, section model")
        else:
            hint = nearest(str(name), annotations) or "the installed Megatron-Core has no such field"
            raise UserError(f"{where}: unknown TransformerConfig field {shown(name)}; {hint}")
    return checked


def _section_hint(name: str) -> str:
    if name in fields():
        return f"it is a field: write it below `{fields()[name].section}:`"
    return nearest(name, sections()) or f"the sections are {', '.join(sections())}"


def _field_hint(name: str, section: str, transformer_fields: Annotations) -> str:
    if name in fields():
        return f"it belongs in section {fields()[name].section!r}"
    alias = ALIASES.get(name)
    if isinstance(alias, Rename):
        return f"in YAML write {alias.field}"
    if isinstance(alias, Set):
        return f"in YAML write `{alias.field}: {str(alias.value).lower()}`"
    if alias is not None:
        return f"it is a flag only (--{name.replace('_', '-')}); leave it out"
    own = [key for key, info in fields().items() if info.section == section]
    others = [*transformer_fields, *fields()] if section == "model" else list(fields())
    near = nearest(name, own) or nearest(name, others)
    return near or "the fields are " + ", ".join(own)
