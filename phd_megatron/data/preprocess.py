"""``prepare``: text files into Megatron ``.bin/.idx`` data, with the tokenizer and a sidecar beside it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phd_megatron import __version__
from phd_megatron.config.plain import Json
from phd_megatron.console.progress import FileProgress
from phd_megatron.data.bpe import SAMPLE_CHARACTERS, parse_bpe, train_bpe
from phd_megatron.data.encode import EncodedBatch, batches_of, encode_all
from phd_megatron.data.indexed import IndexedWriter, dtype_for
from phd_megatron.data.inputs import estimated_text, find_files
from phd_megatron.data.output import Output, explained
from phd_megatron.data.readers import OnDecodeError, Piece, ReadReport, read_pieces
from phd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from phd_megatron.errors import UserError

_MOST_WORKERS = 256


@dataclass
class PrepareResult:
    """What was written. ``bytes`` is the UTF-8 size of the text, ``skipped`` lists file, reason (and lines)."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    bytes: int
    empty_documents: int
    seconds: float
    vocab_size: int
    skipped: list[dict[str, str | int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """The input files and how to read them; can be read more than once (BPE training reads first)."""

    files: list[Path]
    json_key: str
    on_decode_error: OnDecodeError

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def texts(self) -> Iterator[list[str]]:
        pieces = read_pieces(self.files, ReadReport(), json_key=self.json_key, on_decode_error=self.on_decode_error)
        for batch in batches_of(pieces):
            yield [piece.text for piece in batch]


def _make_tokenizer(spec: str, source: _Source, directory: Path, notes: list[str]) -> tuple[Tokenizer, Json]:
    """Load or train the tokenizer, and save it in ``directory``. The second value describes it in the sidecar."""
    size = parse_bpe(spec)
    if size is None:
        tokenizer = load_tokenizer(spec)
        tokenizer.save(directory)
        return tokenizer, {"spec": spec}
    estimate = sum(map(estimated_text, source.files))  # enough to spread the sample over the corpus
    stride = max(1, -(-estimate // SAMPLE_CHARACTERS))
    training = train_bpe(source.texts(), size, stride, directory)
    if training.stride > 1:
        notes.append(
            f"the tokenizer was trained on {training.sampled_characters / 1e6:.0f} million characters, "
            f"1/{training.stride} of the text spread over it, to bound the memory"
        )
    if training.vocab_size < size:
        notes.append(f"the text has only enough to merge for {training.vocab_size} tokens, not {size}")
    description = {"spec": spec, "trained_on_characters": training.sampled_characters, "stride": training.stride}
    return load_tokenizer(directory), description


def _check_arguments(workers: int, on_decode_error: str, inputs: Sequence[str | Path], spec: str) -> None:
    if workers < 1:
        raise UserError(f"--workers {workers}: at least one process must do the work; use 1 or more")
    cores = os.cpu_count() or 1
    if workers > (most := max(_MOST_WORKERS, 4 * cores)):
        raise UserError(
            f"--workers {workers}: each is a process of some 100 MB, and this machine has {cores} cores, which fewer "
            f"keep busy; use about {cores}, at most {most}"
        )
    if on_decode_error not in ("fail", "skip"):
        raise UserError(f"--on-decode-error {on_decode_error!r} is unknown; use fail or skip")
    if not spec:
        raise UserError(
            "--tokenizer '' is empty, as of a shell variable that is not set; give byte, bpe:N or a directory"
        )
    if not inputs:
        raise UserError("no input; name files or directories after --input")


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path = "byte",
    *,
    workers: int = 1,
    on_decode_error: OnDecodeError = "fail",
    json_key: str = "text",
    append_eod: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareResult:
    """Write ``PREFIX.bin``, ``PREFIX.idx``, ``PREFIX.tokenizer/`` and ``PREFIX.meta.json``; .idx appears last.

    The bytes written depend on the input and the tokenizer only, not on ``workers``. Memory does not grow with the
    input. Raises UserError for input, tokenizer and output problems; then nothing is left at PREFIX.
    """
    _check_arguments(workers, on_decode_error, inputs, str(tokenizer))
    # --workers says how many cores are used. Workers switch the library's threads off; training BPE uses them here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if workers > 1 else "false")
    os.environ.setdefault("RAYON_NUM_THREADS", str(workers))
    source = _Source(find_files(inputs), json_key, on_decode_error)
    started = time.perf_counter()
    with explained(output_prefix), Output(str(output_prefix), overwrite) as output:
        result, sidecar = _write(output, source, str(tokenizer), workers, append_eod, progress)
        result.seconds = time.perf_counter() - started
        sidecar["inputs"] = [str(name) for name in inputs]
        output.publish(sidecar)
        return result


def prepare_keys(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path,
    keys: Sequence[str],
    *,
    workers: int = 1,
    on_decode_error: OnDecodeError = "fail",
    append_eod: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> Iterator[PrepareResult]:
    """A data set for each of several keys, ``PREFIX_KEY_document``, as Megatron's ``preprocess_data.py`` calls them.

    Raises:
        UserError: as :func:`prepare`; for keys that give no names of files, and for output that exists, before anything
            is written.
    """
    if parse_bpe(str(tokenizer)) is not None and len(keys) > 1:
        raise UserError(
            f"--tokenizer {tokenizer} with --json-keys {' '.join(keys)}: each data set would get a tokenizer of its "
            "own; prepare one key first, and give the directory that this writes, PREFIX.tokenizer"
        )
    for number, key in enumerate(keys):
        if not key or "/" in key or "\0" in key or key in keys[:number]:
            why = "is there twice" if key in keys[:number] else "can be no part of a file's name"
            raise UserError(f"--json-keys {key!r} {why}; give different keys, and such a one alone with --json-key")
    prefixes = [f"{output_prefix}_{key}_document" for key in keys]
    for prefix in prefixes:
        with Output(prefix, overwrite):  # refuses what it may not replace
            pass
    for key, prefix in zip(keys, prefixes, strict=True):
        yield prepare(
            inputs,
            prefix,
            tokenizer,
            workers=workers,
            on_decode_error=on_decode_error,
            json_key=key,
            append_eod=append_eod,
            overwrite=overwrite,
            progress=progress,
        )


def _write(
    output: Output, source: _Source, spec: str, workers: int, append_eod: bool, progress: bool
) -> tuple[PrepareResult, Json]:
    notes: list[str] = []
    tokenizer, description = _make_tokenizer(spec, source, output.directory / "tokenizer", notes)
    dtype = dtype_for(tokenizer.vocab_size)
    report = ReadReport()
    encoding = encode_all(
        batches_of(_pieces(source, report, tokenizer)),
        tokenizer,
        str(output.directory / "tokenizer"),
        workers=workers,
        append_eod=append_eod,
        dtype=dtype,
    )
    with (
        # Whatever ends this ends the workers as well. Left to the garbage collector they may outlive the interpreter's
        # own wait for them, since a worker leaves SIGTERM to its parent.
        contextlib.closing(encoding) as encoded,
        IndexedWriter(output.directory, dtype) as writer,
        FileProgress(source.total_bytes, enabled=progress) as display,
    ):
        text_bytes, empty, max_token = _drain(encoded, writer, report, display)
        if not writer.documents:
            raise UserError(
                f"empty corpus: {len(source.files)} files hold no text ({empty} empty documents, "
                f"{len(report.skipped)} files skipped); check --input and --json-key"
            )
        writer.finish()
        result = PrepareResult(
            prefix=output.prefix,
            documents=writer.documents,
            sequences=writer.sequences,
            tokens=writer.tokens,
            bytes=text_bytes,
            empty_documents=empty,
            seconds=0.0,
            vocab_size=tokenizer.vocab_size,
            skipped=report.skipped,
            notes=notes,
        )
    facts = {"max_token_id": max_token, "append_eod": append_eod, "dtype": writer.dtype.name}
    return result, _sidecar(result, source, report, {**description, **tokenizer.unique_identifiers}, facts)


def _pieces(source: _Source, report: ReadReport, tokenizer: Tokenizer) -> Iterator[Piece]:
    return read_pieces(
        source.files,
        report,
        json_key=source.json_key,
        on_decode_error=source.on_decode_error,
        cutter=tokenizer.cutter(),
    )


def _drain(
    encoded: Iterable[EncodedBatch], writer: IndexedWriter, report: ReadReport, display: FileProgress
) -> tuple[int, int, int]:
    """Write all that comes: bytes of text, empty documents and the largest id."""
    text_bytes = empty = max_token = 0
    for batch in encoded:
        writer.add(batch.tokens, batch.lengths, batch.marks)
        text_bytes += batch.text_bytes
        empty += batch.empty_documents
        max_token = max(max_token, batch.max_token)
        display.update(report.bytes_read, writer.documents, writer.tokens)
    return text_bytes, empty, max_token


def _sidecar(result: PrepareResult, source: _Source, report: ReadReport, tokenizer: Json, facts: Json) -> Json:
    return {
        "version": __version__,
        "tokenizer": tokenizer,
        "documents": result.documents,
        "sequences": result.sequences,
        "tokens": result.tokens,
        "text_bytes": result.bytes,
        "empty_documents": result.empty_documents,
        **facts,
        "files": report.files,
        "json_key": source.json_key,
        "on_decode_error": source.on_decode_error,
        "skipped": report.skipped,
    }
