"""In which encoding a text file is, and its text."""

from __future__ import annotations

import codecs
import io
import itertools
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from phd_megatron.data.inputs import suffix_of
from phd_megatron.data.json_lines import BYTE_ORDER_MARK
from phd_megatron.data.rows import Undecodable


def encoding_of(path: Path, readline: Callable[[], bytes]) -> str:
    """UTF-8, or for Python source what its byte-order mark or coding line says (PEP 263).

    Raises:
        Undecodable: what it says is no encoding of text.
    """
    if suffix_of(path) != ".py":
        return "utf-8"
    try:
        encoding = tokenize.detect_encoding(readline)[0]
    except SyntaxError as error:
        raise Undecodable(f"of no known encoding ({error})") from error
    if not getattr(codecs.lookup(encoding), "_is_text_encoding", True):  # rot13, zlib and the like
        raise Undecodable(f"declared as {encoding}, which is no encoding of text")
    return encoding


def decoded(blocks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """The text of a file without byte-order mark, newlines as they are.

    Raises:
        Undecodable: it is not in that encoding, or holds NUL bytes.
    """
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    position, is_start = 0, True
    for block in itertools.chain(filter(None, blocks), [b""]):
        held = len(decoder.getstate()[0])  # bytes of a character that the blocks before began
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeError as error:
            where = f" near byte {position - held + error.start}" if isinstance(error, UnicodeDecodeError) else ""
            reason = str(getattr(error, "reason", error))
            if not position and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                reason += "; it begins as UTF-16 does"
            raise Undecodable(f"not {encoding}{where} ({reason})") from error
        if "\0" in text:
            place = position + block.find(b"\0")
            raise Undecodable(f"no text but binary, or UTF-16: it holds a NUL byte (near byte {place})")
        if text and is_start:
            is_start = False
            if encoding == "utf-8":
                text = text.removeprefix(BYTE_ORDER_MARK)
        yield text
        position += len(block)


def decode_whole(data: bytes, name: str) -> str:
    """The text of a file of that name which is in memory. Raises Undecodable."""
    return "".join(decoded([data], encoding_of(Path(name), io.BytesIO(data).readline)))
