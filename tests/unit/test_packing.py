"""Best-fit decreasing: every token once, documents whole where they fit, little padding, the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from phd_megatron.data.packing import best_fit


def members(packing) -> list[list[tuple[int, int, int]]]:
    return [
        [tuple(piece) for piece in packing.pieces[one:two].tolist()]
        for one, two in zip(packing.borders[:-1], packing.borders[1:], strict=True)
    ]


def test_by_hand() -> None:
    """Room for 10: 23 is cut into 10, 10 and 5, which overlap by a token; then 8, 7, 5, 3, 2 where they fit best."""
    packing = best_fit(np.array([7, 23, 3, 8, 2, 0, 1]), 10)
    assert members(packing) == [
        [(1, 0, 10)],
        [(1, 9, 10)],
        [(3, 0, 8), (4, 0, 2)],
        [(0, 0, 7), (2, 0, 3)],
        [(1, 18, 5)],
    ]
    assert packing.samples == 5


@pytest.mark.parametrize("room", [2, 3, 17, 64, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_every_target_once(room: int, seed: int) -> None:
    """A document's tokens but its first are targets; each is one exactly once, and no sample is too full."""
    lengths = np.random.RandomState(seed).geometric(0.05, 300) - 1
    packing = best_fit(lengths, room)
    seen = {document: np.zeros(length, int) for document, length in enumerate(lengths.tolist())}
    for sample in members(packing):
        assert 0 < sum(length for _, _, length in sample) <= room
        for document, first, length in sample:
            seen[document][first + 1 : first + length] += 1
            assert first + length <= lengths[document]
            if lengths[document] <= room:
                assert (first, length) == (0, lengths[document]), "a document that fits is whole"
    for document, counts in seen.items():
        assert (counts[1:] == 1).all(), document
    again = best_fit(lengths, room)
    assert np.array_equal(packing.pieces, again.pieces) and np.array_equal(packing.borders, again.borders)


def by_definition(lengths: list[int], room: int) -> list[list[tuple[int, int, int]]]:
    """One piece after the other, each into the fullest sample with room for it, of several the one changed last."""
    pieces = []
    for document, length in enumerate(lengths):
        first = 0
        while first + 1 < length:
            pieces.append((document, first, min(room, length - first)))
            first += room - 1
            if pieces[-1][1] + pieces[-1][2] == length:
                break
    samples: list[list[tuple[int, int, int]]] = []
    left: list[int] = []
    changed: list[int] = []
    for time, piece in enumerate(sorted(pieces, key=lambda piece: -piece[2])):
        fitting = [n for n in range(len(samples)) if left[n] >= piece[2]]
        if not fitting:
            fitting = [len(samples)]
            samples.append([])
            left.append(room)
            changed.append(-1)
        chosen = min(fitting, key=lambda n: (left[n], -changed[n]))
        samples[chosen].append(piece)
        left[chosen] -= piece[2]
        changed[chosen] = time
    return samples


@pytest.mark.parametrize("room", [2, 3, 5, 17, 64, 300])
@pytest.mark.parametrize("mean", [2, 10, 50])
def test_it_is_the_definition(room: int, mean: int) -> None:
    """Pieces of one length are placed together, and lie where one after the other they would."""
    for seed in range(6):
        lengths = np.random.RandomState(seed).geometric(1 / mean, 40 * seed) - 1
        assert members(best_fit(lengths, room)) == by_definition(lengths.tolist(), room)


def test_little_padding() -> None:
    """No pair of samples would fit into one, and documents of usual lengths leave next to nothing."""
    lengths = np.random.RandomState(0).lognormal(6, 1, 5000).astype(int) + 2
    packing = best_fit(lengths, 4097)
    filled = sorted(sum(length for _, _, length in sample) for sample in members(packing))
    assert filled[0] + filled[1] > packing.room
    assert sum(filled) > 0.99 * packing.room * packing.samples


def test_refusal() -> None:
    with pytest.raises(ValueError, match="room for 1 tokens must be more than the overlap of 1"):
        best_fit(np.array([3]), 1)
