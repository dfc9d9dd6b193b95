"""How far the members are: from their metrics files, as a table that is live on a terminal and lines elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from phd_megatron.config.plain import Json, Plain
from phd_megatron.console.terminal import say
from phd_megatron.sweep.members import METRICS_FILE, STATUS_FILE
from phd_megatron.sweep.store import Status, Store

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

COLUMNS = ("member", "state", "iteration", "loss", "tokens/s", "time", "left")
_TAIL = 65_536
_QUIET_SECONDS = 60.0
_NUMBERS = ("iteration", "tokens_per_second", "consumed_samples")
_LARGEST = 1e30
_FRAME = 7  #: lines of the table that are no members


def last_step(store: Store, name: str) -> Json:
    """The newest complete line of a member's metrics file; empty before the first."""
    try:
        with (store.home(name) / METRICS_FILE).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return {}
    for line in reversed(lines):
        try:
            step = json.loads(line)
        except ValueError:
            continue  # being written, or cut at the front
        if isinstance(step, dict):
            return {name: value for name, value in step.items() if name not in _NUMBERS or _is_number(value)}
    return {}


def _is_number(value: Plain) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def row(store: Store, name: str, status: Status) -> list[str]:
    """One line of the table."""
    entry, step = store.entry(name), last_step(store, name)
    done, speed = step.get("iteration", 0), step.get("tokens_per_second")
    left = ""
    if status.state == "running" and speed:
        left = clock((entry.samples - step.get("consumed_samples", 0)) * entry.seq_length / max(speed, 1e-9))
    loss = step.get("lm_loss")
    loss = loss if isinstance(loss, (int, float)) and not isinstance(loss, bool) else None
    return [
        name,
        status.state,
        f"{done}/{entry.iterations}",
        "" if loss is None else f"{loss:.4f}",
        "" if speed is None else f"{speed:,.0f}",
        clock(status.seconds + _since_start(store, name, status)),
        left,
    ]


def _since_start(store: Store, name: str, status: Status) -> float:
    if status.state != "running":
        return 0.0
    return max(0.0, time.time() - (store.home(name) / STATUS_FILE).stat().st_mtime)


def clock(seconds: float) -> str:
    """``75`` to ``1:15``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class MembersDisplay:
    """Shows the members' states; on a terminal all of them, live, elsewhere one line for each change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._live: Live | None = None
        self._seen: dict[str, str] = {}
        self._spoke = time.monotonic()

    def __enter__(self) -> MembersDisplay:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, statuses: Mapping[str, Status]) -> None:
        """Bring the display up to date."""
        if self._live is not None:
            self._live.update(self._table(statuses, self._live.console.height - _FRAME))
            return
        late = time.monotonic() - self._spoke > _QUIET_SECONDS
        for name, status in statuses.items():
            changed = status.state != self._seen.get(name, "waiting")
            if changed or (late and status.state == "running"):
                words = zip(COLUMNS[1:], row(self._store, name, status)[1:], strict=True)
                facts = ", ".join(f"{column} {word}" for column, word in words if word and column != "state")
                why = f": {status.message}" if changed and status.message else ""
                say(f"{name}: {status.state} ({facts}){why}")
                self._seen[name], self._spoke = status.state, time.monotonic()

    def _table(self, statuses: Mapping[str, Status], room: int) -> Table:
        from rich.table import Table

        shown = dict(statuses)
        if len(shown) > room:  # a live table cannot scroll: what is at work and what went wrong comes first
            order = ("running", "failed", "diverged", "stopped", "waiting", "finished")
            shown = dict(sorted(shown.items(), key=lambda item: order.index(item[1].state))[:room])
        counts = Counter(status.state for status in statuses.values())
        caption = ", ".join(f"{count} {state}" for state, count in counts.items())
        table = Table(title=self._store.title, title_justify="left", caption=caption, caption_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
        colours = {"running": "cyan", "finished": "green", "failed": "red", "diverged": "red", "stopped": "yellow"}
        for name, status in shown.items():
            table.add_row(*row(self._store, name, status), style=colours.get(status.state))
        return table
