"""Tokenizing batches of pieces, in this process or in several, always in the order of the input."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import numpy as np

from phd_megatron.data.readers import Piece
from phd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from phd_megatron.errors import UserError

#: Characters of one unit of work. The tokenizers library needs some 30 times the size of the text while it works.
BATCH_CHARACTERS = 1 << 19


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of some sequences. ``marks``: how many of these sequences precede each end of a document."""

    tokens: np.ndarray
    lengths: np.ndarray
    marks: np.ndarray
    text_bytes: int
    empty_documents: int
    max_token: int


def batches_of(pieces: Iterable[Piece], characters: int = BATCH_CHARACTERS) -> Iterator[list[Piece]]:
    """Group pieces by size; independent of the number of workers, so the result is too."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 64  # a corpus of tiny documents must not make endless batches
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_pieces(tokenizer: Tokenizer, batch: list[Piece], append_eod: bool, dtype: type[np.generic]) -> EncodedBatch:
    """One sequence for each piece that has tokens; EOD ends the last one of each document."""
    encoded = _encode(tokenizer, batch)
    eod = np.array([tokenizer.eod], dtype=dtype)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    marks: list[int] = []
    empty = 0
    max_token = 0
    for piece, ids in zip(batch, encoded, strict=True):
        if piece.first and piece.last and not len(ids):
            empty += 1
            continue
        if len(ids):
            max_token = max(max_token, int(ids.max()))
            parts.append(ids.astype(dtype))
        # A text that could not be cut is one piece and comes in several sequences all the same.
        sequences = [len(part) for part in np.array_split(ids, piece.sequences)]
        if piece.last and append_eod:
            parts.append(eod)
            max_token = max(max_token, tokenizer.eod)
            sequences[-1] += 1
        lengths += filter(None, sequences)
        if piece.last:
            marks.append(len(lengths))
    return EncodedBatch(
        np.concatenate(parts) if parts else np.empty(0, dtype=dtype),
        np.asarray(lengths, dtype=np.int32),
        np.asarray(marks, dtype=np.int64),
        sum(len(piece.text.encode("utf-8")) for piece in batch),
        empty,
        max_token,
    )


def _encode(tokenizer: Tokenizer, batch: list[Piece]) -> list[np.ndarray]:
    """Ids of each piece, without those of the context before it."""
    encoded = tokenizer.encode_batch([piece.context + piece.text for piece in batch])
    behind = [number for number, piece in enumerate(batch) if piece.context]
    if behind:
        contexts = tokenizer.encode_batch([batch[number].context for number in behind])
        for number, context in zip(behind, contexts, strict=True):
            if not np.array_equal(encoded[number][: len(context)], context):
                raise UserError(
                    f"the tokenizer makes other tokens of {batch[number].context!r} in front of a text than alone, so "
                    "a long text cannot be cut there; give the text in shorter documents, and report this tokenizer"
                )
            encoded[number] = encoded[number][len(context) :]
    return encoded


def _work(connection: Connection, directory: str, append_eod: bool, dtype: type[np.generic]) -> None:
    """Body of a worker: answer each batch until the parent closes the connection, or is gone, which looks the same."""
    # The whole process group gets Ctrl-C or SIGTERM; the parent decides what that means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(directory)
    with contextlib.suppress(EOFError, OSError):
        while True:
            batch = connection.recv()
            try:
                answer: EncodedBatch | Exception = encode_pieces(tokenizer, batch, append_eod, dtype)
            except Exception as error:  # travels to the parent, which raises it
                answer = error
            connection.send(answer)


class _Workers:
    """Processes that take batches in turn, one batch on its way to each.

    Not a pool of ``concurrent.futures``: with batches larger than a pipe, some versions of Python wait forever there
    when a worker is killed. Here a lost worker is the end of its own connection.
    """

    def __init__(self, count: int, directory: str, append_eod: bool, dtype: type[np.generic]) -> None:
        self._count, self._arguments = count, (directory, append_eod, dtype)
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []

    def _start_one(self) -> None:
        context = multiprocessing.get_context("spawn")  # the tokenizers library may hold threads and locks by now
        try:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
            # Known before it runs: a signal can end this command at any moment, and `close` must find the process.
            self._connections.append(ours)
            self._processes.append(process)
            process.start()
        except OSError as error:
            raise UserError(
                f"worker process {len(self._processes)} of {self._count} could not be started ({error.strerror}); use "
                "fewer --workers, or raise the limit of processes or open files"
            ) from error
        theirs.close()

    def send(self, number: int, batch: list[Piece]) -> None:
        if number < self._count:  # a small input does not need all of them
            self._start_one()
        try:
            self._connections[number % len(self._connections)].send(batch)
        except OSError as error:
            raise self._lost(number) from error

    def receive(self, number: int) -> EncodedBatch:
        try:
            answer = self._connections[number % len(self._connections)].recv()
        except (EOFError, OSError) as error:
            raise self._lost(number) from error
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, EncodedBatch)
        return answer

    def _lost(self, number: int) -> UserError:
        process = self._processes[number % len(self._processes)]
        process.join(5)
        code, cure = process.exitcode, "start prepare again"
        if code is None:
            how = "it no longer answers"
        elif code >= 0:
            how, cure = f"exit code {code}", "what it said itself is above"
        else:
            how = f"signal {signal.Signals(-code).name if -code in set(signal.Signals) else -code}"
        if code == -signal.SIGKILL:
            how += ", which somebody sent or, when memory is short, the system"
            cure = "start prepare again, with fewer --workers if memory was short (the system's log says so)"
        return UserError(f"one of {len(self._processes)} worker processes ended abruptly ({how}); {cure}")

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            if process.pid is None:  # it was not started
                continue
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def encode_all(
    batches: Iterable[list[Piece]],
    tokenizer: Tokenizer,
    tokenizer_directory: str,
    *,
    workers: int,
    append_eod: bool,
    dtype: type[np.generic],
) -> Generator[EncodedBatch, None, None]:
    """Encoded batches in order. At most one batch a worker is on its way, so memory is bounded.

    Raises UserError when a worker dies, with what is known of it.
    """
    if workers == 1:
        for batch in batches:
            yield encode_pieces(tokenizer, batch, append_eod, dtype)
        return
    pool = _Workers(workers, tokenizer_directory, append_eod, dtype)
    sent = received = 0
    try:
        for batch in batches:
            done = None
            if sent - received == workers:
                done = pool.receive(received)
                received += 1
            pool.send(sent, batch)  # before the answer is written, so that the worker does not wait for that
            sent += 1
            if done is not None:
                yield done
        while received < sent:
            yield pool.receive(received)
            received += 1
    finally:
        pool.close()
