"""Which prefixes a split reads and with what weight, checked before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from phd_megatron.config.schema import DataConfig
from phd_megatron.data.indexed import IndexedInfo
from phd_megatron.errors import UserError

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = ("training", "validation", "test")


@dataclass(frozen=True)
class SplitPlan:
    """One split: its prefixes, their weights (None: by tokens) and the share of each prefix's sequences."""

    prefixes: list[str]
    weights: list[float] | None
    share: tuple[float, float]

    @property
    def words(self) -> tuple[str, ...]:
        """As it is written: the prefixes, or pairs of weight and prefix."""
        if self.weights is None:
            return tuple(self.prefixes)
        pairs = zip(self.weights, self.prefixes, strict=True)
        return tuple(word for weight, prefix in pairs for word in (f"{weight:g}", prefix))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_blend(words: Sequence[str], name: str) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of ``PREFIX``, ``PREFIX PREFIX ...`` or ``WEIGHT PREFIX WEIGHT PREFIX ...``.

    Raises UserError for no prefix, for pairs that are mixed up, and for weights that are not positive.
    """
    words = [str(word) for word in words]
    if not words:
        raise UserError(f"--{name} is empty; give the prefix of prepared data, or WEIGHT PREFIX pairs")
    if _number(words[0]) is None:
        stray = [word for word in words if _number(word) is not None]
        if stray:
            raise UserError(
                f"--{name} {' '.join(words)}: {stray[0]!r} is a weight without its place; write WEIGHT PREFIX pairs, "
                f"or prefixes only"
            )
        return words, None
    if len(words) % 2:
        raise UserError(f"--{name} {' '.join(words)}: {len(words)} words make no WEIGHT PREFIX pairs; add what lacks")
    weights: list[float] = []
    for word in words[::2]:
        value = _number(word)
        if value is None or not math.isfinite(value) or value <= 0:
            raise UserError(f"--{name}: weight {word!r} is no positive number; write WEIGHT PREFIX pairs")
        weights.append(value)
    return words[1::2], weights


def parse_split(split: str) -> list[tuple[float, float]]:
    """Begin and end of each split as shares of 1, from three numbers such as ``969,30,1``; missing ones are 0."""
    words = [word for word in re.split(r"[,\s/]+", split.strip()) if word]
    values = [_number(word) for word in words]
    parts = [value for value in values if value is not None and math.isfinite(value) and value >= 0]
    if not 1 <= len(words) <= 3 or len(parts) != len(words) or not 0 < sum(parts) < math.inf:
        raise UserError(
            f"--split {split!r} is not up to three shares of at least 0 with a positive sum; write for example 969,30,1"
        )
    total = sum(parts)
    shares = [value / total for value in parts] + [0.0] * (3 - len(parts))
    borders = [0.0, shares[0], shares[0] + shares[1], 1.0]
    # The last split that is not empty ends at exactly 1, whatever the rounding of the sums.
    return [(borders[i], 1.0 if not any(shares[i + 1 :]) else borders[i + 1]) for i in range(3)]


def plan_splits(data: DataConfig) -> list[SplitPlan | None]:
    """The three splits of a run's data section. Raises UserError for none or for two ways at once."""
    separate = [data.train_data_path, data.valid_data_path, data.test_data_path]
    if any(separate):
        if data.data_path:
            raise UserError(
                "--data-path and --train/valid/test-data-path are both given, so it is unclear what is read; keep one"
            )
        plans: list[SplitPlan | None] = []
        for name, words in zip(SPLITS, separate, strict=True):
            plans.append(SplitPlan(*parse_blend(words, f"{name}-data-path"), (0.0, 1.0)) if words else None)
        return plans
    prefixes, weights = parse_blend(data.data_path, "data-path")
    return [
        SplitPlan(prefixes, weights, (begin, end)) if end > begin else None for begin, end in parse_split(data.split)
    ]


def documents_of(info: IndexedInfo, share: tuple[float, float]) -> range:
    """Sequences of a prefix's part of a split, rounded as Megatron rounds."""
    count = len(info.lengths)
    begin, end = (round(border * float(count)) for border in share)
    return range(begin, end)


def tokens_in(info: IndexedInfo, share: tuple[float, float]) -> int:
    """Tokens of a prefix's part of a split."""
    return info.tokens_of(documents_of(info, share))


def check_split(plan: SplitPlan, infos: dict[str, IndexedInfo], seq_length: int, index: int) -> list[int]:
    """Tokens per prefix of a split that will be read. Raises UserError when a part has no full sample."""
    tokens = [tokens_in(infos[prefix], plan.share) for prefix in plan.prefixes]
    for prefix, count in zip(plan.prefixes, tokens, strict=True):
        if count < seq_length + 1:
            info = infos[prefix]
            raise UserError(
                f"the {SPLIT_NAMES[index]} split of {prefix!r} holds {count} tokens of its {info.tokens} (it is cut "
                f"between its {len(info.lengths)} sequences), but one sample needs {seq_length + 1}; give more data, "
                f"a larger share in --split, a smaller --seq-length" + (", or --eval-iters 0" if index else "")
            )
    return tokens
