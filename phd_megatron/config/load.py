"""One configuration from presets, the one saved in ``--load``, a YAML file and the command line; later ones win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phd_megatron.config.aliases import Set
from phd_megatron.config.catalog import ALTERNATIVES, fields
from phd_megatron.config.flags import ParsedFlags, parse_flags
from phd_megatron.config.inherit import drop_what_is_lost, inherited, not_taken_over, schedule_of
from phd_megatron.config.plain import Annotations, Plain, Values
from phd_megatron.config.presets import preset_values
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign, dump_yaml, flatten, from_dict, load_yaml, lookup, read_yaml, to_dict
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

__all__ = ["LoadedConfig", "dump_yaml", "from_dict", "load_run_config", "load_yaml", "to_dict"]

SavedConfig = Values | Callable[[str], Values | None] | None


@dataclass
class LoadedConfig:
    """Result of :func:`load_run_config`.

    Attributes:
        config: merged and type-checked, not yet resolved (see :func:`phd_megatron.config.resolve.resolve`).
        origins: field name -> where its value is from: ``default``, a file, or a flag.
        notes: what the user should be told, one line each.
    """

    config: RunConfig
    origins: dict[str, str]
    notes: list[str]


def load_run_config(argv: list[str], *, transformer_fields: Annotations, saved: SavedConfig = None) -> LoadedConfig:
    """Merge defaults < presets (``--preset``) < saved configuration < YAML (``--config``) < flags.

    Args:
        argv: the words after the command's name. ``--help`` prints every field and raises ``SystemExit(0)``.
        transformer_fields: name -> annotation of every field of Megatron-Core's ``TransformerConfig``.
        saved: the configuration saved in ``--load`` as :func:`to_dict` gives it, or a function that is called with the
            directory given as ``load`` and returns it (None when the directory holds no checkpoint).

    Raises:
        UserError: for anything unknown or of the wrong type, with the nearest name or the expected type.
    """
    if "--help" in argv or "-h" in argv:
        from phd_megatron.config.help import help_text

        show(help_text(transformer_fields))
        raise SystemExit(0)
    flags = parse_flags(argv, transformer_fields)
    yaml_values: dict[str, Plain] = {}
    if flags.config is not None:
        yaml_values = flatten(read_yaml(flags.config), flags.config, transformer_fields)

    load = flags.values.get("load", yaml_values.get("load"))
    saved_data = (saved(str(load)) if load is not None else None) if callable(saved) else saved
    everything = {} if saved_data is None else flatten(saved_data, f"configuration saved in {load}", None)
    given = {**yaml_values, **flags.values}
    saved_values = inherited(everything, given)

    preset = preset_values(flags.preset) if flags.preset is not None else {}
    _check_conditions_before(flags, {**preset, **saved_values, **yaml_values})
    merged = merge_layers(
        [
            (preset, f"preset {flags.preset}"),
            (saved_values, f"saved in {load}"),
            (yaml_values, str(flags.config)),
            (flags.values, {name: f"flag {flag}" for name, flag in flags.origins.items()}),
            (schedule_of(everything, given), f"saved in {load}"),
        ]
    )
    drop_what_is_lost(merged.config, merged.origins, f"saved in {load}")
    merged.notes[:0] = [*flags.notes, *not_taken_over(everything, merged.config, str(load))]
    _check_conditions_after(flags, merged.config)
    return merged


def merge_layers(layers: Sequence[tuple[Values, str | Mapping[str, str]]]) -> LoadedConfig:
    """Defaults, then each layer of ``field -> checked value`` with where its values are from; later ones win."""
    merged = LoadedConfig(RunConfig(), dict.fromkeys(fields(), "default"), [])
    for values, origin in layers:
        _overlay(merged, values, dict.fromkeys(values, origin) if isinstance(origin, str) else origin)
    return merged


def _overlay(merged: LoadedConfig, values: Values, origins: Mapping[str, str]) -> None:
    for group in ALTERNATIVES:
        given = [name for name in group if name in values and values[name] != fields()[name].default]
        for name in group:
            if not given or name in values or lookup(merged.config, name) == fields()[name].default:
                continue
            old, place = lookup(merged.config, name), merged.origins[name]
            assign(merged.config, name, fields()[name].default)
            merged.origins[name] = "default"
            merged.notes.append(
                f"{name}={old!r} ({place}) is replaced by {given[0]}={values[given[0]]!r} ({origins[given[0]]})"
            )
    for name, value in values.items():
        assign(merged.config, name, value)
        merged.origins[name] = origins[name]


def _check_conditions_before(flags: ParsedFlags, weaker: Values) -> None:
    for name, alias in flags.aliases.items():
        if isinstance(alias, Set) and alias.only_over and alias.field in weaker:
            old = weaker[alias.field]
            if old not in alias.only_over:
                raise UserError(
                    f"--{name.replace('_', '-')} means {alias.field}={alias.value!r}, but {alias.field}={old!r} is "
                    f"configured; leave the flag out, or give --{alias.field.replace('_', '-')} itself"
                )


def _check_conditions_after(flags: ParsedFlags, config: RunConfig) -> None:
    for name, alias in flags.aliases.items():
        needs = None if isinstance(alias, Set) else alias.needs
        if needs is not None and lookup(config, needs) is None:
            raise UserError(
                f"--{name.replace('_', '-')} without --{needs.replace('_', '-')}: the number is missing; give it"
            )
