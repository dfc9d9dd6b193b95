"""Which documents go into one sample: best-fit decreasing, so that a document is cut only where it must be.

As in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830): documents longer than a sample are cut into
whole samples and a rest; rests and other documents are taken from the longest to the shortest, each into the fullest
sample that still has room for it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Samples made of pieces of documents.

    Attributes:
        pieces: ``[P, 3]`` int64, grouped by sample: document, its first token, number of tokens.
        borders: ``[B + 1]`` int64: sample b is made of pieces ``borders[b]`` to ``borders[b + 1]``.
        room: tokens that a sample has room for.
    """

    pieces: np.ndarray
    borders: np.ndarray
    room: int

    @property
    def samples(self) -> int:
        """Their number, B."""
        return len(self.borders) - 1


def best_fit(lengths: np.ndarray, room: int, overlap: int = 1) -> Packing:
    """Pack documents of ``lengths`` ``[D]`` into samples of ``room`` tokens; the same for the same lengths.

    Args:
        overlap: tokens by which the pieces of a cut document overlap. A sample of s inputs and s targets has room for
            s + 1 tokens, and its last one is a target alone: with 1 that is the first input of the next piece.
    """
    if room <= overlap:
        raise ValueError(f"room for {room} tokens must be more than the overlap of {overlap}")
    pieces = _pieces(np.asarray(lengths, np.int64), room, overlap)
    order = np.argsort(-pieces[:, 2], kind="stable")
    sample_of = _samples_of(pieces[order, 2], room)
    by_sample = np.argsort(sample_of, kind="stable")
    sizes = np.bincount(sample_of)
    return Packing(pieces[order[by_sample]], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), room)


def _samples_of(lengths: np.ndarray, room: int) -> np.ndarray:
    """The sample ``[P]`` of each piece, from the longest to the shortest.

    Pieces of one length are placed together: a sample that is the fullest with room for one stays it until it has room
    for none, so samples with one room left take as many each as fit, one sample after the other.
    """
    sample_of, used, begin = np.empty(len(lengths), np.int64), 0, 0
    # Samples by the room that they have left, the last ones first, and these rooms in order.
    by_room: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []
    ends = [*(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)] if len(lengths) else []
    for end in ends:
        length = int(lengths[begin])
        while begin < end:
            place = bisect_left(rooms, length)
            found = rooms[place] if place < len(rooms) else room
            each = found // length
            wanted = -(-(end - begin) // each)
            if place == len(rooms):
                samples = np.arange(used, used + wanted)
                used += wanted
            else:
                samples = _take(by_room[found], wanted)
                if not by_room[found]:
                    del by_room[found], rooms[place]
            count = min(end - begin, each * len(samples))
            sample_of[begin : begin + count] = np.repeat(samples, each)[:count]
            begin += count
            full, rest = divmod(count, each)
            for left, some in ((found - each * length, samples[:full]), (found - rest * length, samples[full:])):
                if left and len(some):
                    if left not in by_room:
                        insort(rooms, left)
                    by_room.setdefault(left, []).append(some)
    return sample_of


def _take(stacks: list[np.ndarray], wanted: int) -> np.ndarray:
    """At most ``wanted`` samples off the top, the last that came first."""
    taken: list[np.ndarray] = []
    while wanted and stacks:
        top = stacks.pop()
        taken.append(top[-wanted:][::-1])
        if len(top) > wanted:
            stacks.append(top[:-wanted])
        wanted -= len(taken[-1])
    return np.concatenate(taken)


def _pieces(lengths: np.ndarray, room: int, overlap: int) -> np.ndarray:
    """``[P, 3]``: documents cut into pieces of at most ``room`` tokens; what has no target has no piece."""
    step = room - overlap
    # A document of n tokens needs pieces until one reaches its end.
    counts = np.where(lengths > overlap, 1 + np.maximum(0, -(-(lengths - room) // step)), 0)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * step
    return np.stack([documents, first, np.minimum(room, lengths[documents] - first)], 1).astype(np.int64)
