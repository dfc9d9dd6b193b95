"""``prepare inspect``: what a data set holds, read once in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phd_megatron.config.plain import Json
from phd_megatron.data.indexed import IndexedInfo, check_indexed
from phd_megatron.data.output import sidecar_of
from phd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from phd_megatron.data.verify import check_ids, verify, verify_index
from phd_megatron.errors import UserError

#: Lengths below this are counted one by one, longer ones kept: of these there are few.
_COUNTED = 1 << 20
_ROWS = 1 << 20
_MOST_SAMPLES = 1000
#: Tokens of a sample's beginning that are decoded.
SAMPLE_TOKENS = 256


@dataclass(frozen=True)
class Sample:
    """The beginning of a document: its number from 0 on, all its tokens, and the text of the first of them."""

    document: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """What was found. Lengths are tokens of a document, its end-of-document token included.

    Attributes:
        histogram: shortest and longest length of each stretch, and how many documents have one of those.
        sidecar: what ``prepare`` noted; None for data from elsewhere.
        has_vocabulary: whether ids were compared with a tokenizer's.
    """

    prefix: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    empty: int
    shortest: int
    longest: int
    mean: float
    median: float
    histogram: list[tuple[int, int, int]]
    samples: list[Sample]
    sidecar: Json | None
    has_vocabulary: bool


def inspect(prefix: str, *, samples: int = 0, tokenizer: str | None = None) -> Inspection:
    """Read the whole index of a data set and parts of its tokens, and count.

    Args:
        samples: documents to decode, spread evenly over the data set.
        tokenizer: ``byte`` or a directory; None takes the one beside the data, where there is one.

    Raises:
        UserError: for data that is damaged or not the tokenizer's, and samples without a tokenizer.
    """
    if not 0 <= samples <= _MOST_SAMPLES:
        raise UserError(f"--samples {samples}: that many are not shown; use 0 to {_MOST_SAMPLES}")
    info = check_indexed(prefix, "the prefix")
    sidecar = sidecar_of(info)
    beside = f"{prefix}.tokenizer"
    spec = tokenizer if tokenizer is not None else beside if Path(beside).is_dir() else None
    if spec is None and samples:
        raise UserError(f"--samples {samples}: {beside} is not there, so name the tokenizer with --tokenizer")
    loaded = None if spec is None else load_tokenizer(spec)
    if loaded is None:
        verify_index(info)
    else:
        verify(info, loaded.vocab_size)
    counts, long = _count(info)
    lengths = np.concatenate([np.flatnonzero(counts), np.unique(long)])
    numbers = np.concatenate([counts[counts > 0], np.unique(long, return_counts=True)[1]])
    return Inspection(
        prefix=prefix,
        dtype=info.dtype.name,
        documents=info.documents,
        sequences=len(info.lengths),
        tokens=info.tokens,
        empty=int(counts[0]),
        shortest=int(lengths[0]) if len(lengths) else 0,
        longest=int(lengths[-1]) if len(lengths) else 0,
        mean=info.tokens / max(1, info.documents),
        median=_median(lengths, numbers),
        histogram=_histogram(lengths, numbers),
        samples=[] if loaded is None else _samples(info, loaded, samples),
        sidecar=sidecar,
        has_vocabulary=loaded is not None,
    )


def document_lengths(info: IndexedInfo) -> Iterator[np.ndarray]:
    """Tokens of each document, int64, in parts. The index must have been verified."""
    parts = info.marks.chunks(rows=_ROWS)
    marks = next(parts)[1:]
    sequence, tokens, before = 0, 0, 0
    for lengths in info.lengths.chunks(rows=_ROWS):
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) + tokens
        while True:
            here = int(np.searchsorted(marks, sequence + len(lengths), side="right"))
            found = ends[marks[:here] - sequence]
            yield np.diff(found, prepend=before)
            before, marks = int(found[-1]) if here else before, marks[here:]
            if len(marks):
                break
            following = next(parts, None)
            if following is None:
                break
            marks = following
        sequence, tokens = sequence + len(lengths), int(ends[-1])


def _count(info: IndexedInfo) -> tuple[np.ndarray, np.ndarray]:
    """How many documents have each length below :data:`_COUNTED`, and the other lengths."""
    counts, long = np.zeros(_COUNTED, np.int64), [np.empty(0, np.int64)]
    for lengths in document_lengths(info):
        is_long = lengths >= _COUNTED
        counts += np.bincount(lengths[~is_long], minlength=_COUNTED)
        long.append(lengths[is_long])
    return counts, np.concatenate(long)


def _median(lengths: np.ndarray, numbers: np.ndarray) -> float:
    if not len(lengths):
        return 0.0
    ends = np.cumsum(numbers)
    middle = [(int(ends[-1]) - 1) // 2, int(ends[-1]) // 2]
    return float(lengths[np.searchsorted(ends, middle, side="right")].mean())


def _histogram(lengths: np.ndarray, numbers: np.ndarray) -> list[tuple[int, int, int]]:
    """Stretches from one power of two to the next, from the shortest document to the longest."""
    if not len(lengths):
        return []
    bits = np.frexp(lengths.astype(np.float64))[1]  # from 2^(bits - 1) to below 2^bits; 0 has none
    edges = range(int(bits[0]), int(bits[-1]) + 1)
    return [(1 << bit >> 1, (1 << bit) - 1, int(numbers[bits == bit].sum())) for bit in edges]


def _samples(info: IndexedInfo, tokenizer: Tokenizer, count: int) -> list[Sample]:
    found = []
    for number in range(min(count, info.documents)):
        document = number * info.documents // min(count, info.documents)
        begin, end = int(info.marks[document]), int(info.marks[document + 1])
        tokens = info.tokens_of(range(begin, end))
        first = int(info.pointers[begin]) if begin < end else 0
        size = min(tokens, SAMPLE_TOKENS) * info.dtype.itemsize
        ids = np.frombuffer(info.bin_file.read(size, first), info.dtype)
        check_ids(info, ids, first // info.dtype.itemsize, tokenizer.vocab_size)
        found.append(Sample(document, tokens, tokenizer.detokenize(ids.tolist(), skip_special_tokens=False)))
    return found
