"""How many files, sockets and pipes this process may open. Standard library only."""

from __future__ import annotations

import errno
import resource
from contextlib import suppress

_ENOUGH = 65536
_TEXT = "Too many open files"


def raise_limit() -> None:
    """Lift the soft limit to the hard one: every rank holds sockets to others, and files of data and checkpoints."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_lack_of_files(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that the limit is reached; libraries tell it by the text alone."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or _TEXT in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def lack_of_files(error: BaseException) -> str:
    """The message for users."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{_TEXT} ({first}): this process may open {limit}; raise the limit, such as with ulimit -n 65536"
