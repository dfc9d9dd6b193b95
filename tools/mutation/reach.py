"""Which lines a test runs: a bug on any other is not seen by it, so it need not be tried."""

from __future__ import annotations

import ast
from pathlib import Path

#: Python files whose lines also run under another name: in exported directories, and as Triton's own copy of a function
ELSEWHERE = ("kernels/", "phd_megatron/phd/", "phd_megatron/norm/", "phd_megatron/huggingface/bundle/")
CHILDREN = "MUTATE_CHILDREN"
#: Read by every Python process that a test starts: leaves a file, so that a test with such processes is known. The
#: first process leaves one for each Python and each script that it starts itself, since those may get another path; not
#: for the programs that pytest's plugins ask.
SITECUSTOMIZE = f'''
import os
import sys


def leave(more=""):
    open(os.path.join(os.environ["{CHILDREN}"], f"{{os.getpid()}}{{more}}"), "w").close()


def heard(event, arguments):
    if event == "subprocess.Popen":
        words = arguments[1] if isinstance(arguments[1], (list, tuple)) else [arguments[1]]
        if os.path.basename(os.fsdecode(words[0])).startswith(("python", "torchrun", "bash", "sh")):
            leave("-started")


if os.environ.get("{CHILDREN}"):
    leave()
    os.register_at_fork(after_in_child=leave)
    sys.addaudithook(heard)
'''


class Reach:
    """What one test ran.

    Args:
        lines: file below the root -> its lines that ran; None: it started processes, which nobody watched.
    """

    def __init__(self, lines: dict[str, frozenset[int]] | None) -> None:
        self._lines = lines

    def runs(self, file: str, statement: range) -> bool:
        """Whether the test may have run a statement, by the lines that it stands on."""
        if self._lines is None or file.startswith(ELSEWHERE):
            return True
        return not self._lines.get(file, frozenset()).isdisjoint(statement)


def read(data_file: Path, root: Path, children: Path) -> Reach:
    """What coverage.py found."""
    from coverage import CoverageData

    if len(list(children.iterdir())) > 1 or not data_file.exists():
        return Reach(None)
    data = CoverageData(str(data_file))
    data.read()
    return Reach(
        {
            Path(name).relative_to(root).as_posix(): frozenset(data.lines(name) or ())
            for name in data.measured_files()
            if Path(name).is_relative_to(root)
        }
    )


def statement_lines(source: bytes, line: int) -> range:
    """The lines of the innermost statement at a line; of one with a body, those before the body."""
    best = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None)
        end = body[0].lineno if body else (node.end_lineno or node.lineno) + 1
        lines = range(node.lineno, max(end, node.lineno + 1))
        if line in lines and (len(best) == 1 or len(lines) <= len(best)):
            best = lines
    return best
