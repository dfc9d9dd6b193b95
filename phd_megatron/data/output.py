"""The files of one prepared data set, published so that a run never sees half of them.

Everything is written into ``PREFIX.partial/`` first. Publishing renames .bin, the tokenizer and the sidecar, and .idx
last; without .idx no run accepts the data. A killed ``prepare`` leaves at most ``PREFIX.partial/``, which the next one
for the same prefix removes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from phd_megatron.errors import UserError

SIDECAR_FORMAT = 1


def sync_path(path: Path) -> None:
    """Bring a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """What ``prepare`` noted about the data; None for data from elsewhere. Raises UserError when it is damaged."""
    path = Path(f"{prefix}.meta.json")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); prepare the data again") from error
    if not isinstance(value, dict) or not isinstance(value.get("format"), int) or value["format"] > SIDECAR_FORMAT:
        raise UserError(f"{path} is not a sidecar this version reads; prepare the data again, or delete the file")
    return value


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

    def _target(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.{suffix}")

    def __enter__(self) -> Output:
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            interrupted = self.directory.exists() and not self._target("idx").exists()
            existing = [str(self._target(s)) for s in ("bin", "idx") if self._target(s).exists()]
            if existing and not self._overwrite and not interrupted:
                raise UserError(
                    f"{' and '.join(existing)} already exist; choose another --output-prefix, or replace the data "
                    f"with --overwrite"
                )
            self._acquire()
            for leftover in self.directory.iterdir():
                if leftover.name != "lock":
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError as error:
            raise UserError(f"cannot write to {self.directory} ({error.strerror or error}); check the path") from error
        return self

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

    def publish(self, sidecar: dict[str, Any]) -> None:
        """Put ``data.bin``, ``data.idx``, ``tokenizer/`` and the sidecar in place, .idx last."""
        sizes = {f"{kind}_bytes": (self.directory / f"data.{kind}").stat().st_size for kind in ("bin", "idx")}
        meta = self.directory / "meta.json"
        text = json.dumps({"format": SIDECAR_FORMAT, **sidecar, **sizes}, indent=2, ensure_ascii=False) + "\n"
        meta.write_text(text, encoding="utf-8", errors="backslashreplace")
        for path in (*sorted((self.directory / "tokenizer").iterdir()), meta, self.directory / "data.bin"):
            sync_path(path)
        sync_path(self.directory / "data.idx")
        self._target("idx").unlink(missing_ok=True)
        sync_path(self.directory.parent)
        shutil.rmtree(self._target("tokenizer"), ignore_errors=True)
        os.replace(self.directory / "data.bin", self._target("bin"))
        os.replace(self.directory / "tokenizer", self._target("tokenizer"))
        os.replace(meta, self._target("meta.json"))
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
