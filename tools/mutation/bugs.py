"""What a bug is, and the tables under ``tests/mutants``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PLANTED, NEAR, EQUIVALENT = "planted", "near", "equivalent.yaml"


class TableError(ValueError):
    """A row that cannot be right; the message names it."""


@dataclass(frozen=True)
class Bug:
    """One change of one file.

    Attributes:
        file: below the root of the checkout.
        span: bytes of the file that are replaced.
        tests: what pytest is given, the quickest first; empty for a file that no table knows.
        drawn: by chance, and not written by hand.
    """

    area: str
    file: str
    what: str
    span: tuple[int, int]
    old: str
    new: str
    line: int
    tests: tuple[str, ...] = field(default=(), compare=False)
    drawn: bool = False

    def apply(self, source: bytes) -> bytes:
        begin, end = self.span
        if source[begin:end] != self.old.encode():
            raise TableError(f"{self.file} has changed: {self.old!r} is not at its place")
        return source[:begin] + self.new.encode() + source[end:]

    def context(self, root: Path) -> str:
        """The changed line before and after."""
        source = (root / self.file).read_bytes()
        return f"{_line(source, self.span[0])}  ->  {_line(self.apply(source), self.span[0])}"


def _line(source: bytes, position: int) -> str:
    begin = source.rfind(b"\n", 0, position) + 1
    end = source.find(b"\n", position)
    return source[begin : end if end >= 0 else len(source)].decode().strip()


def planted(tables: Path, root: Path) -> list[Bug]:
    """All rows of ``planted/<area>.yaml``, looked up in the files of ``root``.

    Raises:
        TableError: a row is incomplete, or its text is not there exactly once.
    """
    return [
        _from_row(path.stem, row, path.name, root)
        for path in sorted((tables / PLANTED).glob("*.yaml"))
        for row in read_rows(path, {"file", "bug", "old", "new", "tests"})
    ]


def read_rows(path: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The rows of a table, each with these keys and no other."""
    rows = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    for row in rows:
        if not isinstance(row, dict) or set(row) != keys:
            raise TableError(f"{path.name}: a row has the keys {', '.join(sorted(keys))}: {row}")
    return rows


def _from_row(area: str, row: dict[str, Any], table: str, root: Path) -> Bug:
    old, new, file = row["old"], row["new"], row["file"]
    if not (root / file).is_file():
        raise TableError(f"{table}: there is no {file} ({row['bug']})")
    source = (root / file).read_bytes()
    found = source.count(old.encode())
    if found != 1:
        raise TableError(f"{table}: {old!r} stands {found} times in {file}, and a row names one place ({row['bug']})")
    begin = source.index(old.encode())
    span, line = (begin, begin + len(old.encode())), source.count(b"\n", 0, begin) + 1
    line += _equal_lines(old, new)
    return Bug(area, file, row["bug"], span, old, new, line, tuple(row["tests"]))


def _equal_lines(old: str, new: str) -> int:
    """Lines that a change begins with and leaves as they are: what it changes stands below them."""
    count = 0
    for one, other in zip(old.splitlines()[:-1], new.splitlines(), strict=False):
        if one != other:
            break
        count += 1
    return count


class Near:
    """Which tests look at a file: ``near/<area>.yaml`` maps files and folders to them, and the longest entry wins."""

    def __init__(self, tables: Path) -> None:
        self._entries: dict[str, tuple[str, tuple[str, ...]]] = {}
        for path in sorted((tables / NEAR).glob("*.yaml")):
            for prefix, tests in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).items():
                if prefix in self._entries:
                    raise TableError(f"{path.name}: {prefix} stands in {self._entries[prefix][0]}.yaml too")
                self._entries[prefix] = (path.stem, tuple(tests))

    def of(self, file: str) -> tuple[str, tuple[str, ...]]:
        """Area and tests of a file; ``("", ())`` when no table knows it."""
        fitting = [prefix for prefix in self._entries if file == prefix or file.startswith(prefix.rstrip("/") + "/")]
        return self._entries[max(fitting, key=len)] if fitting else ("", ())

    @property
    def prefixes(self) -> list[str]:
        return sorted(self._entries)

    @property
    def tests(self) -> set[str]:
        return {test for _, tests in self._entries.values() for test in tests}


def equivalent(tables: Path) -> dict[tuple[str, str], str]:
    """(file, changed line before and after) -> why no test can tell them apart."""
    path = tables / EQUIVALENT
    rows = read_rows(path, {"file", "change", "why"}) if path.exists() else []
    return {(row["file"], row["change"]): row["why"] for row in rows}
