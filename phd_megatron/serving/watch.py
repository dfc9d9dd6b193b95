"""Who hears what the engine does: Prometheus' numbers, or nobody."""

from __future__ import annotations


class Watch:
    """Told of what the engine does, on its thread; this one does nothing with it."""

    def read(self, tokens: int) -> None:
        """A prompt of so many tokens was computed."""

    def first(self, seconds: float) -> None:
        """A row has its first token, so long after it arrived."""

    def stepped(self, rows: int, seconds: float) -> None:
        """So many rows got another token, in so long."""

    def ended(self, how: str) -> None:
        """A row left: ``done``, ``cancelled`` or ``failed``."""
