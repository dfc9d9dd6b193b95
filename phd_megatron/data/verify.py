"""Reading a data set once, before a run: is its index what it should be, are its tokens in the vocabulary, which is it?

An index of 100 million documents is 2 GB; it is read in parts of some MB. Of the tokens parts are looked at, all of a
small file; the others are when a sample is read (`data/token_files.py`).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Hashable
from dataclasses import asdict, dataclass

import numpy as np

from phd_megatron.config.plain import Plain
from phd_megatron.data.indexed import AGAIN, IndexedInfo
from phd_megatron.data.open_file import spread
from phd_megatron.errors import UserError

logger = logging.getLogger(__name__)

_BLOCKS, _BLOCK = 64, 1 << 17
_SAYS_TIME_AFTER = 1.0  # seconds
_ROWS = 1 << 20
_verified: dict[tuple[Hashable, ...], Fingerprint] = {}


@dataclass(frozen=True)
class Fingerprint:
    """What a data set holds, wherever it lies: sizes, all lengths and documents, and 8 MiB spread over the tokens."""

    bin_bytes: int
    idx_bytes: int
    index: str
    tokens: str

    def as_dict(self) -> dict[str, int | str]:
        """For a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Plain) -> Fingerprint:
        """The reverse.

        Raises:
            ValueError: for anything else.
        """
        if not isinstance(content, dict) or content.keys() != cls.__dataclass_fields__.keys():
            raise ValueError("no fingerprint of data")
        if not all(type(content[name]) is int for name in ("bin_bytes", "idx_bytes")):
            raise ValueError("no fingerprint of data: its sizes are no numbers")
        if not all(isinstance(content[name], str) for name in ("index", "tokens")):
            raise ValueError("no fingerprint of data: its digests are no text")
        return cls(**content)


def verify(info: IndexedInfo, vocab_size: int) -> Fingerprint:
    """Read the index and parts of the tokens; once in a process, as long as the files stay what they are.

    Raises:
        UserError: for an index that is damaged anywhere, a .bin of another size than it says, and ids that are negative
            or not below ``vocab_size``.
    """
    files = (info.bin_file, info.idx_file)
    key: tuple[Hashable, ...] = (info.prefix, vocab_size, *((file.size, file.mtime_ns, file.inode) for file in files))
    if key in _verified:
        return _verified[key]
    began = time.perf_counter()
    index = verify_index(info)
    tokens = _verify_tokens(info, vocab_size)
    seconds = time.perf_counter() - began
    if seconds > _SAYS_TIME_AFTER:
        logger.warning(
            "note: reading %s.idx once, %d sequences in %d documents, and parts of its .bin took %.1f s",
            *(info.prefix, len(info.lengths), info.documents, seconds),
        )
    found = Fingerprint(info.bin_file.size, info.idx_file.size, index, tokens)
    _verified[key] = found
    return found


def verify_end(info: IndexedInfo) -> None:
    """Compare the size of the .bin with where the last sequence ends, which takes no time.

    Raises:
        UserError: with what is wrong, for which it reads the index.
    """
    last = len(info.lengths) - 1
    if int(info.pointers[last]) + int(info.lengths[last]) * info.dtype.itemsize != info.bin_file.size:
        verify_index(info)


