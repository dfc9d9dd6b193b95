"""One run per save directory, without ever locking out the restart of a killed run.

The lock is a POSIX record lock on ``SAVE/.lock``. Unlike ``flock`` it belongs to the process and not to the open
file: a forked child (a data-loader worker, a checkpoint writer) that outlives a ``kill -9`` of its parent does not
hold it. The kernel, or the NFS server, gives it back when the process dies. The file's content only feeds the message.

A POSIX lock is lost when *any* descriptor of that file is closed in the process, so nothing else in this package opens
``.lock``, and the lock is taken at most once per process and directory.

Where the file system has no locks (Lustre without ``-o flock``, some FUSE mounts) a lease takes its place: a file with
host, process and a heartbeat. A dead process on this host is seen at once; a lease of another host is watched, and
taken over when its heartbeat stands still.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from phd_megatron.config.plain import Json
from phd_megatron.console.terminal import say
from phd_megatron.errors import UserError
from phd_megatron.runtime.processes import first_line, readlink

LOCK_NAME = ".lock"
LEASE_NAME = ".lock.lease"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTSUP}
_TAKEN = {errno.EACCES, errno.EAGAIN}
_held_here: set[tuple[int, int]] = set()


class RunLock:
    """The right to save into one directory, held until :meth:`release` or the end of the process.

    Args:
        save_dir: an existing directory.
        grace_seconds: how long to wait for a holder that is just ending, such as the workers of a killed launcher.
        heartbeat_seconds: interval of the lease's heartbeat (file systems without locks only).
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], *, grace_seconds: float = 3.0, heartbeat_seconds: float = 10.0
    ) -> None:
        self.save_dir = Path(save_dir)
        self._grace = grace_seconds
        self._heartbeat = heartbeat_seconds
        self._descriptor: int | None = None
        self._inode: tuple[int, int] | None = None
        self._lease: _Lease | None = None
        self._claimed = False

    def acquire(self) -> RunLock:
        """Take the lock.

        Raises:
            UserError: another run holds it (host, process and since when are named), or the file cannot be made.
        """
        try:
            descriptor = os.open(self.save_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
        except OSError as error:
            raise UserError(
                f"cannot save into {self.save_dir}: {error.strerror}; choose a writable --save directory"
            ) from error
        stat = os.fstat(descriptor)
        inode = (stat.st_dev, stat.st_ino)
        if inode in _held_here:
            # Closing the descriptor would drop the lock that this process holds, so it stays open.
            raise UserError(f"this process already saves into {self.save_dir}")
        deadline = time.monotonic() + self._grace
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _NO_LOCKS and error.errno not in _TAKEN:
                    os.close(descriptor)
                    self._lease = _Lease(self.save_dir / LEASE_NAME, self._heartbeat)
                    self._lease.acquire()
                    return self
                if error.errno not in _TAKEN:
                    os.close(descriptor)
                    raise
                if time.monotonic() >= deadline:
                    holder = _parse(os.pread(descriptor, 4096, 0))
                    os.close(descriptor)
                    raise UserError(_refusal(self.save_dir, holder)) from None
                time.sleep(0.05)
        if not _is_ours(os.pread(descriptor, 4096, 0)):
            os.close(descriptor)
            raise UserError(
                f"{self.save_dir / LOCK_NAME} is not what a run of phd-megatron wrote, so it is not replaced; move it "
                "away, or choose another --save directory"
            )
        self._descriptor, self._inode, self._claimed = descriptor, inode, True
        _held_here.add(inode)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_identity()).encode(), 0)
        return self

    def check(self, log: Callable[[str], None] = say) -> None:
        """Make sure that the lock still keeps others out, before something is written.

        Whoever deletes ``.lock``, or the whole directory, leaves this process with a lock on a file that nobody else
        can find. Then the lock is taken again, on the file that is there now.

        Raises:
            UserError: another run has taken it meanwhile, or it cannot be made again.
        """
        if self._lease is not None:
            self._lease.check()
            return
        if not self._claimed or self._is_on_the_file():
            return
        self._let_go()  # the lock on it is worth nothing any more
        path = self.save_dir / LOCK_NAME
        gone = not self.save_dir.is_dir()
        try:
            self.save_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.save_dir} was removed while this run saved into it, and cannot be made again "
                f"({error.strerror}); give the next start another --save directory"
            ) from error
        self.acquire()
        what = f"{self.save_dir} was removed" if gone else f"{path} was removed or replaced"
        log(f"warning: {what} while this run holds it; no other run has taken it, so it is made and locked again")

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        self._claimed = False
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self._let_go()

    def _is_on_the_file(self) -> bool:
        try:
            stat = os.stat(self.save_dir / LOCK_NAME)
        except OSError:
            return False
        return (stat.st_dev, stat.st_ino) == self._inode

    def _let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            _held_here.discard(self._inode or (0, 0))
        self._descriptor = self._inode = None

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: type | BaseException | TracebackType | None) -> None:
        self.release()


