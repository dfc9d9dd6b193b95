"""The package's rooms, the floors that they stand on, and who imports whom, read from the sources.

A room is a folder of ``phd_megatron``; ``kernels/<op>`` belongs to the room ``kernels``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "phd_megatron"

FLOORS = (
    ("config", "phd", "norm", "console"),
    ("kernels", "runtime"),
    ("model",),
    ("checkpoint",),
    ("data", "huggingface", "planning"),
    ("training", "serving"),
    ("sweep", "parity", "bench"),
    ("cli",),
)
"""From the ground up. Imports go down, or along a floor without coming back."""

FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Every module by its import name; ``kernels/<op>`` counts as ``phd_megatron.kernels.<op>``."""
    found = {}
    for base, prefix in ((PACKAGE, "phd_megatron"), (ROOT / "kernels", "phd_megatron.kernels")):
        for path in sorted(base.rglob("*.py")):
            parts = [prefix, *path.relative_to(base).with_suffix("").parts]
            found[".".join(parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names a file imports anywhere, lazily too, with the line."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((".".join([*stem, alias.name]), node.lineno) for alias in node.names)


def room(name: str) -> str | None:
    """``phd_megatron.norm.schemes`` to ``norm``; None outside the floors."""
    words = name.split(".")
    return words[1] if words[0] == "phd_megatron" and len(words) > 1 and words[1] in FLOOR else None


def edges() -> Iterator[tuple[str, str, str]]:
    """(importing room, imported room, where) over the whole package."""
    for name, path in modules().items():
        for target, line in imports(name, path):
            source, goal = room(name), room(target)
            if source and goal and source != goal:
                yield source, goal, f"{path.relative_to(ROOT)}:{line}"


def lines() -> dict[str, int]:
    """Lines of each room."""
    found = dict.fromkeys(FLOOR, 0)
    for name, path in modules().items():
        if (mine := room(name)) is not None:
            found[mine] += len(path.read_text("utf-8").splitlines())
    return found
