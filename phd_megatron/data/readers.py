"""Documents out of text, source, JSON-lines and Parquet files, without ever holding a whole corpus.

One file of ``.txt .md .py`` is one document, one line of ``.jsonl .jsonl.gz .json.gz`` and one row of ``.parquet`` is
one document. A long file comes in several pieces; joined they are exactly the file's text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from phd_megatron.data.cuts import BLOCK, Anywhere, Cutter
from phd_megatron.data.inputs import JSON_SUFFIXES, TEXT_SUFFIXES, suffix_of
from phd_megatron.data.json_lines import BYTE_ORDER_MARK, Undecodable, parse_line
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
    #: file, reason and, for JSON lines, how many lines
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


def _encoding_of(path: Path) -> str:
    """UTF-8, or for Python source what its byte-order mark or coding line says (PEP 263)."""
    if not path.name.lower().endswith(".py"):
        return "utf-8"
    with path.open("rb") as stream:
        try:
            encoding = tokenize.detect_encoding(stream.readline)[0]
        except SyntaxError as error:
            raise Undecodable(f"of no known encoding ({error})") from error
    if not getattr(codecs.lookup(encoding), "_is_text_encoding", True):  # rot13, zlib and the like
        raise Undecodable(f"declared as {encoding}, which is no encoding of text")
    return encoding


def _decoded(path: Path, encoding: str, report: ReadReport | None) -> Iterator[str]:
    """The text of a file without byte-order mark, newlines as they are. ``report`` counts bytes; None only checks."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    with path.open("rb") as stream:
        position, is_start = 0, True
        while True:
            block = stream.read(_READ_BYTES)
            if report is not None:
                report.bytes_read += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeError as error:
                where = f" near byte {position + error.start}" if isinstance(error, UnicodeDecodeError) else ""
                reason = str(getattr(error, "reason", error))
                if not position and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    reason += "; it begins as UTF-16 does"
                raise Undecodable(f"not {encoding}{where} ({reason})") from error
            if "\0" in text:
                place = position + block.find(b"\0")
                raise Undecodable(f"no text but binary, or UTF-16: it holds a NUL byte (near byte {place})")
            if text and is_start:
                is_start = False
                if encoding == "utf-8":
                    text = text.removeprefix(BYTE_ORDER_MARK)
            yield text
            if not block:
                return
            position += len(block)


def _read_text(
    path: Path, report: ReadReport, on_decode_error: OnDecodeError, cutter: Cutter | None
) -> Iterator[Piece]:
    try:
        encoding = _encoding_of(path)
        if path.stat().st_size <= _ONE_GO_BYTES:
            yield from _pieces(["".join(_decoded(path, encoding, report))], cutter, path)
            return
        if on_decode_error == "skip":  # a file is skipped whole or not at all, so look before the first piece leaves
            for _ in _decoded(path, encoding, None):
                pass
        yield from _pieces(_decoded(path, encoding, report), cutter, path)
    except Undecodable as error:
        if on_decode_error == "fail":
            raise UserError(
                f"{path} is {error}; convert the file, leave it out, or use --on-decode-error skip to leave out "
                f"every such file and list it"
            ) from error
        report.skip(path, str(error))


def _open_counted(path: Path, report: ReadReport) -> tuple[io.BufferedIOBase, io.BufferedReader]:
    """A stream of decompressed bytes, and the raw one whose position measures progress."""
    raw = path.open("rb")
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw)), raw
    return raw, raw


def _read_json_lines(path: Path, report: ReadReport, key: str, on_decode_error: OnDecodeError) -> Iterator[Piece]:
    stream, raw = _open_counted(path, report)
    base, bad_lines, first_reason = report.bytes_read, 0, ""
    number = 0
    with raw, stream:
        while True:
            try:
                line = stream.readline(LARGEST_TEXT + 1)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(
                    f"{path}: damaged after line {number} ({error}); copy or download the file again"
                ) from error
            if not line:
                break
            number += 1
            if len(line) > LARGEST_TEXT:
                raise UserError(
                    f"{path}:{number}: the line has more than {LARGEST_TEXT} bytes, so it is no document; write one "
                    "document a line, and check that the file has line feeds"
                )
            report.bytes_read = base + raw.tell()
            if not line.strip():
                continue
            try:
                yield Piece(parse_line(line, f"{path}:{number}", key), True, True)
            except Undecodable as error:
                if on_decode_error == "fail":
                    raise UserError(
                        f"{path}:{number}: {error}; correct the line, or use --on-decode-error skip to leave out "
                        f"such lines and list their files"
                    ) from error
                bad_lines += 1
                first_reason = first_reason or f"first at line {number}: {error}"
    if bad_lines:
        report.skipped.append({"file": str(path), "reason": first_reason, "lines": bad_lines})


def _read_parquet(path: Path, report: ReadReport, key: str) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs pyarrow; install it with `pip install pyarrow`") from error
    base, size = report.bytes_read, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if key not in names:
                raise UserError(f"{path}: no column {key!r} (its columns: {', '.join(names)}); name it with --json-key")
            kind = table.schema_arrow.field(key).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{path}: column {key!r} is {kind}, not a string; choose another --json-key")
            total, done = max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=128, columns=[key], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield Piece(value or "", True, True)
                done += batch.num_rows
                report.bytes_read = base + size * done // total
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); copy or write it again") from error
    report.bytes_read = base + size


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
            elif suffix in JSON_SUFFIXES:
                yield from _read_json_lines(path, report, json_key, on_decode_error)
            else:
                yield from _read_parquet(path, report, json_key)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file and its rights") from (
                error
            )
