"""Documents out of files of all kinds, without ever holding a whole corpus.

A file of text is one document, and comes in several pieces when it is long; joined they are exactly the file's text.
Of a file of many documents each row is one: a line, an element, a row, a sample (`data/rows.py`).
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from phd_megatron.data.arrow_files import arrow_rows, parquet_rows
from phd_megatron.data.compressed import is_compressed, opened
from phd_megatron.data.cuts import BLOCK, Anywhere, Cutter
from phd_megatron.data.delimited import table_rows
from phd_megatron.data.inputs import COLUMN_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES, suffix_of
from phd_megatron.data.json_lines import array_rows, is_array, line_rows
from phd_megatron.data.rows import Damaged, Row, Undecodable, too_long
from phd_megatron.data.tar_files import tar_rows
from phd_megatron.data.text_encoding import decoded, encoding_of
from phd_megatron.errors import UserError

#: A longer text file is cut into pieces of about this many characters, where the tokenizer allows it. The pieces become
#: separate sequences of one document, which is also what lets a single large file be split into training and validation
#: parts.
PIECE_CHARACTERS = 1 << 16
#: Characters of a text that cannot be cut, and bytes of a JSON line. What is longer is no document, and a tokenizer
#: needs some 30 times the memory.
LARGEST_TEXT = 1 << 28
_READ_BYTES = 1 << 20
#: Up to this size a file is decoded in one go; above, --on-decode-error skip reads it twice.
_ONE_GO_BYTES = 4 << 20

OnDecodeError = Literal["fail", "skip"]


class Piece(NamedTuple):
    """A stretch of one document. A whole document is ``Piece(text, True, True)``; ``text`` may be empty only then.

    It is to be tokenized behind ``context``, whose tokens belong to the piece before, and becomes so many sequences.
    """

    text: str
    first: bool
    last: bool
    context: str = ""
    sequences: int = 1


@dataclass
class ReadReport:
    """What a pass over the input came across; filled while the pieces are drawn."""

    files: int = 0
    bytes_read: int = 0  #: of the files as they lie on disk, so that progress against their total size is right
    #: file, reason and, of a file of many documents, how many lines, rows, ...
    skipped: list[dict[str, str | int]] = field(default_factory=list)

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append({"file": str(path), "reason": reason})


def _next_cut(text: str, start: int, searched: int, cutter: Cutter, at_end: bool) -> tuple[int | None, int]:
    """Where the piece that begins at ``start`` ends; None when more of the text is to be seen, or nowhere.

    Twice a piece is kept back, so that the last one is never tiny and a place is judged by what is behind it.
    ``searched``: so many characters of the piece were searched before; the second value is the new number.
    """
    size, have = PIECE_CHARACTERS, len(text) - start
    spare = max(size, cutter.reach)
    if have <= size + size // 2 if at_end else have < size + spare:
        return None, searched
    if not searched:
        place = cutter.last(text, start, start + size // 2, start + size)
        if place is not None:
            return place, 0
        searched = size
    # In whole blocks, so that the places which are tried do not depend on how the text is read.
    high = have - size // 2 if at_end else (have - spare) // BLOCK * BLOCK
    if high <= searched:
        return None, searched
    return cutter.first(text, start, start + searched, start + high), high


def _pieces(chunks: Iterable[str], cutter: Cutter | None, path: Path) -> Iterator[Piece]:
    """Regroup the text of one document into pieces that do not depend on how it was read."""
    held: list[str] = []
    size = searched = 0
    context, first = "", True
    for chunk in itertools.chain(chunks, [None]):
        held += [chunk] if chunk else []
        size += len(chunk or "")
        if cutter is not None:
            buffer, start = "".join(held), 0
            while True:
                place, searched = _next_cut(buffer, start, searched, cutter, at_end=chunk is None)
                if place is None:
                    break
                yield _piece(buffer[start:place], first, False, context)
                context, start, searched, first = cutter.context(buffer, place), place, 0, False
            held = [buffer[start:]]
            size = len(held[0])
        if size > LARGEST_TEXT:
            raise UserError(
                f"{path}: {size} characters without a place at which this tokenizer allows to cut are more than "
                f"{LARGEST_TEXT}; give the text in shorter files, or as JSON lines, a document a line"
            )
    yield _piece("".join(held), first, True, context)


def _piece(text: str, first: bool, last: bool, context: str) -> Piece:
    return Piece(text, first, last, context, max(1, round(len(text) / PIECE_CHARACTERS)))


def _blocks(path: Path, report: ReadReport | None) -> Iterator[bytes]:
    """The content of a text file. ``report`` counts bytes; None only looks."""
    stream, raw = opened(path)
    with raw, stream:
        base = report.bytes_read if report is not None else 0
        while block := stream.read(_READ_BYTES):
            if report is not None:
                report.bytes_read = base + raw.tell()
            yield block


def _declared_encoding(path: Path) -> str:
    stream, raw = opened(path)
    with raw, stream:
        return encoding_of(path, lambda: stream.readline(LARGEST_TEXT))


def _read_text(
    path: Path, report: ReadReport, on_decode_error: OnDecodeError, cutter: Cutter | None
) -> Iterator[Piece]:
    try:
        encoding = _declared_encoding(path)
        if path.stat().st_size <= _ONE_GO_BYTES and not is_compressed(path):
            yield from _pieces(["".join(decoded(_blocks(path, report), encoding))], cutter, path)
            return
        if on_decode_error == "skip":  # a file is skipped whole or not at all, so look before the first piece leaves
            for _ in decoded(_blocks(path, None), encoding):
                pass
        yield from _pieces(decoded(_blocks(path, report), encoding), cutter, path)
    except Undecodable as error:
        if on_decode_error == "fail":
            raise UserError(
                f"{path} is {error}; convert the file, leave it out, or use --on-decode-error skip to leave out "
                f"every such file and list it"
            ) from error
        report.skip(path, str(error))
    except Damaged as error:
        raise UserError(f"{path}: damaged ({error}); copy or download the file again") from error


def _read_rows(
    path: Path, rows: Iterator[Row], report: ReadReport, on_decode_error: OnDecodeError, cutter: Cutter | None
) -> Iterator[Piece]:
    bad, first_reason = 0, ""
    place = "its beginning" if suffix_of(path) == ".tar" else "line 0"
    try:
        for row in rows:
            place = row.place
            unit = place.split()[0]
            if isinstance(row.text, Undecodable):
                if on_decode_error == "fail":
                    raise UserError(
                        f"{row.where}: {row.text}; correct the {unit}, or use --on-decode-error skip to leave out "
                        f"such {unit}s and list their files"
                    ) from row.text
                bad += 1
                first_reason = first_reason or f"first at {place}: {row.text}"
            elif len(row.text) > LARGEST_TEXT:
                raise UserError(too_long(row.where, unit, LARGEST_TEXT))
            elif row.is_file:
                yield from _pieces([row.text], cutter, path)
            else:
                yield Piece(row.text, True, True)
    except Damaged as error:
        raise UserError(f"{path}: damaged after {place} ({error}); copy or download the file again") from error
    if bad:
        report.skipped.append({"file": str(path), "reason": first_reason, f"{unit}s": bad})


def _rows(path: Path, suffix: str, key: str, report: ReadReport) -> Iterator[Row]:
    """The rows of a file of many documents. ``report`` counts bytes."""
    base, size = report.bytes_read, path.stat().st_size

    def seen(done: int) -> None:
        report.bytes_read = base + done

    if suffix in COLUMN_SUFFIXES:
        yield from (parquet_rows if suffix == ".parquet" else arrow_rows)(path, key, seen)
    else:
        stream, raw = opened(path)
        with raw, stream:
            for row in _stream_rows(stream, path, suffix, key):
                seen(raw.tell())
                yield row
    seen(size)


def _stream_rows(stream: io.BufferedReader, path: Path, suffix: str, key: str) -> Iterator[Row]:
    if suffix in TABLE_SUFFIXES:
        return table_rows(stream, path, key, LARGEST_TEXT, TABLE_SUFFIXES[suffix])
    if suffix == ".tar":
        return tar_rows(stream, path, key, LARGEST_TEXT)
    if suffix == ".json" and is_array(stream):
        return array_rows(stream, path, key, LARGEST_TEXT)
    return line_rows(stream, path, key, LARGEST_TEXT)


_ANYWHERE = Anywhere()


def read_pieces(
    files: Sequence[Path],
    report: ReadReport,
    *,
    json_key: str = "text",
    on_decode_error: OnDecodeError = "fail",
    cutter: Cutter | None = _ANYWHERE,
) -> Iterator[Piece]:
    """The documents of ``files`` in order. ``report`` is filled on the way.

    ``cutter`` says where the text of a long file can be cut, with None it is not.

    Raises UserError for what cannot be read, with file, line where there is one, and the cure. Invalid UTF-8 is such
    an error with ``fail``; with ``skip`` the text file, or the JSON line, is left out and listed in the report.
    """
    for path in files:
        suffix = suffix_of(path)
        report.files += 1
        try:
            if suffix in TEXT_SUFFIXES:
                yield from _read_text(path, report, on_decode_error, cutter)
            elif suffix is not None:
                yield from _read_rows(path, _rows(path, suffix, json_key, report), report, on_decode_error, cutter)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file and its rights") from (
                error
            )
