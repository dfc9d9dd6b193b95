"""Which files ``prepare`` reads."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from phd_megatron.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")
_FILE_KINDS = {
    stat.S_IFIFO: "a pipe (fifo)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def suffix_of(path: Path) -> str | None:
    """The supported suffix of ``path``, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        why = ", the link points to nothing" if path.is_symlink() else ""
        raise UserError(f"input {str(path)!r} does not exist{why}; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"input {str(path)[:200]!r} cannot be read ({reason}); check the path and its rights") from None


def _below(directory: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(
            f"input {error.filename!r} cannot be read ({error.strerror}), so its files would be left out; check its "
            "rights, or name the directories that are meant"
        )

    files: list[Path] = []
    for place, subdirectories, names in os.walk(directory, onerror=refuse):
        subdirectories.sort()
        files.extend(p for p in (Path(place, n) for n in sorted(names)) if suffix_of(p) and p.is_file())
    return files


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """Input files in the order given; directories recursively in sorted order, files of other kinds left out there.

    Raises UserError for a missing path, an unsupported or special file named directly, a directory that cannot be read,
    or when nothing is found.
    """
    files: list[Path] = []
    for name in inputs:
        if not str(name):
            raise UserError("--input '' is empty, as of a shell variable that is not set; name a file or a directory")
        path = Path(name)
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            files += _below(path)
        elif not stat.S_ISREG(mode):
            raise UserError(
                f"input {str(path)!r} is {_FILE_KINDS.get(stat.S_IFMT(mode), 'a special file')} and no regular file, "
                "and an input may be read several times; save what comes out of it in a file, and name that"
            )
        elif suffix_of(path) is None:
            raise UserError(f"input {str(path)!r} is of an unknown kind; supported are {' '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise UserError(
            f"empty corpus: no file of a supported kind ({' '.join(SUFFIXES)}) in {', '.join(map(str, inputs))}"
        )
    return files
