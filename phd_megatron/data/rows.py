"""What every file of many documents is read into: rows, each with its place for a message."""

from __future__ import annotations

from typing import NamedTuple


class Undecodable(Exception):
    """The file or row is not text in its encoding."""


class Damaged(Exception):
    """A file ends too early, or what is in it cannot be unpacked."""


class Row(NamedTuple):
    """One document, or why it is none that can be decoded.

    Attributes:
        place: where in its file, for people, such as ``line 3``; the first word is what the file is made of.
        where: file and place, as a message begins.
        is_file: the text of a file of its own, which is cut like one when it is long.
    """

    place: str
    where: str
    text: str | Undecodable
    is_file: bool = False


def missing(package: str, path: object, error: ImportError) -> str:
    """What is said where an optional package is not there."""
    reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
    return (
        f"{path}: reading it needs {package}{reason}; install it with `pip install {package}`, or all that prepare "
        "reads with, the extra `data`"
    )


def too_long(where: str, unit: str, limit: int) -> str:
    """What is said of a document, or a line of a file, that is none for its length."""
    return (
        f"{where}: the {unit} has more than {limit} bytes, so it is no document; write one document a {unit}, and "
        "check that the file has line feeds"
    )
