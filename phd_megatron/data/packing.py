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

    @property
    def padding(self) -> float:
        """The share of all room that nothing fills."""
        total = self.samples * self.room
        return 1 - int(self.pieces[:, 2].sum()) / total if total else 0.0

    @property
    def cut_documents(self) -> int:
        """Documents in more than one piece."""
        return int((np.unique(self.pieces[:, 0], return_counts=True)[1] > 1).sum())


def best_fit(lengths: np.ndarray, room: int, overlap: int = 1) -> Packing:
    """Pack documents of ``lengths`` ``[D]`` into samples of ``room`` tokens; the same for the same lengths.

    Args:
        overlap: tokens by which the pieces of a cut document overlap. A sample of s inputs and s targets has room for
            s + 1 tokens, and its last one is a target alone: with 1 that is the first input of the next piece.
    """
    if room <= overlap:
        raise ValueError(f"room for {room} tokens must be more than the overlap of {overlap}")
    pieces = _pieces(np.asarray(lengths, np.int64), room, overlap)
    whole = pieces[:, 2] == room
    bins = [[int(index)] for index in np.flatnonzero(whole)]
    rests = np.flatnonzero(~whole)
    rests = rests[np.argsort(-pieces[rests, 2], kind="stable")]
    # Samples by the room that they have left, and these rooms in order: the fullest that fits is the first at or above.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in rests.tolist():
        length = int(pieces[index, 2])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, left = len(bins), room - length
            bins.append([index])
        else:
            found = rooms[place]
            chosen, left = by_room[found].pop(), found - length
            bins[chosen].append(index)
            if not by_room[found]:
                del by_room[found], rooms[place]
        if left:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    order = np.fromiter((index for members in bins for index in members), np.int64, len(pieces))
    borders = np.zeros(len(bins) + 1, np.int64)
    np.cumsum([len(members) for members in bins], out=borders[1:])
    return Packing(pieces[order], borders, room)


def _pieces(lengths: np.ndarray, room: int, overlap: int) -> np.ndarray:
    """``[P, 3]``: documents cut into pieces of at most ``room`` tokens; what has no target has no piece."""
    step = room - overlap
    # A document of n tokens needs pieces until one reaches its end.
    counts = np.where(lengths > overlap, 1 + np.maximum(0, -(-(lengths - room) // step)), 0)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * step
    return np.stack([documents, first, np.minimum(room, lengths[documents] - first)], 1).astype(np.int64)
