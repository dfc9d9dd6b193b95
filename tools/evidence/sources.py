"""Documents out of packages: C and its documentation, or prose out of HTML, text, info and dictionary files."""

from __future__ import annotations

import fnmatch
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cleaning import is_prose
from .debs import read_members
from .html_text import paragraphs_of_html

CODE_SUFFIXES = (".c", ".h", ".S", ".rst", ".txt")
HTML_SUFFIXES = (".html", ".htm", ".xhtml", ".page", ".docbook", ".xml", ".xhp")
PROSE_SUFFIXES = (".txt", ".rst", ".md", ".pod", ".info", ".dict", ".dict.dz", ".adoc", ".texi")
_SMALLEST, _LARGEST_CODE, _LARGEST_PROSE = 400, 120_000, 60_000_000
_DOCUMENT_BLOCKS = 200  #: a book in one file becomes several documents
_SMALLEST_PROSE = 300
_INFO_PART = re.compile(r"\.info-\d+$")
_SOURCE_NOTE = re.compile(r"(\s*\[[^\[\]]{1,40}\])+$")  # a dictionary says where an entry is from


@dataclass(frozen=True)
class Document:
    """``id`` is ``package/path``, as in the archive."""

    id: str
    blocks: list[str]


def code_documents(deb: Path, package: str, inner: str | None, skipped: Sequence[str]) -> Iterator[Document]:
    """Sources and their documentation; files that are not UTF-8, tiny or generated tables are left out."""
    for path, content in read_members(deb, inner):
        name = path.partition("/")[2] if inner else path
        if not (name.endswith(CODE_SUFFIXES) or name.rpartition("/")[2].startswith("Kconfig")):
            continue
        if not _SMALLEST < len(content) < _LARGEST_CODE or any(part in name for part in skipped):
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        blocks = [block.rstrip() for block in re.split(r"\n[ \t]*\n+", text)]
        yield Document(f"{package}/{name}", [block for block in blocks if block])


def prose_documents(deb: Path, package: str, skipped: Sequence[str]) -> Iterator[Document]:
    """Paragraphs of English sentences; documents with little of them are left out."""
    for path, content in read_members(deb):
        if any(fnmatch.fnmatch(path, pattern) for pattern in skipped) or len(content) > _LARGEST_PROSE:
            continue
        name = path.removesuffix(".gz").lower()
        if path.endswith((".gz", ".dz")):
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error):
                continue
        if name.endswith(HTML_SUFFIXES):
            found = paragraphs_of_html(_decoded(content))
        elif name.endswith(PROSE_SUFFIXES) or _INFO_PART.search(name):
            found = paragraphs_of_text(_decoded(content))
            if ".dict" in name:
                found = [_SOURCE_NOTE.sub("", paragraph) for paragraph in found]
        else:
            continue
        kept = [paragraph for paragraph in found if is_prose(paragraph)]
        for number, start in enumerate(range(0, len(kept), _DOCUMENT_BLOCKS)):
            part = kept[start : start + _DOCUMENT_BLOCKS]
            if sum(map(len, part)) >= _SMALLEST_PROSE:
                yield Document(f"{package}/{path}" + (f"#{number}" if number else ""), part)


def paragraphs_of_text(text: str) -> list[str]:
    """Paragraphs of plain text: lines between blank ones, joined."""
    return [" ".join(part.split()) for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
