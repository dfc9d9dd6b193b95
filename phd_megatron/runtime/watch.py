"""Which rank does not answer or does not get on: a small thread of every rank, without collectives.

Every few seconds the thread writes into the ranks' common store where this rank's main thread is, and reads what the
next rank wrote last. A rank whose entry stands still is stopped, dead or cut off; the nearest rank before it that
lives says so, once. When all entries move and no main thread does, the lowest rank compares them: who is behind, or
does not wait for others, is stuck, and prints its own Python stack. Nobody's clock is compared with another's.

After ``distributed_timeout_minutes`` of silence the run ends: the one that was named first, so that torchrun blames
the right rank, and the others after it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from phd_megatron.console.terminal import warn
from phd_megatron.runtime import processes

if TYPE_CHECKING:
    from torch.distributed import Store

_END, _NOTICE = "watch/end", "watch/notice"
_CODE = 1
_ORDERLY = 10.0  # seconds for a rank's own end
_NEAR = 64  # ranks that each rank looks at when a collective has failed


@dataclass(frozen=True)
class Pace:
    """Seconds. Of a run with a short timeout all are shorter: a line must come before the end."""

    beat: float  #: between two entries
    silence: float  #: without a new entry, until a rank is named
    stuck: float  #: without progress of any rank, until one is named
    end: float  #: of silence, until the run ends

    @classmethod
    def of(cls, timeout: float, slack: float) -> Pace:
        """For a timeout of collectives; ``slack`` is what their own end may take."""
        silence = min(20.0, timeout / 3)
        return cls(min(2.0, silence / 4), silence, min(40.0, timeout / 2), timeout + slack)


class Entry(processes.Identity, total=False):
    """What a rank tells the others of itself."""

    stack: bool  #: it can be asked for its stack
    beat: int
    count: int  #: phases that its main thread has gone through
    iteration: int
    phase: str
    still: float  #: seconds since its main thread got on
    waits: bool  #: for other ranks, as far as can be seen


class _End(TypedDict):
    text: str
    ranks: list[int]  #: that cannot end by themselves


@dataclass
class _Seen:
    """The last entry of another rank, and since when it has not changed."""

    entry: Entry
    since: float


class Watch:
    """What one rank tells the others and knows of them.

    Args:
        store: shared by all ranks, for this object alone; None for a world of one, where nothing is watched.
        timeout: of collectives, in seconds.
        slack: seconds that the backend is given to end by itself after that.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int, timeout: float, slack: float = 0.0) -> None:
        self._store: Any = store  # a world of one asks it nothing
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self.pace = Pace.of(timeout, slack)
        self._me: Entry = {**processes.identity()}
        self._main = threading.main_thread().ident
        self._count, self._iteration, self._phase, self._moved = 0, 0, "starting", time.monotonic()
        self._longest: dict[str, float] = {}  # seconds without progress that a phase has taken and come through
        self._followed = False
        self._beat = 0
        self._seen: dict[int, _Seen] = {}
        self._named: set[int] = set()
        self._noticed = -1  # progress at which this rank spoke of a standstill
        self._stack_shown = ""
        self._ending: float | None = None
        self._speaks = False  # this rank says why the run ends, should its main thread not
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- the main thread

    def at(self, phase: str, iteration: int | None = None) -> None:
        """Say what the main thread does now; all ranks go through the same phases."""
        self.tick()
        self._count += 1
        self._phase = phase
        self._iteration = self._iteration if iteration is None else iteration
        self._followed = True

    def tick(self) -> None:
        """Progress within a phase."""
        now = time.monotonic()
        self._longest[self._phase] = max(now - self._moved, self._longest.get(self._phase, 0.0))
        self._moved = now

    def start(self) -> None:
        """Begin to watch."""
        if self._store is None:
            return
        self._me["stack"] = processes.show_stack_on_signal()
        with suppress(Exception):  # the thread will say it again
            self._publish()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank ends as it should: nobody misses it."""
        if self._thread is None or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(self.pace.beat)
        if not self._thread.is_alive():  # else the store does not answer
            with suppress(Exception):
                self._publish(ended=True)

    def explain(self, error: BaseException) -> str:
        """Why a collective failed, the same words on all ranks; tells the others that the run ends."""
        self._ending = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # torchrun sends it as soon as it sees the death; this rank ends by itself, and says why before.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        said: _End | None = None
        if self._store is not None:
            with suppress(Exception):
                said = self._first_words(error)
        if said is None:
            said = {"text": f"the ranks have lost one another ({_first_line(error)})", "ranks": []}
        time.sleep(0.5)  # torchrun looks every 0.1 s, and takes the first rank that has ended for the cause
        self._speaks = False  # the caller does
        return f"{said['text']}; a run that saves goes on from its newest complete checkpoint when it is started again"

    def _first_words(self, error: BaseException) -> _End:
        entries = self._near()
        for _ in range(10):  # a process that was killed takes a moment to be gone
            if self._store.check([_END]):
                break
            dead = [number for number, entry in entries.items() if processes.is_dead(entry, self._me)]
            if dead:
                self._post_end(f"{self._who(dead[0])} has died; it was {_where(entries[dead[0]])}", [])
                break
            time.sleep(0.1)
        else:
            late = [number for number, entry in entries.items() if not entry.get("ended") and self._age(number) > 5]
            behind = self._behind()
            if late:
                text = f"{self._who(late[0])} does not answer; it was {_where(entries[late[0]])}, "
                self._post_end(f"{text}{self._age(late[0]):.0f} s ago", late)
            elif len(behind) < len(entries):
                text = f"the others have waited too long for {self._who(behind[0])}, {_where(entries[behind[0]])}"
                self._post_end(text, behind)
            else:
                self._post_end(f"the ranks have lost one another ({_first_line(error)})", [])
        found: _End = json.loads(self._store.get(_END))
        self._end(found["ranks"])
        return found

    @property
    def has_ended(self) -> bool:
        """Whether some rank has said that the run ends, so that whatever fails now fails because of it."""
        with suppress(Exception):
            return self._store is not None and bool(self._store.check([_END]))
        return False

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        failures, before = 0, time.monotonic()
        while not self._stop.wait(self.pace.beat):
            now = time.monotonic()
            if now - before > 3 * self.pace.beat + 1.0:  # this process, or the store, stood still itself
                for seen in self._seen.values():
                    seen.since = now
            before = now
            try:
                self._publish()
                self._obey()
                self._look_ahead()
                self._look_around()
                failures = 0
            except Exception:  # the store is gone, and with it the launcher of rank 0: nothing to be told or asked
                failures += 1
                if failures == 3:
                    return

    def _publish(self, ended: bool = False) -> None:
        self._beat += 1
        entry = {
            **self._me,
            "beat": self._beat,
            "count": self._count,
            "iteration": self._iteration,
            "phase": self._phase,
            "still": time.monotonic() - self._moved,
            "waits": processes.waits(self._main),
            "ended": ended,
        }
        self._store.set(f"watch/{self._rank}", json.dumps(entry))

    def _obey(self) -> None:
        """Do what another rank has asked for: show the stack, end."""
        if self._store.check([_NOTICE]):
            notice = json.loads(self._store.get(_NOTICE))
            if self._rank in notice["ranks"] and notice["id"] != self._stack_shown:
                self._stack_shown = notice["id"]
                _say(f"{self._who(self._rank)}: Python stack\n{processes.stack(self._main)}")
            for number in notice["ranks"]:
                self._signal(number)
        if self._ending is None and self._store.check([_END]):
            self._ending = time.monotonic()
        if self._ending is None:
            return
        ranks = json.loads(self._store.get(_END))["ranks"] if self._store.check([_END]) else []
        self._end(ranks)
        # The main thread of a rank that waits hears of it from its own collective, and ends in order.
        if self._rank in ranks or time.monotonic() - self._ending > _ORDERLY:
            if self._speaks:
                _say(f"error: {json.loads(self._store.get(_END))['text']}; the run ends")
            os._exit(_CODE)

    def _end(self, ranks: list[int]) -> None:
        """End those ranks of this host that cannot do so themselves."""
        for number in ranks:
            if number != self._rank:
                processes.kill(self._read(number), self._me)

    def _look_ahead(self) -> None:
        """Name the ranks after this one that are silent, up to the first that is not."""
        for step in range(1, self._world_size):
            number = (self._rank + step) % self._world_size
            entry, age = self._read(number), self._age(number)
            if entry.get("ended"):
                continue
            if age < self.pace.silence:
                if number in self._named:
                    self._named.discard(number)
                    _say(f"note: {self._who(number)} answers again")
                return
            if number not in self._named:
                self._named.add(number)
                self._name_silent(number, age)
            if age >= self.pace.end and self._ending is None:
                text = f"{self._who(number)} has given no sign of life for {age:.0f} s (distributed_timeout_minutes = "
                self._post_end(f"{text}{self._timeout / 60:g}); it was {_where(entry)}", [number])

    def _name_silent(self, number: int, age: float) -> None:
        entry = self._seen[number].entry
        state = processes.state(entry, self._me)
        known: dict[str | None, str] = {
            "stopped": f" It is stopped: kill -CONT {entry.get('pid')} lets it go on.",
            "dead": " Its process is gone.",
            "running": " Its process is there and runs.",
        }
        _say(
            f"warning: {self._who(number)} has given no sign of life for {age:.0f} s; it was {_where(entry)}, for "
            f"{entry.get('still', 0.0):.0f} s then.{known.get(state, '')} If it stays so, the run ends after "
            f"{self._timeout / 60:g} minutes of silence"
        )
        if state == "running" or state is None:
            self._ask_for_stack([number])

    def _look_around(self) -> None:
        """When no main thread has got on for long: the lowest rank that lives says who is stuck."""
        still = time.monotonic() - self._moved
        if not self._followed or self._noticed == self._count or self._named or self._ending is not None:
            return
        if still < max(self.pace.stuck, 2 * self._longest.get(self._phase, 0.0)):
            return
        for number in range(self._rank):
            entry = self._read(number)
            if not entry.get("ended") and self._age(number) < self.pace.silence:
                return
        entries = self._entries()
        if any(entry.get("still", 0.0) < self.pace.stuck / 2 for entry in entries.values()):
            return  # somebody gets on
        self._noticed = self._count
        stuck = self._behind()
        first = entries[stuck[0]]
        where = f"{_where(first)}, for {first['still']:.0f} s"
        if len(stuck) == self._world_size:
            _say(
                f"warning: no rank has got on for {still:.0f} s: all are {where}; the stack of rank {stuck[0]} follows"
            )
        else:
            more = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
            who = f"{self._who(stuck[0])}{more}"
            _say(f"warning: no rank has got on for {still:.0f} s: {who} is {where}; the others wait")
        self._ask_for_stack(stuck[:1])

    # ---------------------------------------------------------------- what is known of the others

    def _read(self, number: int) -> Entry:
        key = f"watch/{number}"
        entry: Entry = json.loads(self._store.get(key)) if self._store.check([key]) else {}
        seen = self._seen.get(number)
        if seen is None or seen.entry.get("beat") != entry.get("beat"):
            self._seen[number] = _Seen(entry, time.monotonic())
        return entry

    def _age(self, number: int) -> float:
        return time.monotonic() - self._seen[number].since

    def _entries(self) -> dict[int, Entry]:
        return {number: self._read(number) for number in range(self._world_size)}

    def _near(self) -> dict[int, Entry]:
        """Of many ranks those around this one: a dead process is seen by its neighbours on the same host."""
        first = self._rank // _NEAR * _NEAR
        return {number: self._read(number) for number in range(first, min(first + _NEAR, self._world_size))}

    def _behind(self) -> list[int]:
        """Ranks that the others seem to wait for; all of them when none stands out."""
        entries = {number: seen.entry for number, seen in sorted([*self._seen.items()]) if seen.entry}
        least = min((entry["count"] for entry in entries.values()), default=0)
        late = [number for number, entry in entries.items() if entry["count"] == least]
        return [number for number in late if entries[number]["waits"] is False] or late

    def _who(self, number: int) -> str:
        entry = self._me if number == self._rank else self._seen[number].entry
        place = f"host {entry['host']}, process {entry['pid']}" if "pid" in entry else "no entry of it yet"
        return f"rank {number} ({place})"

    def _ask_for_stack(self, numbers: list[int]) -> None:
        self._store.set(_NOTICE, json.dumps({"id": f"{self._rank}/{self._beat}", "ranks": numbers}))
        for number in numbers:
            self._signal(number)

    def _signal(self, number: int) -> None:
        """Have a silent rank of this host show its stack; of the ranks here one does it."""
        seen = self._seen.get(number)
        if number == self._rank or seen is None or not seen.entry.get("stack") or self._age(number) < self.pace.silence:
            return
        if processes.state(seen.entry, self._me) == "running" and self._store.add(f"watch/signal/{number}", 1) == 1:
            with suppress(OSError):
                os.kill(int(seen.entry["pid"]), processes.STACK_SIGNAL)

    def _post_end(self, text: str, ranks: list[int]) -> None:
        """Whoever finds out first says it for all."""
        if self._store.add("watch/ends", 1) == 1:
            self._speaks = True
            self._store.set(_END, json.dumps({"text": text, "ranks": ranks[:1]}))
        else:
            deadline = time.monotonic() + 2.0
            while not self._store.check([_END]) and time.monotonic() < deadline:
                time.sleep(0.05)


def _where(entry: Entry) -> str:
    return f"at iteration {entry.get('iteration', 0)} in {entry.get('phase', 'an unknown phase')!r}"


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 160 else f"{text[:160]}..."


def _say(text: str) -> None:
    warn(text)


def died_together(error: BaseException | None) -> bool:
    """Whether an error says that another rank has gone or does not answer, and not that this one did wrong."""
    from torch.distributed import DistError

    words = (
        r"gloo/transport|Gloo connectFullMesh|Connection (closed|reset) by|Application timeout|Timed out waiting|"
        r"Wait timeout|Socket closed|NCCL|ProcessGroup|Broken pipe"
    )
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    )
