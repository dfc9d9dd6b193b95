"""What a pipeline stage keeps for its backward passes at most, in Megatron-Core's order of micro-batches (1F1B)."""

from __future__ import annotations

from collections.abc import Sequence


def passes(count: int, chunks: int, group: int) -> list[int]:
    """The chunk of each forward pass of a step: groups of micro-batches go through one chunk after the other.

    Args:
        count: micro-batches of a step.
        chunks: of the model on this stage.
        group: micro-batches that go through a chunk before the next chunk has its turn.
    """
    order = []
    for first in range(0, count, group):
        order += [chunk for chunk in range(chunks) for _ in range(min(group, count - first))]
    return order


def most_kept(kept: Sequence[float], stage: int, stages: int, count: int, group: int, ahead: int = 0) -> float:
    """The most that is kept at a time of a step.

    A stage runs some forward passes, then one forward and one backward by turns: with one chunk as many as stages
    follow it; with several twice as many, and a group for each chunk but the last.

    Args:
        kept: by a forward pass of each chunk.
        count, group: as :func:`passes`'.
        ahead: further forward passes before the first backward one.
    """
    chunks, after = len(kept), stages - stage - 1
    before = ahead + (after if chunks == 1 else 2 * after + (chunks - 1) * group)
    forward = passes(count, chunks, group)
    now = most = 0.0
    for number, chunk in enumerate(forward):
        now += kept[chunk]
        most = max(most, now)
        if number >= before:
            now -= kept[chunks - 1 - forward[number - before]]
    return most
