"""Read a file that a user names: regular, and not endless. Nothing here waits for another program."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from phd_megatron.errors import UserError, shown

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ENDLESS = "it may never end"


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


def read_json(path: str | Path, cure: str, limit: int = 1 << 28) -> Any:
    """The content of a JSON file of at most ``limit`` bytes.

    Raises:
        UserError: also if it is not JSON, or nested deeper than can be read.
    """
    text = read_text(path, cure, limit)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {cure}") from None


def _dangling(path: str | Path) -> str:
    return f" (a link to {os.readlink(path)})" if os.path.islink(path) and not os.path.exists(path) else ""
