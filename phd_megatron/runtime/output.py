"""What a command may replace: what the same command wrote before, and nothing else.

The rule, for every command that writes a file or a directory that its user names:

- where nothing stands, it writes;
- what stands there is replaced only if its content says that the same command wrote it (reports, plots), and where the
  command has ``--overwrite`` only with it (exports, data);
- a link, a directory in a file's place, a file in a directory's, and everything whose origin cannot be seen stay as
  they are, and the command refuses before it works.

A new file takes its place by a rename, so the old one stays whole until then. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from phd_megatron.errors import UserError, naming
from phd_megatron.runtime.temporary import temporary_directory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: what plots say about their origin, in the metadata that their format has
SIGNATURE = "phd-megatron"
#: last line of our Markdown and HTML files
SIGNED_TEXT = f"<!-- written by {SIGNATURE} -->\n"
_SEEN = 1 << 16  # bytes of a file that are looked at, of a text or picture
_LARGEST_REPORT = 1 << 28  # bytes of a JSON file that is looked at
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Kind(NamedTuple):
    """One kind of output file: what a message calls it, and how one is recognised."""

    what: str
    is_ours: Callable[[Path], bool]


def json_report(what: str, *keys: str, others: Sequence[Sequence[str]] = ()) -> Kind:
    """A JSON file that holds a mapping with these keys, or with all of one of the ``others``, or a list of such."""

    def is_ours(path: Path) -> bool:
        if path.stat().st_size > _LARGEST_REPORT:
            return False
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return False
        rows = content if isinstance(content, list) and content else [content]
        return all(isinstance(row, dict) and any(row.keys() >= {*wanted} for wanted in (keys, *others)) for row in rows)

    return Kind(what, is_ours)


def text_report(what: str, *beginnings: str) -> Kind:
    """A text file that begins with one of these words."""
    return Kind(what, lambda path: _start(path).startswith(tuple(word.encode() for word in beginnings)))


def signed(what: str) -> Kind:
    """A file with the :data:`SIGNATURE`: a plot of :func:`save_figure`, or a text that ends with it."""
    return Kind(what, lambda path: SIGNATURE.encode() in _start(path) + _end(path))


def _start(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(_SEEN)


def _end(path: Path) -> bytes:
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - len(SIGNED_TEXT) - 1))
        return stream.read()


def check_file(path: str | os.PathLike[str], option: str, kind: Kind) -> Path:
    """Refuse a file that may not be written, before any work is done.

    Args:
        option: how the user named it, such as ``--json``.

    Returns:
        Where to write: the file itself, or what a link points to.

    Raises:
        UserError: with what stands there.
    """
    given = Path(path)
    if not str(path) or not given.name:
        raise UserError(f"{option} {str(path)!r} names no file; give one, or leave the option out")
    try:
        if _is_written_through(given, option):
            return given
        target = given.resolve()
        parent = target.parent
        if not parent.is_dir():
            raise UserError(f"cannot write {given}: {parent} is no directory; give a file in an existing one")
        if not os.access(parent, os.W_OK):
            raise UserError(f"cannot write {given}: {parent} is not writable; choose another {option}")
        found = target.stat() if target.exists() else None
        if found is None:
            return target
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"cannot write {given}: it is {_name_of(found.st_mode)}; choose another {option}")
        ours = not found.st_size or kind.is_ours(target)
    except (OSError, RuntimeError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {given}: {words}; choose another {option}") from error
    if not ours:
        raise UserError(
            f"{given} exists and is not {kind.what}, so it is not replaced; choose another {option}, or move the file "
            "away"
        )
    return target


def write_file(path: str | os.PathLike[str], option: str, kind: Kind, content: str | bytes) -> None:
    """Write a file that the user named, by one rename.

    Raises:
        UserError: it may not be written (:func:`check_file`), or cannot.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    _publish(path, option, kind, lambda temporary: Path(temporary).write_bytes(data))


def save_figure(
    figure: Figure, path: str | os.PathLike[str], option: str, kind: Kind | None = None, **options: Any
) -> None:
    """Draw a figure of matplotlib into a file that the user named, with our signature, by one rename.

    Args:
        kind: what may be replaced; default :data:`PLOT`.
        options: of ``savefig``.

    Raises:
        UserError: it may not be written (:func:`check_file`), cannot, or is of a format that matplotlib does not know.
    """
    suffix = Path(path).suffix.lower()
    metadata = dict(options.pop("metadata", {}))
    key = {".png": "Software", ".svg": "Creator", ".pdf": "Creator", ".eps": "Creator", ".ps": "Creator"}.get(suffix)
    if key is not None:
        options["metadata"] = {**metadata, key: SIGNATURE}
    form = suffix.removeprefix(".") or "png"
    _publish(path, option, kind or PLOT, lambda temporary: figure.savefig(temporary, format=form, **options))