def verify_index(info: IndexedInfo) -> str:
    """Compare every length, pointer and document mark with its neighbours; returns a digest of lengths and documents.

    Sequences lie one after the other in the .bin, and documents are one after the other in the sequences: that is how
    Megatron writes them, and how every reader takes them.

    Raises:
        UserError: with the first sequence or document that does not fit.
    """
    digest = hashlib.blake2b(str(info.dtype).encode(), digest_size=20)
    size, begin, first = info.dtype.itemsize, 0, 0
    path = info.idx_file.path
    for lengths, pointers in zip(info.lengths.chunks(rows=_ROWS), info.pointers.chunks(rows=_ROWS), strict=True):
        if int(lengths.min()) < 0:
            number = int(np.argmax(lengths < 0))
            raise UserError(f"{path} is damaged: {_place(info, first + number)} has {lengths[number]} tokens; {AGAIN}")
        ends = np.cumsum(lengths, dtype=np.int64)
        ends *= size
        ends += begin
        wrong = pointers[1:] != ends[:-1]
        if int(pointers[0]) != begin or wrong.any():
            number = 0 if int(pointers[0]) != begin else int(np.argmax(wrong)) + 1
            expected = begin if number == 0 else int(ends[number - 1])
            raise UserError(
                f"{path} is damaged: {_place(info, first + number)} is said to begin at byte {pointers[number]} of "
                f"{info.bin_file.path}, but the sequences before it end at {expected}; {AGAIN}"
            )
        digest.update(lengths.data)
        begin, first = int(ends[-1]), first + len(lengths)
    _verify_marks(info, digest)
    if begin != info.bin_file.size:
        word = "truncated" if info.bin_file.size < begin else "longer than its index"
        raise UserError(
            f"{info.bin_file.path} is {word}: {info.bin_file.size} bytes, but {path} lists {begin}; {AGAIN}"
        )
    return digest.hexdigest()


def _verify_marks(info: IndexedInfo, digest: hashlib.blake2b) -> None:
    sequences, before, first = len(info.lengths), 0, 0
    damaged = f"{info.idx_file.path} is damaged: of its document marks"
    if not len(info.marks):
        raise UserError(f"{damaged} there is none, and the first should be 0; {AGAIN}")
    for marks in info.marks.chunks(rows=_ROWS):
        falls = np.diff(marks, prepend=np.int64(before)) < 0
        # A difference of two numbers far apart can overflow, so the ends are compared too.
        bad = falls | (marks < 0) | (marks > sequences)
        if first == 0:
            bad[0] |= int(marks[0]) != 0
        if bad.any():
            number = int(np.argmax(bad))
            previous = before if number == 0 else int(marks[number - 1])
            rule = f"be from {previous} to {sequences}" if first + number else "be 0"
            raise UserError(
                f"{damaged} number {first + number} is {marks[number]}, and should {rule}: they count the sequences "
                f"before each document; {AGAIN}"
            )
        digest.update(marks.data)
        before, first = int(marks[-1]), first + len(marks)
    if before != sequences:
        raise UserError(f"{damaged} the last is {before}, and should be the number of sequences, {sequences}; {AGAIN}")


def _place(info: IndexedInfo, sequence: int) -> str:
    """In words, with the document where the marks make sense."""
    marks = info.marks.read()
    if len(marks) < 2 or marks[0] != 0 or (np.diff(marks) < 0).any() or marks[-1] != len(info.lengths):
        return f"sequence {sequence} of {len(info.lengths)}"
    document = int(np.searchsorted(marks, sequence, side="right")) - 1
    return f"sequence {sequence} of {len(info.lengths)} (in document {document} of {info.documents})"


def _verify_tokens(info: IndexedInfo, vocab_size: int) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for begin, end in spread(info.bin_file.size, _BLOCKS, _BLOCK):
        data = info.bin_file.read(end - begin, begin)
        digest.update(data)
        check_ids(info, np.frombuffer(data, info.dtype), begin // info.dtype.itemsize, vocab_size)
    return digest.hexdigest()


def check_ids(info: IndexedInfo, tokens: np.ndarray, first: int, vocab_size: int) -> None:
    """Refuse ids outside of the vocabulary; ``first`` is where in the .bin they begin, in tokens."""
    if not len(tokens):
        return
    limit = vocab_size
    if tokens.dtype.kind == "i":  # a negative id is a large one without its sign
        tokens, limit = tokens.view(f"u{tokens.itemsize}"), min(limit, 1 << (8 * tokens.itemsize - 1))
    if int(tokens.max()) >= limit:
        number = int(np.argmax(tokens >= limit))
        tokens = tokens.view(info.dtype)
        what = "a negative token id" if tokens[number] < 0 else f"token id {tokens[number]}"
        raise UserError(
            f"data {info.prefix!r} holds {what} ({tokens[number]} at token {first + number} of {info.tokens}), but the "
            f"tokenizer has only {vocab_size} tokens, from 0 on; use the tokenizer the data was made with, or {AGAIN}"
        )
