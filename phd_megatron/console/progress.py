"""Progress of a long pass over files: a bar on a terminal, a line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from phd_megatron.console.terminal import warn

if TYPE_CHECKING:
    from rich import progress

_LINE_SECONDS = 10.0


class FileProgress:
    """Context manager; ``update`` may be called as often as one likes."""

    def __init__(self, total_bytes: int, *, enabled: bool = True) -> None:
        self._total = max(1, total_bytes)
        self._enabled = enabled
        self._bar: progress.Progress | None = None
        self._task: progress.TaskID | None = None
        self._started = self._last = time.monotonic()

    def __enter__(self) -> FileProgress:
        if self._enabled and sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:  # plain lines do as well
                return self
            self._bar = progress.Progress(
                progress.TextColumn("prepare"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TransferSpeedColumn(),
                progress.TextColumn("{task.fields[counts]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("prepare", total=self._total, counts="")
        return self

    def update(self, done_bytes: int, documents: int, tokens: int) -> None:
        """Show where the pass is."""
        if not self._enabled:
            return
        counts = f"{documents:,} documents, {tokens:,} tokens"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(done_bytes, self._total), counts=counts)
            return
        now = time.monotonic()
        if now - self._last >= _LINE_SECONDS:
            self._last = now
            rate = done_bytes / 1e6 / (now - self._started)
            share = min(1.0, done_bytes / self._total)
            warn(f"prepare: {share:.0%} read, {rate:.1f} MB/s, {counts}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
