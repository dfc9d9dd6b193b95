"""Which files ``prepare`` reads."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from phd_megatron.data.compressed import is_compressed
from phd_megatron.data.saved_datasets import saved_files
from phd_megatron.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
#: with what stands between two fields
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
COLUMN_SUFFIXES = (".parquet", ".arrow")
_PACKED = (*TEXT_SUFFIXES, ".jsonl", ".json", *TABLE_SUFFIXES, ".tar")
#: kind of file by the end of its name
_KINDS = {
    **{f"{suffix}{packed}": suffix for suffix in _PACKED for packed in ("", ".gz", ".zst")},
    ".tgz": ".tar",
    **{suffix: suffix for suffix in COLUMN_SUFFIXES},
}
SUPPORTED = f"{' '.join(_PACKED)}, each also as .gz or .zst, {' and '.join(COLUMN_SUFFIXES)}"
_FILE_KINDS = {
    stat.S_IFIFO: "a pipe (fifo)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def suffix_of(path: Path) -> str | None:
    """Of which kind ``path`` is, as the suffix that it has when it is not compressed; None for no kind of ours."""
    name = path.name.lower()
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), None)


def estimated_text(path: Path) -> int:
    """Bytes of text in a file, roughly: what is compressed holds some four times its size."""
    return path.stat().st_size * (4 if is_compressed(path) or suffix_of(path) == ".parquet" else 1)


def _is_meant(path: Path) -> bool:
    """Whether a file that was found in a directory is an input.

    Files called ``.json`` are mostly settings. One that holds an array is data; any other is when it is named itself.
    """
    kind = suffix_of(path)
    if kind is None or not path.is_file():
        return False
    if kind == ".json" and path.name.lower().endswith(".json"):
        with path.open("rb") as stream:
            return stream.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return True


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
        if (saved := saved_files(Path(place))) is not None:
            subdirectories.clear()
            files += saved
            continue
        files += filter(_is_meant, (Path(place, name) for name in sorted(names)))
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
            raise UserError(f"input {str(path)!r} is of an unknown kind; supported are {SUPPORTED}")
        else:
            files.append(path)
    if not files:
        raise UserError(f"empty corpus: no file of a supported kind ({SUPPORTED}) in {', '.join(map(str, inputs))}")
    return files
