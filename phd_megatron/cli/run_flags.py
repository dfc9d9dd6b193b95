"""Names of a run's options, for commands that take them beside flags of their own."""

from __future__ import annotations


def run_options() -> frozenset[str]:
    """Fields of a run, Megatron's other names for them, what switches them off, and where they may come from."""
    from phd_megatron.config.aliases import ALIASES
    from phd_megatron.config.catalog import fields

    return frozenset({*fields(), *(f"no_{name}" for name in fields()), *ALIASES, "config", "preset"})
