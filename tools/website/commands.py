"""The page of all commands, from the parsers that read their flags."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from write_tables import markdown

from phd_megatron.bench.arguments import FLAGS
from phd_megatron.bench.arguments import parser as bench_parser
from phd_megatron.cli.bench import BENCHES
from phd_megatron.cli.main import COMMANDS, module_of

HEAD = """\
# Commands

`phd-megatron COMMAND [OPTIONS]`; each has `--help`. This page is made from the commands' own parsers. A command that
takes a run's fields as well takes all of the [configuration](configuration.md): `num_layers` is `--num-layers`.
"""
#: the command whose flags are the fields of a run
_OF_A_RUN = "pretrain"


def page() -> str:
    """The Markdown text."""
    lines = [HEAD]
    for name, meaning in COMMANDS.items():
        lines += [f"## {name}", ""]
        if name == _OF_A_RUN:
            lines += [
                _sentence(meaning),
                "",
                f"Its flags are the [fields of a run](configuration.md): `phd-megatron {name} --config FILE`.",
                "",
            ]
        elif name == "bench":
            lines += [_sentence(meaning), ""]
            for bench in FLAGS:
                parser = bench_parser(bench)
                what = BENCHES.get(bench.replace("_", "-"), "members of one model, by options of pretrain")
                lines += [f"### {parser.prog.removeprefix('phd-megatron ')}", "", _sentence(what), "", *_flags(parser)]
        else:
            parser = importlib.import_module(module_of(name)).build_parser()
            # Some parsers have the first line of their module, which names the command once more.
            own = parser.description if parser.description and not parser.description.startswith("``") else ""
            lines += [cell(own) or _sentence(meaning), "", *_flags(parser)]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text that stands in a cell of a table and means nothing to Markdown."""
    for sign in "\\`*_<>|[]":
        text = text.replace(sign, "\\" + sign if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return " ".join(text.split())


def code(text: str) -> str:
    """Code in a cell of a table."""
    return "`" + text.replace("|", r"\|") + "`" if text else ""


def _sentence(text: str) -> str:
    return cell(f"{text[0].upper()}{text[1:]}.")


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = argparse.HelpFormatter(parser.prog, width=100)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    yield from ("```text", formatter.format_help().strip(), "```", "")
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help is argparse.SUPPRESS:
            continue
        names = ", ".join(map(code, action.option_strings or [str(action.metavar or action.dest)]))
        meaning = cell(formatter._expand_help(action)) if action.help else ""
        rows.append((names, code(_values(action)), "yes" if action.required else "", meaning))
    yield markdown(("flag", "values", "required", "meaning"), rows)


def _values(action: argparse.Action) -> str:
    """What follows the flag."""
    if action.nargs == 0 or not action.option_strings:
        return ""
    if isinstance(action.metavar, str):
        word = action.metavar
    elif action.choices is not None:
        word = "|".join(map(str, action.choices))
    else:
        word = action.dest.upper()
    return f"{word} ..." if action.nargs in ("+", "*") else word
