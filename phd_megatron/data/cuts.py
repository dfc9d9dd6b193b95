"""Places at which a long text is cut, by the rules in :mod:`phd_megatron.data.cut_rules`."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from heapq import merge
from typing import Protocol

from phd_megatron.data.cut_rules import METASPACE, Rules

_STOPS = "。！？"
#: One place is tried in so many characters.


BLOCK = 512


class Encoder(Protocol):
    """The part of a tokenizer that is needed."""

    def tokenize(self, text: str, /) -> list[int]:
        """Ids of a text."""


class Cutter(Protocol):
    """Finds places at which a text can be cut."""

    reach: int  #: characters behind a place that are looked at

    def last(self, text: str, start: int, low: int, high: int) -> int | None:
        """The best place above ``low`` and up to ``high`` for the end of a piece that begins at ``start``."""

    def first(self, text: str, start: int, low: int, high: int) -> int | None:
        """The same, but the first."""

    def context(self, text: str, place: int) -> str:
        """What the piece that begins at ``place`` is to be tokenized behind."""


class Anywhere:
    """For a tokenizer that takes every byte for itself. After a line where there is one."""

    reach = 1

    def last(self, text: str, start: int, low: int, high: int) -> int | None:
        newline = high
        while (newline := text.rfind("\n", low, newline)) > start:
            if not text[newline - 1].isspace() and not text[newline + 1 : newline + 2].isspace():
                return newline + 1
        newline = text.rfind("\n", low, high)
        space = text.rfind(" ", low, high)
        return newline + 1 if newline >= 0 else space if space > start else high

    def first(self, text: str, start: int, low: int, high: int) -> int | None:
        return None  # there is always a last one

    def context(self, text: str, place: int) -> str:
        return ""


class WordCutter:
    """Places that the rules of a tokenizer allow.

    Args:
        rules: from :func:`rules_of`.
        tokenizer: with which every place is tried too, on the characters around it.
        normalize: the tokenizer's normalizer on a few characters.
    """

    def __init__(self, rules: Rules, tokenizer: Encoder, normalize: Callable[[str], str]) -> None:
        self._rules, self._tokenizer, self._normalize = rules, tokenizer, normalize
        self.reach = rules.reach

    def last(self, text: str, start: int, low: int, high: int) -> int | None:
        for kind in self._rules.kinds:
            for place in _one_a_block(self._places(kind, text, low, high, backwards=True), start):
                if self._is_exact(text, place, start):
                    return place
        return None

    def first(self, text: str, start: int, low: int, high: int) -> int | None:
        found = []
        for kind in self._rules.kinds:
            for place in _one_a_block(self._places(kind, text, low, high, backwards=False), start):
                if self._is_exact(text, place, start):
                    found.append(place)
                    break
        return min(found, default=None)

    def context(self, text: str, place: int) -> str:
        return "" if self._rules.is_plain else text[max(0, place - 2) : place]

    def _places(self, kind: str, text: str, low: int, high: int, *, backwards: bool) -> Iterator[int]:
        """Places whose neighbours are right."""
        marks: Iterator[int]
        if kind == "stop":
            marks = merge(*(self._marks(text, mark, low, high, backwards) for mark in _STOPS), reverse=backwards)
            after = 1
        else:
            after = 1 if kind == "line" else 0
            marks = self._marks(text, "\n" if kind == "line" else " ", low + 1 - after, high + 1 - after, backwards)
        return (mark + after for mark in marks if self._has_right_neighbours(kind, text, mark))

    @staticmethod
    def _marks(text: str, mark: str, low: int, high: int, backwards: bool) -> Iterator[int]:
        while True:
            found = text.rfind(mark, low, high) if backwards else text.find(mark, low, high)
            if found < 0:
                return
            low, high = (low, found) if backwards else (found + 1, high)
            yield found

    def _has_right_neighbours(self, kind: str, text: str, mark: int) -> bool:
        before, behind = text[max(0, mark - 1) : mark], text[mark + 1 : mark + 2]
        if not before or not behind:
            return False
        rules = self._rules
        if rules.is_plain:
            return not before.isspace() and not behind.isspace()
        if not _is_firm(before) or not _is_firm(behind) or (kind == "line" and not behind.isalnum()):
            return False
        if rules.pairs is None:
            return True
        end = mark if kind == "space" else mark + 1
        left = self._normalize(text[max(0, end - 16) : end])[-1:]
        right = METASPACE if kind == "space" else self._normalize("a" + text[end : end + 16])[len(self._normalize("a"))]
        return left + right not in rules.pairs and left in rules.characters and right in rules.characters

    def _is_exact(self, text: str, place: int, start: int) -> bool:
        """Try it on the characters around it, where an added token would be seen too."""
        ids = self._tokenizer.tokenize
        left, right = text[max(start, place - self.reach) : place], text[place : place + self.reach]
        whole, unknown = ids(left + right), self._rules.unknown
        if not self._rules.added.isdisjoint(whole) or (unknown and unknown in left + right):
            return False
        context = self.context(text, place)
        first, behind = ids(context) if context else [], ids(context + right)
        return behind[: len(first)] == first and whole == ids(left) + behind[len(first) :]


def _one_a_block(places: Iterator[int], start: int) -> Iterator[int]:
    """At most one place in each block of characters from ``start`` on: where one fails, its neighbours mostly do."""
    before = None
    for place in places:
        if (place - start - 1) // BLOCK != before:
            before = (place - start - 1) // BLOCK
            yield place


@lru_cache(maxsize=4096)
def _is_firm(character: str) -> bool:
    """Whether normalizers leave something of it that is no white space, and join it with no neighbour."""
    if "!" <= character <= "~":
        return True
    if ord(character) >= 0x10000 or character == "\u0d4e":  # the latter joins what is behind it
        return False
    kinds = {unicodedata.category(part) for part in unicodedata.normalize("NFKC", character)}
    return unicodedata.category(character) in _FIRM and kinds <= _FIRM and not unicodedata.combining(character)


_FIRM = frozenset({"Lu", "Ll", "Lt", "Lo", "Nd", "Po", "Ps", "Pe", "Pi", "Pf", "Pd"})
