"""The ``phd-megatron`` program: one table of commands, each a module with ``run(argv) -> exit code``."""

from __future__ import annotations

import difflib
import importlib
import sys

from phd_megatron import __version__
from phd_megatron.errors import UserError

COMMANDS = {
    "prepare": "turn text into Megatron .bin/.idx data",
    "pretrain": "train a model (also under torchrun)",
    "export": "write a checkpoint as a Hugging Face directory",
    "generate": "continue a prompt from a checkpoint or an exported directory",
    "doctor": "show versions and which implementation each operation uses here, and why",
    "bench": "measure attention and training on this machine",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: phd-megatron COMMAND [OPTIONS]", "", "commands:", *lines, "", "COMMAND --help says more."])


def main(argv: list[str] | None = None) -> int:
    """Run one command. 0 is success, 2 a refusal that the message explains."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"phd-megatron {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {name!r}{hint}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"phd_megatron.cli.{name}").run(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
