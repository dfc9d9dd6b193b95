"""Large numbers for people."""

from __future__ import annotations


def short(number: float) -> str:
    """``1234567`` to ``1.23M``: three digits or more, with k, M, B or T."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            scaled = number / unit
            return f"{scaled:.2f}{letter}" if scaled < 100 else f"{scaled:.0f}{letter}"
    return f"{number:.4g}"


def gib(count: float) -> str:
    """A number of bytes in GiB."""
    return f"{count / 2**30:,.1f} GiB"
