"""Open what a user names: a regular file, read whole, or a place to write. Nothing here waits for another program."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from phd_megatron.errors import UserError, shown

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ENDLESS = "it may never end"
_INHERITED = (("dev", "fd"), ("dev", "stdout"), ("dev", "stderr"), ("proc", "self"))


def kind_of(mode: int) -> str:
    """``a pipe``, for a message about something that is no regular file."""
    return _KINDS.get(stat.S_IFMT(mode), "no regular file")


def require_regular(path: str | Path, cure: str) -> os.stat_result:
    """What ``stat`` says of a regular file, links followed.

    Raises:
        UserError: if there is none, or something else is there. ``cure`` ends the message.
    """
    if not str(path):
        raise UserError(f"cannot read '': it names no file; {cure}")
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}{_dangling(path)}; {cure}") from None
    except ValueError:  # a NUL byte
        raise UserError(f"cannot read {shown(str(path))}: no file can be called that; {cure}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"cannot read {path}: it is {kind_of(found.st_mode)}, not a file; {cure}")
    return found


def read_file(path: str | Path, cure: str, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes.

    Raises:
        UserError: if it is missing, something else than a file, longer, or may not be read.
    """
    size = require_regular(path, cure).st_size
    if size > limit:
        raise UserError(f"cannot read {path}: it has {size:,} bytes, and at most {limit:,} are read; {cure}")
    try:
        # Not blocking, should it have become a pipe since.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {cure}") from None
    if len(content) > limit:
        raise UserError(f"cannot read {path}: {_ENDLESS}, and at most {limit:,} bytes are read; {cure}")
    return content


def read_text(path: str | Path, cure: str, limit: int) -> str:
    """The same as text.

    Raises:
        UserError: also if it is not UTF-8.
    """
    try:
        return read_file(path, cure, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def check_target(path: str | Path, flag: str, make_parents: bool = False) -> None:
    """Refuse a file that could not be written when the work is done; writes nothing.

    Args:
        flag: what it was given with, for the message.
        make_parents: whether the writer makes missing directories.

    Raises:
        UserError: for an empty name, a directory, a named pipe, or a directory that is missing or may not
            be written.
    """
    if not str(path) or not Path(path).name:
        raise UserError(f"{flag} {shown(str(path))} names no file; give a path, or leave it out")
    cure = f"give {flag} a file in a directory that can be written"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        _check_parent(Path(path), flag, make_parents)
        return
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}; {cure}") from None
    except ValueError:  # a NUL byte
        raise UserError(f"{flag} {shown(str(path))} cannot be written: no file can be called that; {cure}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{flag} {path} cannot be written: it is a directory; {cure}")
    if stat.S_ISFIFO(mode) and Path(os.path.abspath(path)).parts[1:3] not in _INHERITED:
        raise UserError(f"{flag} {path} cannot be written: it is a pipe, which may have no reader; {cure}")
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path} cannot be written: {os.strerror(errno.EACCES)}; {cure}")


def _check_parent(path: Path, flag: str, make_parents: bool) -> None:
    cure = f"give {flag} a file in a directory that can be written"
    if len(os.fsencode(path.name)) > 255:
        raise UserError(f"{flag} {path} cannot be written: {os.strerror(errno.ENAMETOOLONG)}; {cure}")
    parent = Path(os.path.abspath(path.parent))
    while make_parents and not os.path.lexists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        reason = f"{parent} is no directory" if os.path.lexists(parent) else f"there is no directory {parent}"
        raise UserError(f"{flag} {path} cannot be written: {reason}; {cure}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be written: {parent}: {os.strerror(errno.EACCES)}; {cure}")


def _dangling(path: str | Path) -> str:
    return f" (a link to {os.readlink(path)})" if os.path.islink(path) and not os.path.exists(path) else ""
