"""Ends a text where a stop string begins, and lets out no part of one before."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Takes a text in pieces of any size.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def take(self, piece: str) -> str:
        """What of the text is certain now; once :attr:`found` is true it is over, and the stop string is not in it."""
        if self.found:
            return ""
        text = self._held + piece
        # The one that ends first, so that the size of the pieces makes no difference.
        ends = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        certain = len(text) - self._waiting(text)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What was held back, when nothing comes any more."""
        held, self._held = self._held, ""
        return held

    def _waiting(self, text: str) -> int:
        """Characters at the end that a stop string may begin with; the longest such end."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