class _Lease:
    """A lock made of a file's content: who holds it, and a beat that shows the holder is alive."""

    def __init__(self, path: Path, heartbeat_seconds: float) -> None:
        self._path = path
        self._interval = heartbeat_seconds
        self._token = uuid.uuid4().hex
        self._beat = 0
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self._keep_beating, name="run-lock heartbeat", daemon=True)

    def acquire(self) -> None:
        """Take the lease, waiting up to three heartbeats to see whether another host's holder is alive."""
        if not self._create():
            holder = self._read()
            alive = holder is not None and not _is_dead_here(holder) and (_same_place(holder) or self._beats(holder))
            if alive:
                raise UserError(_refusal(self._path.parent, holder))
            self._write()  # take over; of two that do so at once the later writer stays
            time.sleep(min(0.2, self._interval))
            winner = self._read()
            if winner is None or winner.get("token") != self._token:
                raise UserError(_refusal(self._path.parent, winner))
        self._keeper.start()

    def check(self) -> None:
        """Make the lease again if it was removed.

        Raises:
            UserError: another run has it.
        """
        holder = self._read()
        if holder is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._create():
                return
            holder = self._read()
        if holder is None or holder.get("token") != self._token:
            raise UserError(_refusal(self._path.parent, holder))

    def release(self) -> None:
        """Stop beating and delete the lease, when it is still ours."""
        self._stop.set()
        if self._keeper.is_alive():
            self._keeper.join()  # a beat under way would make the lease again
        holder = self._read()
        if holder is not None and holder.get("token") == self._token:
            self._path.unlink(missing_ok=True)

    def _content(self) -> str:
        return json.dumps({**_identity(), "token": self._token, "beat": self._beat})

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o664)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as stream:
            stream.write(self._content())
        return True

    def _write(self) -> None:
        temporary = self._path.with_name(f"{self._path.name}.{self._token}")
        temporary.write_text(self._content())
        os.replace(temporary, self._path)

    def _read(self) -> Json | None:
        try:
            return _parse(self._path.read_bytes())
        except FileNotFoundError:
            return None

    def _beats(self, seen: Json) -> bool:
        # The content is compared, not its age: the clocks of two hosts need not agree.
        deadline = time.monotonic() + 3 * self._interval
        while time.monotonic() < deadline:
            time.sleep(self._interval / 4)
            now = self._read()
            if now is None:
                return False
            if now != seen:
                return True
        return False

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._interval):
            self._beat += 1
            try:
                holder = self._read()
                if holder is None or holder.get("token") == self._token:
                    self._write()
            except OSError:
                continue  # a full or unreachable disk: the next beat may pass


def _identity() -> Json:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "boot": first_line("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": readlink("/proc/self/ns/pid"),
        "process_start": _process_start(os.getpid()),
    }


def _same_place(holder: Json) -> bool:
    """Whether the holder's process number means something here: same boot of the same host and same container."""
    mine = _identity()
    return all(holder.get(key) == mine[key] for key in ("host", "boot", "pid_namespace"))


def _is_dead_here(holder: Json) -> bool:
    if not _same_place(holder):
        return False
    start = _process_start(int(holder.get("pid") or 0))
    return start is None or start != holder.get("process_start")


def _process_start(pid: int) -> str | None:
    """Kernel start time of a living process (tells a reused number apart); None when it is gone or a zombie."""
    if not os.path.isdir("/proc/self"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    line = first_line(f"/proc/{pid}/stat")
    if line is None:
        return None
    fields = line.rpartition(")")[2].split()  # the command name before it may hold spaces
    return None if fields[0] in ("Z", "X") else fields[19]


def _is_ours(content: bytes) -> bool:
    """Whether the content of a lock file is one of ours, or none; zeros are what a power cut may leave of it."""
    return not content.strip(b"\0") or "pid" in _parse(content)


def _parse(content: bytes) -> Json:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _refusal(save_dir: Path, holder: Json | None) -> str:
    holder = holder or {}
    who = f"process {holder.get('pid', '?')} on host {holder.get('host', '?')} since {holder.get('since', '?')}"
    return (
        f"another run saves into {save_dir}: {who}; two runs would overwrite each other's checkpoints. "
        "Wait for it or stop it, or give this run another --save directory"
    )
