"""The padded vocabulary: a property of the model alone, the same in every layout."""

from __future__ import annotations


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """The vocabulary rounded up to a multiple; no TP size enters."""
    return -(-vocab_size // divisible_by) * divisible_by
