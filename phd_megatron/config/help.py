"""The text of ``--help`` and the printed form of a configuration."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from phd_megatron.config.aliases import ALIASES, Rename, describe_alias
from phd_megatron.config.catalog import FieldInfo, fields, sections
from phd_megatron.config.plain import Annotations, Plain
from phd_megatron.config.presets import PRESETS
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import values_of
from phd_megatron.config.unsupported import is_refused_by_name
from phd_megatron.config.values import describe, simplify

_INTRO = """\
Every field of a run is a flag and a line of the YAML file given with --config; flags win over YAML, YAML over the
configuration saved in --load, and that over --preset. Lists follow their flag: --data-path 0.7 P1 0.3 P2. A switch is
turned on by --flag and off by --no-flag. Underscores may stand for dashes."""


def help_text(transformer_fields: Annotations) -> str:
    """All flags by section with type, default and meaning."""
    lines = [_INTRO, "", "  --config FILE", "      YAML file with the sections below"]
    lines += ["  --preset NAME[,NAME]", "      named configurations, a later one on top (docs/presets.md):"]
    lines += textwrap.wrap(", ".join(PRESETS), 112, initial_indent="      ", subsequent_indent="      ")
    for section, cls in sections().items():
        lines += ["", f"{section}: {(cls.__doc__ or '').strip().splitlines()[0]}"]
        for info in fields().values():
            if info.section == section:
                lines += [f"  {info.flag}", f"      {_explain(info)}"]
    usable = [name for name in transformer_fields if name not in fields() and _is_usable(name, transformer_fields)]
    if usable:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(usable))
        lines += ["", "further fields of Megatron-Core's TransformerConfig, explained there:"]
        lines += textwrap.wrap(names, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["", "Megatron-LM's other flags:"]
    for name, alias in ALIASES.items():
        unusable = isinstance(alias, Rename) and is_refused_by_name(alias.field)
        lines.append(f"  --{name.replace('_', '-')}: {'refused: not available' if unusable else describe_alias(alias)}")
    return "\n".join(lines)


def _is_usable(name: str, transformer_fields: Annotations) -> bool:
    simple = simplify(transformer_fields[name])
    return simple is not None and not name.startswith("_") and not is_refused_by_name(name) and name not in ALIASES


def _explain(info: FieldInfo) -> str:
    default = "" if info.default is None else f", default {plain_text(info.default)}"
    return f"{info.help} ({describe(info.annotation)}{default})"


def plain_text(value: Plain) -> str:
    """A value as YAML, or a list as the words of its flag."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def format_config(config: RunConfig, origins: Mapping[str, str]) -> str:
    """The whole configuration, one line a field: value and where it is from (``derived`` if resolving filled it)."""
    lines, values = [], values_of(config)
    for section in sections():
        lines.append(f"{section}:")
        names = [name for name, info in fields().items() if info.section == section]
        for name in [*names, *(config.model.transformer if section == "model" else ())]:
            value, origin = values[name], origins.get(name, "default")
            if origin == "default":
                is_default = name in fields() and value == fields()[name].default
                origin = "" if is_default else "derived"
            lines.append(f"  {name}: {plain_text(value)}" + (f"  # {origin}" if origin else ""))
    return "\n".join(lines)
