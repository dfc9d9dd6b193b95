"""The commands in the fenced blocks of the documents, as a reader would copy them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELL, PYTHON = ("bash", "sh", "shell", "console"), ("python", "py")
#: what begins a command of ours, in a block that does not say that it is a shell's
_COMMAND = re.compile(r"^ *(\$ )?(phd-megatron|torchrun|python|bash|pip|make) ", re.MULTILINE)
_BLOCK = re.compile(r"^ *```([\w-]*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it is, the language it names, and its text."""

    document: str
    line: int
    language: str
    text: str

    def commands(self) -> list[str]:
        """Logical lines of a shell block, without comments and with one space between words; a Python block is one."""
        if self.language in PYTHON:
            return [self.text.strip()]
        joined = re.sub(r"\\\n", " ", self.text)
        lines = [re.sub(r"(^|\s)#.*$", "", line).removeprefix("$ ") for line in joined.splitlines()]
        return [" ".join(line.split()) for line in lines if line.strip()]


def documents() -> list[str]:
    """Every Markdown file that the project has written by hand or by a tool, relative to its root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch_scripts/*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(document: str) -> Iterator[Block]:
    """All fenced blocks of a document."""
    text = (ROOT / document).read_text("utf-8")
    for found in _BLOCK.finditer(text):
        yield Block(document, text.count("\n", 0, found.start()) + 1, found[1], found[2])


def commands(document: str) -> list[str]:
    """The commands of all shell and Python blocks, in order."""
    return [command for block in blocks(document) if block.language in SHELL + PYTHON for command in block.commands()]


def unlabelled(document: str) -> list[str]:
    """Blocks that hold commands and do not say so."""
    return [
        f"{document}:{block.line}"
        for block in blocks(document)
        if block.language not in SHELL + PYTHON and _COMMAND.search(block.text)
    ]
