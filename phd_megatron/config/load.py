"""One configuration from presets, the one saved in ``--load``, a YAML file and the command line; later ones win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from phd_megatron.config.aliases import Accept, Set
from phd_megatron.config.catalog import ALTERNATIVES, fields
from phd_megatron.config.flags import ParsedFlags, parse_flags
from phd_megatron.config.plain import Annotations, Plain, Values
from phd_megatron.config.presets import preset_values
from phd_megatron.config.resume import drop_what_is_lost, inherited, not_taken_over, schedule_of
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import dump_yaml, flatten, from_dict, load_yaml, of_values, read_yaml, to_dict
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

__all__ = ["LoadedConfig", "dump_yaml", "from_dict", "load_run_config", "load_yaml", "to_dict"]

Layer = tuple[Values, str | Mapping[str, str]]
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
    preset = preset_values(flags.preset) if flags.preset is not None else {}
    saved_values, schedule = inherited(everything, given), schedule_of(everything, given)
    values, origins, notes = _merged(
        [
            (preset, f"preset {flags.preset}"),
            (saved_values, f"saved in {load}"),
            (yaml_values, str(flags.config)),
            (flags.values, {name: f"flag {flag}" for name, flag in flags.origins.items()}),
            (schedule, f"saved in {load}"),
        ]
    )
    drop_what_is_lost(values, origins, f"saved in {load}")
    notes = [*flags.notes, *not_taken_over(everything, values, str(load)), *notes]
    _check_conditions(flags, {**preset, **saved_values, **yaml_values}, values)
    return LoadedConfig(of_values(values), origins, notes)


def merge_layers(layers: Sequence[Layer]) -> LoadedConfig:
    """Defaults, then each layer of ``field -> checked value`` with where its values are from; later ones win."""
    values, origins, notes = _merged(layers)
    return LoadedConfig(of_values(values), origins, notes)


def _merged(layers: Sequence[Layer]) -> tuple[dict[str, Plain], dict[str, str], list[str]]:
    """What some layer says, where each field is from, and which values were replaced by an alternative."""
    values: dict[str, Plain] = {}
    origins, notes = dict.fromkeys(fields(), "default"), []
    for layer, origin in layers:
        layer_origins = dict.fromkeys(layer, origin) if isinstance(origin, str) else origin
        for group in ALTERNATIVES:
            given = [name for name in group if name in layer and layer[name] != fields()[name].default]
            for name in group:
                if not given or name in layer or values.get(name, fields()[name].default) == fields()[name].default:
                    continue
                notes.append(
                    f"{name}={values.pop(name)!r} ({origins[name]}) is replaced by {given[0]}={layer[given[0]]!r} "
                    f"({layer_origins[given[0]]})"
                )
                origins[name] = "default"
        values |= layer
        origins |= layer_origins
    return values, origins, notes


def _check_conditions(flags: ParsedFlags, weaker: Values, values: Values) -> None:
    """Rows of aliases that depend on other values: those of weaker sources, and those of all."""
    for name, alias in flags.aliases.items():
        if isinstance(alias, Set) and alias.only_over and alias.field in weaker:
            old = weaker[alias.field]
            if old not in alias.only_over:
                raise UserError(
                    f"--{name.replace('_', '-')} means {alias.field}={alias.value!r}, but {alias.field}={old!r} is "
                    f"configured; leave the flag out, or give --{alias.field.replace('_', '-')} itself"
                )
        elif isinstance(alias, Accept) and alias.needs is not None and values.get(alias.needs) is None:
            raise UserError(
                f"--{name.replace('_', '-')} without --{alias.needs.replace('_', '-')}: the number is missing; give it"
            )
