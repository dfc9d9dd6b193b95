"""Run the members of a sweep on this node, some at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import FrameType

from phd_megatron.console.terminal import say
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import choose_device
from phd_megatron.sweep.options import Launcher
from phd_megatron.sweep.process import MemberProcess
from phd_megatron.sweep.progress import MembersDisplay
from phd_megatron.sweep.store import Status, Store

_POLL_SECONDS = 0.2


def unfinished(store: Store, retry_diverged: bool = False) -> list[str]:
    """Members that a start of the sweep trains: all but the finished and, unless asked for, the diverged."""
    done = {"finished"} if retry_diverged else {"finished", "diverged"}
    return [entry.name for entry in store.entries if store.status(entry.name).state not in done]


def device_slots(launcher: Launcher, device: str) -> list[str | None]:
    """CUDA devices of each place for a member: its own ones, or shared by ``members_per_device`` where that is asked.

    Raises:
        UserError: when there are fewer devices than ranks at once.
    """
    if device == "cpu" or choose_device("auto")[0] == "cpu":
        return [None] * launcher.parallel
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    needed = -(-launcher.parallel // launcher.members_per_device) * launcher.ranks
    if needed > len(names):
        raise UserError(
            f"{launcher.parallel} members at once of {launcher.ranks} ranks, {launcher.members_per_device} to a "
            f"device, need {needed} CUDA devices, and there are {len(names)}; lower --parallel or --ranks, or let "
            "small members share devices (launcher: members_per_device)"
        )
    own = [",".join(names[i : i + launcher.ranks]) for i in range(0, needed, launcher.ranks)]
    return [own[place // launcher.members_per_device] for place in range(launcher.parallel)]


class LocalRun:
    """Members as processes of this one, at most ``launcher.parallel`` at once."""

    def __init__(self, store: Store, launcher: Launcher, device: str = "auto") -> None:
        self._store, self._launcher = store, launcher
        self._free = device_slots(launcher, device)
        self._running: dict[str, tuple[MemberProcess, str | None]] = {}
        self._signals: list[int] = []
        self._passed_on = 0

    def run(self, names: Sequence[str]) -> dict[str, Status]:
        """Run these members to their ends; a failing one does not stop the others.

        SIGTERM, Ctrl-C, SIGUSR1 and SIGHUP ask the running members to save and stop, and no other is started;
        the second time they are ended at once.

        Returns:
            The status of every member of the sweep.
        """
        waiting = list(names)
        statuses = {entry.name: self._store.status(entry.name) for entry in self._store.entries}
        for name in waiting:
            statuses[name] = replace(statuses[name], state="waiting", message="")
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # nohup
                    continue
                stack.callback(signal.signal, number, signal.signal(number, self._received))
            stack.callback(self._end_all)
            display = stack.enter_context(MembersDisplay(self._store))
            while waiting or self._running:
                self._pass_signals_on()
                if self._signals:
                    for name in waiting:
                        statuses[name] = self._store.status(name)
                    waiting.clear()
                while waiting and self._free:
                    name = waiting.pop(0)
                    statuses[name] = self._start(name)
                for name, (process, slot) in list(self._running.items()):
                    ended = process.poll()
                    if ended is not None:
                        statuses[name] = ended
                        del self._running[name]
                        self._free.append(slot)
                display.show(statuses)
                time.sleep(_POLL_SECONDS)
        return statuses

    @property
    def interrupted_by(self) -> int | None:
        """Number of the signal that ended the run early."""
        return self._signals[0] if self._signals else None

    def _start(self, name: str) -> Status:
        slot = self._free.pop(0)
        try:
            self._running[name] = (MemberProcess(self._store, name, self._launcher, slot), slot)
        except (UserError, OSError) as error:
            self._free.append(slot)
            return replace(self._store.status(name), state="failed", message=str(error))
        return self._store.status(name)

    def _received(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    def _pass_signals_on(self) -> None:
        if len(self._signals) > self._passed_on:
            for process, _ in self._running.values():
                process.stop() if self._passed_on == 0 else process.kill()
            if self._passed_on == 0:
                say("stopping: members save what they have; once more ends them at once")
            self._passed_on = len(self._signals)

    def _end_all(self) -> None:
        """An error of ours must not leave processes behind."""
        for process, _ in self._running.values():
            process.stop()
        for process, _ in self._running.values():
            process.wait()