def _publish(path: str | os.PathLike[str], option: str, kind: Kind, write: Callable[[Path], int | None]) -> None:
    target = check_file(path, option, kind)
    try:
        if _is_written_through(target, option):
            _write_through(target, write)
            return
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            write(temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {words}; choose another {option}") from error


PLOT = signed("a plot of phd-megatron")


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path like ``/dev/stdout`` names, which the user's shell has opened."""
    names = {"/dev/stdout": 1, "/dev/stderr": 2}
    if str(path) in names:
        return names[str(path)]
    known = str(path.parent) in ("/dev/fd", "/proc/self/fd") and path.name.isascii() and path.name.isdigit()
    return min(int(path.name[:10]), 2**31 - 1) if known else None  # no number is too long to be refused


def _is_written_through(path: Path, option: str) -> bool:
    """Whether nothing is kept there that a write could replace: a terminal, /dev/null, an open file of ours."""
    number = _descriptor(path)
    if number is None:
        return path.exists() and stat.S_ISCHR(path.stat().st_mode)
    try:
        readable_only = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        raise UserError(f"cannot write {path}: no file is open there; choose another {option}") from None
    if readable_only:
        raise UserError(f"cannot write {path}: it is open for reading only; choose another {option}")
    return True


def _write_through(path: Path, write: Callable[[Path], int | None]) -> None:
    with temporary_directory("output") as place:
        write(place / "content")
        content = (place / "content").read_bytes()
    number = _descriptor(path)
    if number is not None:
        sys.stdout.flush()
    # An open file goes on where it is; opening it by its path would empty the file that the shell appends to.
    with open(path if number is None else os.dup(number), "wb") as stream:
        stream.write(content)


def _name_of(mode: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFLNK: "a link", stat.S_IFREG: "a file"}
    names |= {stat.S_IFBLK: "a disk", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "no regular file")


# ---------------------------------------------------------------- directories


def place_of(output: str | os.PathLike[str], option: str = "--output") -> Path:
    """The absolute path of a directory to make, whose parents' links are followed and which is none itself.

    Raises:
        UserError: it names nothing, is a link, or a file.
    """
    if not str(output).strip():
        raise UserError(f"{option} {str(output)!r} names no directory; is a variable of the shell unset?")
    path = Path(output)
    try:
        place = path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
        mode = place.lstat().st_mode if os.path.lexists(place) else None
    except (OSError, RuntimeError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"{option} {output}: {words}; choose another directory") from error
    if not place.name:
        raise UserError(f"{option} {output} is the root of the file system; choose another directory")
    if mode is not None and stat.S_ISLNK(mode):
        raise UserError(
            f"{output} is a link to {os.readlink(place)}; a link is not replaced: name the directory itself, or choose "
            f"another {option}"
        )
    if mode is not None and not stat.S_ISDIR(mode):
        raise UserError(f"{output} exists and is {_name_of(mode)}, not a directory; choose another {option}")
    return place


def check_directory(
    output: str | os.PathLike[str],
    option: str = "--output",
    *,
    overwrite: bool | None = None,
    not_ours: Callable[[Path], str | None] = lambda path: "it is not empty",
    keep: Sequence[Path] = (),
) -> Path:
    """Refuse a directory that may not be made, before any work is done.

    Args:
        overwrite: whether one of ours may be replaced; None where the command has no such option.
        not_ours: why a directory is none that this command wrote, or None for one that it did.
        keep: what the command reads; neither it nor anything above it is replaced.

    Returns:
        Its absolute path.

    Raises:
        UserError: with what stands there.
    """
    place = place_of(output, option)
    for source in keep:
        kept = source.resolve()
        if place == kept or place in kept.parents:
            where = "is" if place == kept else "holds"
            raise UserError(f"{output} {where} {source}, which is read; choose another {option}")
    try:
        if not place.exists() or not any(place.iterdir()):
            return place
        if overwrite is None:
            raise UserError(f"{output} exists and is not empty; choose another {option}")
        problem = not_ours(place)
    except OSError as error:
        raise UserError(f"{output} cannot be looked at ({error.strerror}); choose another {option}") from error
    if problem is not None:
        raise UserError(
            f"{output} exists and is not replaced, with --overwrite neither: {problem}; choose another {option}, or "
            "move it away"
        )
    if not overwrite:
        raise UserError(f"{output} exists; choose another {option}, or replace it with --overwrite")
    return place


@contextmanager
def new_directory(
    output: str | os.PathLike[str],
    option: str = "--output",
    *,
    overwrite: bool | None = None,
    not_ours: Callable[[Path], str | None] = lambda path: "it is not empty",
    keep: Sequence[Path] = (),
) -> Iterator[Path]:
    """A directory to write into, which becomes ``output`` by one rename if all goes well and vanishes if not.

    Arguments and errors are those of :func:`check_directory`, which is asked again before the rename.
    """

    def check() -> Path:
        return check_directory(output, option, overwrite=overwrite, not_ours=not_ours, keep=keep)

    place = check()
    # Its name is the final one inside a temporary folder, because transformers names loaded code after it. The folder
    # is named before it is there: a signal at that very moment leaves nothing behind either.
    parent = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.tmp")
    directory = parent / place.name
    try:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            parent.mkdir(mode=0o700)
            directory.mkdir()
        except OSError as error:
            raise UserError(f"cannot write into {place.parent}: {error.strerror}; choose another {option}") from error
        with naming(directory, output):
            yield directory
        _replace(directory, check())
    except OSError as error:
        words = str(error).replace(str(directory), str(output))
        raise UserError(f"cannot write {output}: {words}; free some space or choose another {option}") from error
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _replace(directory: Path, place: Path) -> None:
    """Put ``directory`` where ``place`` is. What was there is then in its temporary folder."""
    if not place.exists():
        os.rename(directory, place)
        return
    if _exchange(directory, place):
        return
    aside = directory.with_name("replaced")
    os.rename(place, aside)
    try:
        os.rename(directory, place)
    except OSError:
        os.rename(aside, place)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, where the system can: a kill finds the old one or the new one."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
