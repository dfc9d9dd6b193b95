"""How hard the parts of a text are for each other: an n-gram model counted on one, asked about the others.

It answers, in two minutes without a GPU, whether a validation set is what training text is: a set drawn from the same
documents has the loss of training text that was not counted, held-out folders a higher one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import PARTS

BLOCK = 65_536  #: tokens, a training batch of the queue
_ORDER = 3  #: tokens of context


@dataclass(frozen=True)
class Loss:
    """Nats per token, and how far blocks of :data:`BLOCK` tokens lie apart (NaN below two blocks)."""

    mean: float
    spread: float
    blocks: int

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.spread / math.sqrt(max(self.blocks, 1))


class NGram:
    """Interpolated n-grams (Witten and Bell) up to three tokens of context.

    p(y | x) = (c(x y) + d(x) p(y | x')) / (c(x) + d(x)), with counts c, the number of different tokens d(x) that were
    seen after x, and x' = x without its first token; below one token of context, counts plus 0.1.
    """

    def __init__(self, tokens: Any, vocab_size: int) -> None:
        self._vocab = vocab_size
        counted = np.asarray(tokens, dtype=np.int64)
        alone = np.bincount(counted, minlength=vocab_size) + 0.1
        self._alone = alone / alone.sum()
        self._tables = []
        for order in range(1, _ORDER + 1):
            context = self._keys(counted, order, 0)
            pairs, pair_counts = np.unique(context * vocab_size + counted[order:], return_counts=True)
            seen, different = np.unique(pairs // vocab_size, return_counts=True)
            counts = np.zeros(len(seen), dtype=np.int64)
            np.add.at(counts, np.searchsorted(seen, pairs // vocab_size), pair_counts)
            self._tables.append((pairs, pair_counts, seen, counts, different))

    def losses(self, tokens: Any) -> Any:
        """-log p of each token after the first three, in nats."""
        asked = np.asarray(tokens, dtype=np.int64)
        following = asked[_ORDER:]
        p = self._alone[following]
        for order, (pairs, pair_counts, seen, counts, different) in enumerate(self._tables, 1):
            context = self._keys(asked, order, _ORDER - order)
            found, total = _look_up(seen, counts, context)
            kinds = np.where(found, _look_up(seen, different, context)[1], 0)
            hits = _look_up(pairs, pair_counts, context * self._vocab + following)[1]
            p = np.where(found, (hits + kinds * p) / np.maximum(total + kinds, 1), p)
        return -np.log(p)

    def _keys(self, tokens: Any, order: int, skipped: int) -> Any:
        """A number for each context of ``order`` tokens that a token follows, from place ``skipped`` on."""
        length = len(tokens) - order - skipped
        keys = np.zeros(length, dtype=np.int64)
        for place in range(skipped, skipped + order):
            keys = keys * self._vocab + tokens[place : place + length]
        return keys


def _look_up(keys: Any, values: Any, asked: Any) -> tuple[Any, Any]:
    """(whether it is there, its value or 0) for each of ``asked``."""
    places = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    found = keys[places] == asked
    return found, np.where(found, values[places], 0)


def summarise(losses: Any) -> Loss:
    """Mean and spread over whole blocks."""
    blocks = len(losses) // BLOCK
    means = losses[: blocks * BLOCK].reshape(blocks, BLOCK).mean(axis=1) if blocks else losses[:0]
    spread = float(np.std(means, ddof=1)) if blocks > 1 else math.nan
    return Loss(float(losses.mean()), spread, blocks)


def compare_parts(data: Path, vocab_size: int, counted: int, asked: int) -> dict[str, Loss]:
    """The parts of a prepared text, by a model counted on the first ``counted`` tokens of its training part.

    Args:
        data: folder with ``train.bin`` and the others.
        vocab_size: of its tokenizer.
        counted: tokens that the model is made of; about 40 bytes of memory each.
        asked: tokens that each part is asked about.
    """
    train = np.memmap(data / f"{PARTS[0]}.bin", np.uint16, "r")
    model = NGram(train[:counted], vocab_size)
    asked = min(asked, len(train) - counted)
    parts = {"training text that was not counted": train[len(train) - asked :]}
    parts |= {part: np.memmap(data / f"{part}.bin", np.uint16, "r")[:asked] for part in PARTS[1:]}
    return {name: summarise(model.losses(tokens)) for name, tokens in parts.items()}


def lines_of(found: dict[str, Loss]) -> Sequence[str]:
    """A table."""
    return [
        f"{name}: {loss.mean:.4f} +- {loss.error:.4f} nats per token; {BLOCK} tokens differ by {loss.spread:.4f}"
        for name, loss in found.items()
    ]
