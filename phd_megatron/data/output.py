"""The files of one prepared data set, published so that a run never sees half of them.

Everything is written into ``PREFIX.partial/`` first. Publishing renames .bin, the tokenizer and the sidecar, and .idx
last; without .idx no run accepts the data. A killed ``prepare`` leaves at most ``PREFIX.partial/``, which the next one
for the same prefix removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeGuard

from phd_megatron.config.files import read_json
from phd_megatron.config.plain import Json, Plain
from phd_megatron.data.indexed import IndexedInfo
from phd_megatron.data.tokenizer_files import SAVED_FILES
from phd_megatron.errors import UserError, shown

SIDECAR_FORMAT = 1
_LARGEST_SIDECAR = 1 << 31  # bytes; it names every file of the input
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
#: all that a prepare ever has in ``PREFIX.partial/``
_PARTIAL = frozenset({"lock", "data.bin", "data.idx", "tokenizer", "meta.json", "lengths", "marks"})


def sync_path(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_sidecar(prefix: str) -> Json | None:
    """What ``prepare`` noted about the data; None for data from elsewhere. Raises UserError when it is damaged."""
    path = Path(f"{prefix}.meta.json")
    if not os.path.lexists(path):
        return None
    value = read_json(path, "prepare the data again", _LARGEST_SIDECAR)
    number = value.get("format") if isinstance(value, dict) else None
    if not _is_count(number) or not 1 <= number <= SIDECAR_FORMAT:
        raise UserError(f"{path} is not a sidecar this version reads; prepare the data again, or delete the file")
    for key in ("bin_bytes", "idx_bytes", "max_token_id"):
        if key in value and not _is_count(value[key]):
            raise UserError(f"{path} is damaged: {key}={shown(value[key])} is no number; prepare the data again")
    if not isinstance(value.get("tokenizer"), dict):
        raise UserError(
            f"{path} is damaged: tokenizer={shown(value.get('tokenizer'))} describes none; prepare the data again"
        )
    return dict(value)


def sidecar_of(info: IndexedInfo) -> Json | None:
    """The sidecar of data that was opened.

    Raises:
        UserError: as :func:`read_sidecar`, and for one that is of other files.
    """
    sidecar = read_sidecar(info.prefix)
    if sidecar is None:
        return None
    noted, sizes = (sidecar.get("bin_bytes"), sidecar.get("idx_bytes")), (info.bin_file.size, info.idx_file.size)
    if noted != sizes:
        raise UserError(
            f"{info.prefix}.meta.json notes {noted[0]} and {noted[1]} bytes but .bin and .idx have {sizes[0]} and "
            f"{sizes[1]}; they are not of one prepare, so prepare the data again"
        )
    return sidecar


def _is_count(value: Plain) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _identity(path: Path) -> tuple[int, ...] | None:
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _noted_size(sidecar: Path) -> int | None:
    """Bytes of the .bin that a sidecar is of; None where it is missing or damaged."""
    if not sidecar.is_file():
        return None
    try:
        content = read_json(sidecar, "prepare the data again", _LARGEST_SIDECAR)
    except UserError:
        return None
    size = content.get("bin_bytes") if isinstance(content, dict) else None
    return size if _is_count(size) else None


#: of ``PREFIX.``: what a prepared data set is made of
SUFFIXES = ("bin", "idx", "tokenizer", "meta.json")


@contextlib.contextmanager
def explained(prefix: str | Path) -> Iterator[None]:
    """What the disk says while ``prefix`` is written, as a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left while writing {prefix} ({error.strerror}); free some space or choose another "
                f"--output-prefix; nothing was left behind"
            ) from error
        raise UserError(f"cannot write {prefix} ({error}); check the path and its rights") from error


