"""Bugs by chance: a line of the product, and one of the changes that it admits, both by a seed."""

from __future__ import annotations

import ast
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from .bugs import Bug, Near

PRODUCT = ("phd_megatron", "kernels")
_COMPARED = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_COMPUTED = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
_JOINED = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
#: calls whose arguments are read by people alone
_SAID = {"print", "log", "warning", "info", "debug", "error", "write", "warn", "_say", "say_once", "add_argument"}
#: arguments that change the look of something, or its speed on a GPU
_LOOKS = {"indent", "help", "encoding", "width", "figsize", "fontsize", "label", "num_warps", "num_stages", "prefix"}


class Change(NamedTuple):
    """Bytes of a source and what takes their place."""

    line: int
    begin: int
    end: int
    new: str
    what: str


@lru_cache(maxsize=1024)
def changes(source: bytes) -> tuple[Change, ...]:
    """Every change of one operator, constant, condition, argument or statement of a source, by position.

    A few of them do not parse; :func:`draw` leaves them out.
    """
    return tuple(sorted(_Finder(source).found))


def draw(root: Path, count: int, seed: int, near: Near, areas: Iterable[str] = ()) -> list[Bug]:
    """``count`` bugs, no two on one line: every line of the product that can be changed is as likely as any other.

    A line's turn follows from its own text, so what changes elsewhere leaves the draw as it is.

    Args:
        areas: only of files that belong to these; empty: all.
    """
    wanted = set(areas)
    places: dict[tuple[str, int], list[Change]] = defaultdict(list)
    sources = {path.relative_to(root).as_posix(): path.read_bytes() for path in product_files(root)}
    turns = {}
    for file, source in sources.items():
        if wanted and near.of(file)[0] not in wanted:
            continue
        lines, before = source.splitlines(), Counter[bytes]()
        for change in changes(source):
            places[file, change.line].append(change)
        for number in sorted(number for name, number in places if name == file):
            text = lines[number - 1].strip()
            before[text] += 1
            turns[file, number] = _number(seed, file, text, before[text])
    bugs: list[Bug] = []
    for file, line in sorted(turns, key=turns.__getitem__):
        if len(bugs) == count:
            break
        source = sources[file]
        chance = random.Random(turns[file, line])
        for change in chance.sample(places[file, line], len(places[file, line])):
            if _parses(source, change):
                area, tests = near.of(file)
                old = source[change.begin : change.end].decode()
                span = (change.begin, change.end)
                bugs.append(Bug(area or "?", file, change.what, span, old, change.new, line, tests, drawn=True))
                break
    return bugs


def _number(*parts: object) -> int:
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8], "big")


def _parses(source: bytes, change: Change) -> bool:
    try:
        ast.parse(source[: change.begin] + change.new.encode() + source[change.end :])
    except SyntaxError:
        return False
    return True


def product_files(root: Path) -> list[Path]:
    """Python files of the product."""
    return sorted(path for folder in PRODUCT for path in (root / folder).rglob("*.py"))


class _Finder:
    def __init__(self, source: bytes) -> None:
        self.source, self.found = source, set[Change]()
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        tree = ast.parse(source)
        self._body(tree.body)

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def _add(self, begin: int, end: int, new: str, what: str) -> None:
        self.found.add(Change(bisect_right(self._starts, begin), begin, end, new, what))

    def _between(self, left: ast.expr, right: ast.expr, words: tuple[str, str], what: str) -> None:
        begin, end = self._span(left)[1], self._span(right)[0]
        old = words[0].encode()
        gap = self.source[begin:end]
        # A comment may stand between the operands; an operator in it is not one.
        if gap.count(old) == 1 and b"#" not in gap:
            position = begin + gap.index(old)
            self._add(position, position + len(old), words[1], what)

    # ---------------------------------------------------------------- statements

    def _body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Expr) and _name(node.value) in _SAID:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        dropped = isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Continue | ast.Break) or (
            isinstance(node, ast.Assign) and any(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)
        )
        if dropped and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield | ast.YieldFrom)):
            self._add(*self._span(node), "pass", "statement dropped")
        if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Constant):
            begin, end = self._span(node.test)
            self._add(begin, end, f"not ({self.source[begin:end].decode()})", "condition negated")
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params", "msg"):
                continue
            if isinstance(node, ast.Raise) and field == "exc":
                continue  # a message
            self._visit(value)

    def _visit(self, value: object) -> None:
        if isinstance(value, list):
            for item in value:
                self._visit(item)
        elif isinstance(value, ast.stmt):
            self._statement(value)
        elif isinstance(value, ast.expr):
            self._expression(value)
        elif isinstance(value, ast.arguments):
            for default in [*value.defaults, *value.kw_defaults]:
                self._visit(default)
        elif isinstance(value, ast.AST):
            for _, item in ast.iter_fields(value):
                self._visit(item)

    # ---------------------------------------------------------------- expressions

    def _expression(self, node: ast.expr) -> None:
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Call) and _name(node) in _SAID):
            return
        if isinstance(node, ast.Call) and _name(node).endswith("Error"):
            return
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                self._between(left, right, _COMPARED[type(operator)], "comparison changed")
        elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED and not _is_text(node):
            self._between(node.left, node.right, _COMPUTED[type(node.op)], "operator changed")
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                self._between(left, right, _JOINED[type(node.op)], "and, or changed")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            self._add(self._span(node)[0], self._span(node.operand)[0], "", "sign or negation dropped")
        elif isinstance(node, ast.Constant):
            self._constant(node)
        elif isinstance(node, ast.IfExp):
            begin, end = self._span(node.test)
            self._add(begin, end, f"not ({self.source[begin:end].decode()})", "condition negated")
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                self._argument(keyword)
            self._visit([node.func, *node.args, *(k.value for k in node.keywords if k.arg not in _LOOKS)])
            return
        for _, child in ast.iter_fields(node):
            self._visit(child)

    def _argument(self, keyword: ast.keyword) -> None:
        if keyword.arg is None or keyword.arg in _LOOKS:
            return
        begin, end = self._span(keyword)
        rest = self.source[end:]
        end += len(rest) - len(rest.lstrip())
        if self.source[end : end + 1] == b",":
            self._add(begin, end + 1, "", "argument dropped")
        else:
            self._add(begin, end, "", "argument dropped")

    def _constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(*self._span(node), str(not node.value), "constant changed")
        elif isinstance(node.value, int):
            self._add(*self._span(node), str(node.value + 1), "constant changed")
        elif isinstance(node.value, float) and node.value:
            self._add(*self._span(node), repr(node.value * 2), "constant changed")


def _name(node: ast.expr) -> str:
    """The last name of what a call calls."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _is_text(node: ast.BinOp) -> bool:
    texts: Iterator[ast.expr] = (part for part in (node.left, node.right))
    return any(isinstance(part, ast.JoinedStr) or _is_string(part) for part in texts)


def _is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
