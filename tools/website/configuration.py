"""The page of all fields of a run, from their annotations and comments in ``config/schema.py``."""

from __future__ import annotations

from collections.abc import Iterator

from write_tables import markdown

from phd_megatron.config.aliases import ALIASES, describe_alias
from phd_megatron.config.catalog import ALTERNATIVES, FieldInfo, fields, sections
from phd_megatron.config.facts import Role, range_words
from phd_megatron.config.help import plain_text
from phd_megatron.config.presets import PRESETS
from phd_megatron.config.values import describe
from website.commands import cell, code

HEAD = """\
# Configuration

Every field is a line of the YAML file given with `--config`, in its section, and a flag: `num_layers: 12` is
`--num-layers 12`. This page is made from [`config/schema.py`](../../phd_megatron/config/schema.py). Flags win over the
file, the file over what the checkpoint in `--load` was saved with, and that over `--preset`. `null` is "derived"; a run
prints the resolved value and what it came from. Further fields of Megatron-Core's `TransformerConfig` are taken by
their names and go into the section `model`.
"""
COLUMNS = ("field", "value", "default", "meaning", "kind")


def page() -> str:
    """The Markdown text."""
    lines = [HEAD, *_kinds(), *_alternatives()]
    for section, cls in sections().items():
        first = (cls.__doc__ or "").strip().splitlines()[0]
        rows = [_row(info) for info in fields().values() if info.section == section]
        lines += [f"## {section}", "", cell(first), "", markdown(COLUMNS, rows)]
    lines += ["## Presets", "", "`--preset NAME[,NAME]`; [what they are](../presets.md).", ""]
    lines += [markdown(("preset", "what"), [(code(name), cell(preset.title)) for name, preset in PRESETS.items()])]
    lines += ["## Megatron-LM's other flags", "", "Names that Megatron-LM has for something else of ours.", ""]
    aliases = [(code("--" + name.replace("_", "-")), cell(describe_alias(alias))) for name, alias in ALIASES.items()]
    lines += [markdown(("flag", "what becomes of it"), aliases)]
    return "\n".join(lines)


def _kinds() -> Iterator[str]:
    yield from ("## Kinds of fields", "", "What depends on a field, and from that what a resume does with it:", "")
    rows = [(f"`{role.name.lower()}`", cell(role.value), "yes" if role.is_inherited else "no") for role in Role]
    yield markdown(("kind", "what depends on it", "a resume takes it over"), rows)


def _alternatives() -> Iterator[str]:
    yield from ("Of each of these at most one is given:", "")
    yield from (f"- {', '.join(f'[`{name}`](#{name})' for name in group)}" for group in ALTERNATIVES)
    yield ""


def _row(info: FieldInfo) -> tuple[str, ...]:
    value = cell(describe(info.annotation))
    if info.bounds:
        value += f"; {range_words(info.bounds)}"
    meaning = cell(info.help)
    if info.needs is not None:
        meaning += f"; needs {cell(info.needs.reason)} ({cell(info.needs.cure)})"
    # Where links to one field lead.
    name = f'<a id="{info.name}"></a>{code(info.name)}'
    return name, value, code(plain_text(info.default)), meaning, f"`{info.role.name.lower()}`"
