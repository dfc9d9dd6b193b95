"""What of a corpus says something of its own: duplicates of documents and blocks, and what is prose.

A block is a paragraph: of prose, or of code between blank lines. Everything is exact and depends on the order of the
documents alone: what comes first is kept.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b

SHORT_BLOCK = 80  #: characters; shorter blocks (a closing brace, a heading) may repeat
DOCUMENT_SHARE = 0.5  #: of a document's shingles seen before: it is a near-duplicate
BLOCK_SHARE = 0.8  #: the same for one block
SMALLEST_REST = 200  #: characters; what is left of a page of prose, if less, is no document
_FEW_SHINGLES = 3  #: fewer say nothing of nearness
_CODE_LINES, _PROSE_WORDS, _SAMPLED = 3, 8, 4
_WORD = re.compile(r"[a-z]+|[0-9]+")
_SPACE_AND_DIGITS = re.compile(r"[\s\d]+")

Shingles = Callable[[str], set[int]]


def digest(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def key_of(block: str) -> int:
    """Equal for blocks that differ in case, white space and digits only."""
    return digest(_SPACE_AND_DIGITS.sub(" ", block.lower()).strip())


def code_shingles(block: str) -> set[int]:
    """Each run of three lines, without the shortest ones, white space apart."""
    lines = [stripped for line in block.splitlines() if len(stripped := "".join(line.split())) > 3]
    return {digest("\n".join(lines[i : i + _CODE_LINES])) for i in range(len(lines) - _CODE_LINES + 1)}


def prose_shingles(block: str) -> set[int]:
    """Runs of eight words that begin at about every fourth word; which words those are hangs on the words alone."""
    words = _WORD.findall(block.lower())
    return {
        digest(" ".join(words[i : i + _PROSE_WORDS]))
        for i in range(len(words) - _PROSE_WORDS + 1)
        if zlib.crc32(words[i].encode()) % _SAMPLED == 0
    }


class Duplicates:
    """Remembers what has been kept; :attr:`removed` counts the characters that were not, by reason.

    Args:
        shingles: of a block.
        whole: whether a document that is half there already goes as a whole. A program of which half is left is none;
            of a page of prose each paragraph stands for itself.
    """

    def __init__(self, shingles: Shingles, whole: bool) -> None:
        self._shingles, self._whole = shingles, whole
        self._documents: set[int] = set()
        self._blocks: set[int] = set()
        self._seen: set[int] = set()
        self.removed: Counter[str] = Counter()

    def keep(self, blocks: Sequence[str]) -> list[str]:
        """The blocks of one document that are new; none when the document as a whole is not."""
        size = sum(map(len, blocks))
        whole = digest("\n".join(blocks))
        if whole in self._documents:
            self.removed["documents that are there already"] += size
            return []
        self._documents.add(whole)
        found = [self._shingles(block) for block in blocks]
        if self._whole and self._near(set().union(*found), DOCUMENT_SHARE):
            self.removed["near-duplicate documents"] += size
            return []
        kept = []
        for block, shingles in zip(blocks, found, strict=True):
            if len(block) >= SHORT_BLOCK:
                key = key_of(block)
                if key in self._blocks:
                    self.removed["blocks that are there already"] += len(block)
                    continue
                self._blocks.add(key)
                if self._near(shingles, BLOCK_SHARE):
                    self.removed["near-duplicate blocks"] += len(block)
                    continue
            self._seen |= shingles
            kept.append(block)
        left = sum(map(len, kept))
        if 2 * len("\n\n".join(kept)) < size if self._whole else left < SMALLEST_REST:
            self.removed["what was left of documents"] += left
            return []
        return kept

    def _near(self, shingles: set[int], share: float) -> bool:
        return len(shingles) >= _FEW_SHINGLES and len(shingles & self._seen) >= share * len(shingles)


_COMMONEST = (
    "the of and to a in is that it as for was with be by on not he his at from or are this have an which but you they "
    "were had all their we there been has when who will more no if out so what up into do any your its than then them "
    "can only other must may should would could these those such because where while how also"
)
_FUNCTION_WORDS = frozenset(_COMMONEST.split())
_FEWEST_WORDS, _FUNCTION_SHARE, _LETTER_SHARE = 8, 0.2, 0.7


def is_prose(block: str) -> bool:
    """Whether a paragraph is English sentences: words, of which a fifth are the commonest ones, and an end."""
    words = _WORD.findall(block.lower())
    if len(words) < _FEWEST_WORDS or block.rstrip("\"')]” ")[-1:] not in (".", "!", "?", ":", ";"):
        return False
    letters = sum(character.isalpha() or character == " " for character in block)
    if letters < _LETTER_SHARE * len(block):
        return False
    return sum(word in _FUNCTION_WORDS for word in words) >= _FUNCTION_SHARE * len(words)
