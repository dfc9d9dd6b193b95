"""Tokenizing batches of pieces, in this process or in several, always in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

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
    encoded = tokenizer.encode_batch([piece.text for piece in batch])
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
        length = len(ids)
        if length:
            max_token = max(max_token, int(ids.max()))
            parts.append(ids.astype(dtype))
        if piece.last and append_eod:
            parts.append(eod)
            max_token = max(max_token, tokenizer.eod)
            length += 1
        if length:
            lengths.append(length)
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


_worker: tuple[Tokenizer, bool, type[np.generic]]


def _start_worker(directory: str, append_eod: bool, dtype: type[np.generic]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow_parent() -> None:
            parent.join()
            os._exit(1)

        # A killed parent must not leave workers behind; the pool's own queues do not notice.
        threading.Thread(target=follow_parent, daemon=True).start()
    _worker = (load_tokenizer(directory), append_eod, dtype)


def _work(batch: list[Piece]) -> EncodedBatch:
    tokenizer, append_eod, dtype = _worker
    return encode_pieces(tokenizer, batch, append_eod, dtype)


def encode_all(
    batches: Iterable[list[Piece]],
    tokenizer: Tokenizer,
    tokenizer_directory: str,
    *,
    workers: int,
    append_eod: bool,
    dtype: type[np.generic],
) -> Iterator[EncodedBatch]:
    """Encoded batches in order. At most two batches a worker are on their way, so memory is bounded.

    Raises UserError when a worker dies, which is nearly always a lack of memory.
    """
    if workers == 1:
        for batch in batches:
            yield encode_pieces(tokenizer, batch, append_eod, dtype)
        return
    # spawn, not fork: the tokenizers library may hold threads and locks by now.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_directory, append_eod, dtype),
    )
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} worker processes ended abruptly, most likely for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