class Output:
    """A locked ``PREFIX.partial/`` that becomes the data set at ``publish`` or disappears."""

    def __init__(self, prefix: str, overwrite: bool) -> None:
        if not prefix or prefix.endswith(("/", ".bin", ".idx")):
            raise UserError(
                f"--output-prefix {prefix!r} is no prefix of files; give for example data/books, which makes "
                f"data/books.bin and data/books.idx"
            )
        self.prefix = prefix
        self.directory = Path(f"{prefix}.partial")
        self._overwrite = overwrite
        self._lock: int | None = None
        self._own_bin: tuple[int, ...] | None = None

    def _target(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}")

    def __enter__(self) -> Output:
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._check_partial()
            if self._publishing_was_interrupted():
                self._own_bin = _identity(self._target("bin"))
            self._check_targets()
            self._acquire()
            for leftover in self.directory.iterdir():
                if leftover.name != "lock":
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError as error:
            raise UserError(f"cannot write to {self.directory} ({error.strerror or error}); check the path") from error
        return self

    def _check_partial(self) -> None:
        """Refuse to work, and to clean up, in a directory that no prepare made."""
        path = self.directory
        if not os.path.lexists(path):
            return
        others = [] if path.is_symlink() or not path.is_dir() else sorted({p.name for p in path.iterdir()} - _PARTIAL)
        if path.is_symlink() or not path.is_dir() or others:
            what = f"holds {others[0]}, which no prepare wrote" if others else "is no directory"
            raise UserError(
                f"{path} {what}, and that is where prepare works; move it away, or choose another --output-prefix"
            )

    def _publishing_was_interrupted(self) -> bool:
        """Whether ``PREFIX.bin`` without its .idx is what a killed :meth:`publish` left there, old or new."""
        if self._target("idx").exists() or not self._target("bin").is_file():
            return False
        begun = (self.directory / "data.idx").exists() and (
            (self.directory / "meta.json").exists() or not (self.directory / "data.bin").exists()
        )
        size = self._target("bin").stat().st_size
        return begun and size in {_noted_size(p) for p in (self.directory / "meta.json", self._target("meta.json"))}

    def _check_targets(self) -> None:
        """Refuse what stands where the data goes, unless it is data, and --overwrite or an interrupted prepare."""
        cure = "move it away, or choose another --output-prefix"
        found = {suffix: path for suffix in SUFFIXES if os.path.lexists(path := self._target(suffix))}
        for suffix, path in found.items():
            is_folder = suffix == "tokenizer"
            if path.is_symlink() or not (path.is_dir() if is_folder else path.is_file()):
                kind = "a link" if path.is_symlink() else "no directory" if is_folder else "no regular file"
                raise UserError(f"{path} is {kind}, so it is not replaced; {cure}")
            if is_folder and (others := sorted({p.name for p in path.iterdir()} - {*SAVED_FILES})):
                raise UserError(f"{path} holds {others[0]}, which is no tokenizer's, so it is not replaced; {cure}")
        if "meta.json" in found:
            self._check_sidecar(found["meta.json"], cure)
        if "idx" in found:
            with open(found["idx"], "rb") as stream:
                if stream.read(len(_INDEX_MAGIC)) != _INDEX_MAGIC:
                    raise UserError(f"{found['idx']} is no index of Megatron's, so it is not replaced; {cure}")
        # What is left of data of ours, whose .bin and .idx are gone, needs no word.
        existing = [str(path) for suffix, path in found.items() if suffix in ("bin", "idx")]
        if "tokenizer" in found and "meta.json" not in found:
            existing.append(str(found["tokenizer"]))
        if not existing or (self._own_bin is not None and self._own_bin == _identity(self._target("bin"))):
            return
        if "bin" in found and "idx" not in found and "meta.json" not in found:
            raise UserError(f"{found['bin']} has no .idx beside it, so it is not known to be data; {cure}")
        if not self._overwrite:
            raise UserError(
                f"{' and '.join(existing)} already exist{'s' * (len(existing) == 1)}; choose another --output-prefix, "
                "or replace the data with --overwrite"
            )

    def _check_sidecar(self, path: Path, cure: str) -> None:
        try:
            content = json.loads(path.read_bytes())
            ours = isinstance(content, dict) and {"format", "tokenizer"} <= content.keys()
        except (ValueError, RecursionError):
            ours = not path.stat().st_size  # a full disk can leave an empty one
        if not ours:
            raise UserError(f"{path} is no sidecar of prepare's, so it is not replaced; {cure}")

    def _acquire(self) -> None:
        # An OS lock: it ends with the process however that ends, so a killed prepare never blocks the next.
        self.directory.mkdir(exist_ok=True)
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise UserError(
                f"another prepare is writing {self.prefix} now; wait for it, or choose another --output-prefix"
            ) from None

    def publish(self, sidecar: Json | None) -> None:
        """Put ``data.bin``, ``data.idx``, ``tokenizer/`` and the sidecar in place, .idx last.

        With None there is neither a tokenizer nor a sidecar, as for data that Megatron made.
        """
        sizes = {f"{kind}_bytes": (self.directory / f"data.{kind}").stat().st_size for kind in ("bin", "idx")}
        meta = self.directory / "meta.json"
        text = json.dumps({"format": SIDECAR_FORMAT, **(sidecar or {}), **sizes}, indent=2, ensure_ascii=False) + "\n"
        meta.write_text(text, encoding="utf-8", errors="backslashreplace")
        tokenizer = self.directory / "tokenizer"
        for path in (*(sorted(tokenizer.iterdir()) if sidecar is not None else ()), meta, self.directory / "data.bin"):
            sync_path(path)
        sync_path(self.directory / "data.idx")
        self._check_targets()  # hours may have passed
        self._target("idx").unlink(missing_ok=True)
        sync_path(self.directory.parent)
        shutil.rmtree(self._target("tokenizer"), ignore_errors=True)
        os.replace(self.directory / "data.bin", self._target("bin"))
        if sidecar is not None:
            os.replace(tokenizer, self._target("tokenizer"))
            os.replace(meta, self._target("meta.json"))
        else:
            self._target("meta.json").unlink(missing_ok=True)
        sync_path(self.directory.parent)
        os.replace(self.directory / "data.idx", self._target("idx"))
        sync_path(self.directory.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
