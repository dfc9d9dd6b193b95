"""What the sources measure, by room: files, lines, loose types and long functions; and what starting up costs.

``measure_house.py [--json] [--runs N] [--root CHECKOUT]``. A loose type is each ``Any``, ``object``, ``cast`` and
``type: ignore``. Long functions have more than 50 lines, signature and docstring included; those that Triton compiles
are counted apart. Times are the least of N runs of a new process.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

LONG = 50
LOOSE = frozenset({"Any", "object", "cast"})
STARTS = {
    "import phd_megatron": ["-c", "import phd_megatron"],
    "phd-megatron --help": ["-m", "phd_megatron", "--help"],
}
_OTHERS = ("kernels", "tools", "tests")


@dataclass
class Room:
    """What one folder measures; ``long`` and ``long_triton`` name functions with their lines."""

    name: str
    files: int = 0
    lines: int = 0
    loose: int = 0
    long: dict[str, int] = field(default_factory=dict)
    long_triton: dict[str, int] = field(default_factory=dict)

    @property
    def loose_per_thousand(self) -> float:
        """Loose types in 1,000 lines."""
        return 1000 * self.loose / self.lines if self.lines else 0.0

    def add(self, path: Path, where: str) -> None:
        """Count a file; ``where`` names it."""
        text = path.read_text("utf-8")
        tree = ast.parse(text)
        self.files += 1
        self.lines += len(text.splitlines())
        self.loose += loose_types(text, tree)
        for name, lines, is_triton in functions(tree):
            if lines > LONG:
                (self.long_triton if is_triton else self.long)[f"{where}:{name}"] = lines


def loose_types(text: str, tree: ast.AST) -> int:
    """How often a file says ``Any``, ``object``, ``cast`` (imports apart) or ``type: ignore``."""
    names = sum(isinstance(node, ast.Name) and node.id in LOOSE for node in ast.walk(tree))
    attributes = sum(
        isinstance(node, ast.Attribute)
        and node.attr in ("Any", "cast")
        and isinstance(node.value, ast.Name)
        and node.value.id == "typing"
        for node in ast.walk(tree)
    )
    comments = (
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    )
    return names + attributes + sum("type: ignore" in comment for comment in comments)


def functions(tree: ast.AST) -> Iterator[tuple[str, int, bool]]:
    """Name, lines and whether Triton compiles it, of every function of a file, those inside others too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            is_triton = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
            yield node.name, node.end_lineno - node.lineno + 1, is_triton


def rooms(root: Path) -> list[Room]:
    """The rooms of the package, its own files (``.``) first, then ``kernels``, ``tools`` and ``tests``."""
    found: dict[str, Room] = {}
    for top in ("phd_megatron", *_OTHERS):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).parts
            name = top if top in _OTHERS else parts[1] if len(parts) > 2 else "."
            found.setdefault(name, Room(name)).add(path, path.relative_to(root).as_posix())
    return list(found.values())


def product(every: list[Room]) -> Room:
    """The package and the kernels together."""
    total = Room("product")
    for room in every:
        if room.name not in ("tools", "tests"):
            total.files += room.files
            total.lines += room.lines
            total.loose += room.loose
            total.long |= room.long
            total.long_triton |= room.long_triton
    return total


def seconds(arguments: list[str], root: Path, runs: int) -> float:
    """The least time that Python with these arguments takes in ``root``."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return min(times)


def table(every: list[Room], times: dict[str, float]) -> str:
    """Plain text, a room a line."""
    lines = [f"{'room':<14}{'files':>6}{'lines':>8}{'loose':>7}{'per 1000':>10}{'long':>6}{'triton':>8}"]
    for room in [*every, product(every)]:
        lines.append(
            f"{room.name:<14}{room.files:>6}{room.lines:>8}{room.loose:>7}{room.loose_per_thousand:>10.1f}"
            f"{len(room.long):>6}{len(room.long_triton):>8}"
        )
    whole = product(every)
    lines += ["", f"functions of the product over {LONG} lines, Triton's apart:"]
    lines += [f"  {size:>4} {name}" for name, size in sorted(whole.long.items(), key=lambda item: -item[1])]
    lines += ["", *(f"{name}: {value:.2f} s" for name, value in times.items())]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--runs", type=int, default=3, help="processes that are timed; 0 times none")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    options = parser.parse_args(argv)
    every = rooms(options.root)
    times = {name: seconds(words, options.root, options.runs) for name, words in STARTS.items() if options.runs > 0}
    if not options.json:
        print(table(every, times))
        return
    described = [{**asdict(room), "loose_per_thousand": room.loose_per_thousand} for room in [*every, product(every)]]
    print(json.dumps({"rooms": described, "seconds": times}, indent=1))


if __name__ == "__main__":
    main()
