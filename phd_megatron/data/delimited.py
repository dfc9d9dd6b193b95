"""Documents out of .csv and .tsv files: a header, then a row each, as the standard library's ``csv`` reads them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from phd_megatron.data.json_lines import BYTE_ORDER_MARK
from phd_megatron.data.rows import Row, Undecodable, too_long
from phd_megatron.errors import UserError, shown

_QUOTING = (
    "put fields that hold delimiters, quotes or line breaks in double quotes, with each quote inside of them doubled, "
    "or write the file as JSON lines"
)


class _Lines:
    """The lines of one row after the other, decoded; what did not decode is noted."""

    def __init__(self, stream: io.BufferedReader, path: Path, largest: int) -> None:
        self._stream, self._path, self._largest = stream, path, largest
        self._read, self._row_bytes = 0, 0
        self.first_line, self.problem = 1, ""

    def begin_row(self) -> None:
        self._row_bytes, self.first_line, self.problem = 0, self._read + 1, ""

    def __iter__(self) -> Iterator[str]:
        while line := self._stream.readline(self._largest + 1):
            self._read += 1
            self._row_bytes += len(line)
            if self._row_bytes > self._largest:
                where = f"{self._path}:{self.first_line}"
                raise UserError(f"{too_long(where, 'row', self._largest)}; perhaps a quote in it has no end")
            if b"\0" in line:
                raise UserError(
                    f"{self._path}:{self._read}: no text but binary, or UTF-16: it holds a NUL byte; convert the file"
                )
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                self.problem = f"not utf-8 ({error.reason} at byte {error.start} of line {self._read})"
                text = line.decode("utf-8", "surrogateescape")
            yield text.removeprefix(BYTE_ORDER_MARK) if self._read == 1 else text


def table_rows(stream: io.BufferedReader, path: Path, key: str, largest: int, delimiter: str) -> Iterator[Row]:
    """A document a row of at most ``largest`` bytes: its field in the column called ``key``. Empty lines are none."""
    csv.field_size_limit(max(largest, csv.field_size_limit()))  # of the whole process, and too small at first
    lines = _Lines(stream, path, largest)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    column, width = -1, 0
    while True:
        lines.begin_row()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{lines.first_line}: no well-formed row ({error}); {_QUOTING}") from error
        if fields is None:
            return
        if not fields:
            continue
        where = f"{path}:{lines.first_line}"
        if column < 0:
            column, width = _column(fields, key, where, lines.problem), len(fields)
            continue
        if len(fields) != width:
            raise UserError(f"{where}: {len(fields)} fields in a row, but the header names {width}; {_QUOTING}")
        text: str | Undecodable = Undecodable(lines.problem) if lines.problem else fields[column]
        yield Row(f"line {lines.first_line}", where, text)


def _column(header: list[str], key: str, where: str, problem: str) -> int:
    if problem:
        raise UserError(f"{where}: the header is {problem}; convert the file to UTF-8")
    if header.count(key) == 1:
        return header.index(key)
    if key in header:
        raise UserError(
            f"{where}: the column {key!r} is there more than once, so which text is meant is open; keep one"
        )
    raise UserError(
        f"{where}: no column {key[:80]!r} (its columns: {shown(header)}); the first row names the columns, so name "
        "that of the text with --json-key"
    )
