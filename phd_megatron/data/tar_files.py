"""Documents out of WebDataset's tar files, read in one go from the beginning to the end.

Members one after the other with the same name up to its first dot are one sample, and what is behind the dot names a
field of it: ``7.txt`` and ``7.json`` are the fields ``txt`` and ``json`` of sample ``7``.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.data.json_lines import parse_line
from phd_megatron.data.rows import Damaged, Row, Undecodable, too_long
from phd_megatron.data.text_encoding import decode_whole
from phd_megatron.errors import UserError

#: Fields that are a text as they are.
_TEXTS = ("txt", "md", "py")
_BLOCK = 1 << 20


class _Forward:
    """What ``tarfile`` asks of a file, over a stream that cannot go back."""

    def __init__(self, stream: io.BufferedReader, largest: int) -> None:
        self._stream, self._largest, self._place = stream, largest, 0
        self.last = b""

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = 0) -> int:
        while self._place < place and self.read(min(_BLOCK, place - self._place)):
            pass
        return self._place

    def read(self, size: int) -> bytes:
        if size > self._largest:  # such as of a name
            raise Damaged(f"a member says that it has {size} bytes of text or name")
        self.last = self._stream.read(size)
        self._place += len(self.last)
        return self.last


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise Damaged(str(error)) from error


class _Archive:
    """The regular files in an archive, one after the other.

    Raises:
        Damaged: also for an archive that ends without the zeros that end one, or goes on with something else.
    """

    def __init__(self, stream: io.BufferedReader, largest: int) -> None:
        self._forward = _Forward(stream, largest)
        with _damage():
            self._archive = tarfile.TarFile(fileobj=self._forward, errorlevel=2)  # type: ignore[arg-type]

    def members(self) -> Iterator[tarfile.TarInfo]:
        """Their headers; the content of one must be read before the next is asked for."""
        while True:
            with _damage():
                member = self._archive.next()
            if member is None:
                break
            self._archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
            if member.isfile():
                yield member
        if self._forward.last != bytes(tarfile.BLOCKSIZE):
            raise Damaged("no end of the archive")

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The content of a member."""
        with _damage():
            content = self._archive.extractfile(member)
            return b"" if content is None else content.read()


@dataclass(frozen=True)
class _Sample:
    """Fields by name; only those that may hold the text have their content."""

    key: str
    fields: dict[str, bytes]

    def chosen(self, key: str, path: Path) -> tuple[str, str]:
        """The field in which the text is, and the key in it where that is JSON."""
        if key in self.fields and key != "json":
            return key, ""
        head, _, rest = key.partition(".")
        if head == "json" and rest and "json" in self.fields:
            return "json", rest
        texts = [field for field in _TEXTS if field in self.fields] if key == "text" else []
        if len(texts) > 1:
            raise UserError(
                f"{path}: sample {self.key!r} has {' and '.join(texts)}, so which text is meant is open; name one, as "
                f"--json-key {texts[0]}"
            )
        if texts:
            return texts[0], ""
        if "json" in self.fields:
            return "json", key
        raise UserError(
            f"{path}: sample {self.key!r} has no text (its fields: {', '.join(self.fields)}); name the field with "
            "--json-key, as txt, or as json.caption for a key in it"
        )


def _samples(stream: io.BufferedReader, path: Path, wanted: tuple[str, ...], largest: int) -> Iterator[_Sample]:
    archive = _Archive(stream, largest)
    sample, size = _Sample("", {}), 0
    for member in archive.members():
        folder, slash, base = member.name.rpartition("/")
        stem, _, field = base.partition(".")
        if not stem or not field:
            continue
        key = f"{folder}{slash}{stem}"
        if key != sample.key:
            if sample.key:
                yield sample
            sample, size = _Sample(key, {}), 0
        field = field.lower()
        if field in sample.fields:
            raise UserError(f"{path}: member {member.name!r} is there twice; keep one")
        sample.fields[field] = b""
        if field in wanted:
            size += member.size
            if size > largest:
                raise UserError(too_long(f"{path}: member {member.name!r}", "member", largest))
            sample.fields[field] = archive.read(member)
    if sample.key:
        yield sample


def tar_rows(stream: io.BufferedReader, path: Path, key: str, largest: int) -> Iterator[Row]:
    """A document a sample: its text member, of at most ``largest`` bytes, or the text in its ``json`` member.

    ``key`` names the field, or the key in ``json``, which may also be written ``json.KEY``; ``text`` is the one of
    ``txt``, ``md`` and ``py`` that is there, or else the key ``text`` in ``json``.
    """
    for sample in _samples(stream, path, (*_TEXTS, "json", key), largest):
        field, inside = sample.chosen(key, path)
        member = f"{sample.key}.{field}"
        where = f"{path}: member {member!r}"
        text: str | Undecodable
        try:
            data = sample.fields[field]
            text = parse_line(data, where, inside, "member") if inside else decode_whole(data, member)
        except Undecodable as error:
            text = error
        yield Row(f"member {member}", where, text, is_file=not inside)
