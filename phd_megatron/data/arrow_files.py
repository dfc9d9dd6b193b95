"""Documents out of Parquet and Arrow files, a row each, by pyarrow.

Arrow's arrays say themselves where each text begins, so those of a stranger's file are checked before they are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.data.rows import Row, Undecodable, missing
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    import pyarrow

#: Rows that are turned into Python's strings at a time.
_ROWS = 128
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
Progress = Callable[[int], None]


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType | None:
    """The type of bytes in which a column of texts lies; None for a column of something else."""
    import pyarrow

    types = pyarrow.types
    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    return pyarrow.binary_view() if types.is_string_view(kind) else None


def _way(schema: pyarrow.Schema, key: str, path: Path) -> list[str]:
    """The names that lead to ``key``: a column of that very name, else ``a.b`` is the field ``b`` of the column ``a``.

    Raises:
        UserError: it is not there, or holds no text.
    """
    import pyarrow

    way: list[str] = []
    fields, rest = list(schema), key
    while True:
        named = [field for field in fields if field.name == rest]
        head, dot, after = (rest, "", "") if named else rest.partition(".")
        named = named or [field for field in fields if field.name == head]
        if len(named) != 1 or (dot and not pyarrow.types.is_struct(named[0].type)):
            names = ", ".join(field.name[:80] for field in fields[:20])
            problem = f"more than one column {head!r}" if len(named) > 1 else f"no column {key!r}"
            below = f"those of {'.'.join(way)!r}" if way else "its columns"
            raise UserError(f"{path}: {problem} ({below}: {names}); name it with --json-key")
        kind = named[0].type
        way.append(head)
        if not dot:
            break
        fields, rest = [kind.field(number) for number in range(kind.num_fields)], after
    if _plain(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) is None:
        raise UserError(f"{path}: column {key!r} is {kind}, not a string; choose another --json-key")
    return way


def _texts(column: pyarrow.Array, way: list[str]) -> Iterator[str | Undecodable]:
    """What is in some rows of a column. Nothing is a text without characters."""
    import pyarrow
    import pyarrow.compute

    column.validate()
    if len(way) > 1:
        column = pyarrow.compute.struct_field(column, way[1:])
    if pyarrow.types.is_dictionary(column.type):
        words = column.dictionary.view(_plain(column.dictionary.type))
        words.validate(full=True)
        column = pyarrow.DictionaryArray.from_arrays(column.indices, words).dictionary_decode()
    else:
        column = column.view(_plain(column.type))
        column.validate(full=True)
    for value in column.to_pylist():
        try:
            yield (value or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            yield Undecodable(f"not utf-8 ({error.reason} at byte {error.start} of the text)")


def _rows(batches: Iterator[pyarrow.RecordBatch], path: Path, way: list[str]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        column = batch.column(batch.schema.names.index(way[0]))
        for begin in range(0, len(column), _ROWS):
            for text in _texts(column.slice(begin, _ROWS), way):
                number += 1
                yield Row(f"row {number}", f"{path}: row {number}", text)


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(missing("pyarrow", path, error)) from error
    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"{path}: not a readable {kind} file ({error}); copy or write it again") from error


def parquet_rows(path: Path, key: str, progress: Progress) -> Iterator[Row]:
    """A document a row: the text of the column ``key``, of which a part of a row group is in memory.

    ``progress`` is told how many bytes of the file were read.
    """
    with _reading(path, "Parquet"):
        import pyarrow.parquet

        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path) as table:
            way = _way(table.schema_arrow, key, path)
            total = max(1, table.metadata.num_rows)

            def batches() -> Iterator[pyarrow.RecordBatch]:
                done = 0
                for batch in table.iter_batches(batch_size=_ROWS, columns=[".".join(way)], use_threads=False):
                    done += batch.num_rows
                    progress(size * done // total)
                    yield batch

            yield from _rows(batches(), path, way)


def arrow_rows(path: Path, key: str, progress: Progress) -> Iterator[Row]:
    """The same for Arrow's IPC formats, that of files and that of streams. One record batch is in memory."""
    with _reading(path, "Arrow"):
        import pyarrow.ipc

        with pyarrow.OSFile(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            with (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source) as reader:
                schema = reader.schema
            way = _way(schema, key, path)
            # Other columns, such as pictures, are left where they are.
            options = pyarrow.ipc.IpcReadOptions(included_fields=[schema.names.index(way[0])], use_threads=False)
            source.seek(0)
            yield from _rows(_file(source, options) if is_file else _stream(source, options, progress), path, way)


def _file(source: pyarrow.NativeFile, options: pyarrow.ipc.IpcReadOptions) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    with pyarrow.ipc.open_file(source, options=options) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _stream(
    source: pyarrow.NativeFile, options: pyarrow.ipc.IpcReadOptions, progress: Progress
) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    with pyarrow.ipc.open_stream(source, options=options) as reader:
        for batch in reader:
            progress(source.tell())
            yield batch
    # A stream may end without a mark, and then nobody can tell whether batches are missing.
    size = source.size()
    source.seek(max(0, size - len(_END_OF_STREAM)))
    if source.read() != _END_OF_STREAM:
        raise EOFError("it has no mark at its end, so it may be cut")
