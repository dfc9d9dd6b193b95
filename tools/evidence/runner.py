"""Take the next experiments that fit the time, several at once, and keep what they measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phd_megatron.errors import UserError
from phd_megatron.sweep.local import device_slots
from phd_megatron.sweep.members import CHECKPOINTS, LOG_FILE
from phd_megatron.sweep.options import Launcher
from phd_megatron.sweep.process import MemberProcess, member_environment
from phd_megatron.sweep.progress import last_step
from phd_megatron.sweep.store import Status, write

from .corpus import PARTS
from .piece import DONE, FAILED, Piece
from .queue import Queue
from .record import describe_piece, dump, make_record
from .schedule import Speed, choose
from .work import Prepared, Work

OUTPUT = "evidence.json"
_POLL_SECONDS = 0.5
_LAST_SECONDS = 4.0  #: of a command, for its last file
_TAIL = 20_000
_SPEAK_SECONDS = 60.0
_NO_START_SECONDS = 20.0  #: before the end of a command: a run would save before its first step
_LOOK_AHEAD = 60  #: experiments among which one that fits is looked for
_FOLDERS = PARTS[-1]


@dataclass
class Evaluating:
    """``phd-megatron evaluate`` at work on a trained member."""

    process: subprocess.Popen[bytes]
    result: Path


@dataclass
class Device:
    """A GPU (or the CPU) that takes several runs at once: as ``CUDA_VISIBLE_DEVICES`` names it, and what it gives."""

    name: str | None
    speed: Speed


@dataclass
class Running:
    """A member at work: training, then perhaps an evaluation."""

    prepared: Prepared
    device: Device
    training: MemberProcess | None
    evaluating: Evaluating | None = None
    evaluations: dict[str, Any] = field(default_factory=dict)


class Runner:
    """One command of a piece."""

    def __init__(self, piece: Piece, queue: Queue) -> None:
        self.piece, self.queue = piece, queue
        self.texts = piece.texts()
        if not self.texts:
            raise UserError(
                f"no text: {piece.archives} holds no archive and {piece.work / 'texts'} no folder; carry .corpus/ship"
            )
        self.about = describe_piece(piece.name, self.texts)
        self.launcher = Launcher(parallel=piece.parallel * _visible_devices(), members_per_device=piece.parallel)
        names = dict.fromkeys(device_slots(self.launcher, "auto"))
        self.devices = [
            Device(name, Speed(piece.flops, _free_memory(number), piece.filled_by, piece.start_seconds))
            for number, name in enumerate(names)
        ]
        self.running: list[Running] = []
        self.work = Work(piece, queue, self.texts)
        self.failed: set[str] = set()
        self._spoke: dict[str | None, float] = {}

    # ---------------------------------------------------------------- the command

    def run(self) -> int:
        """Work until the command's time is over or nothing fits any more; the number of runs that ended in it."""
        ended = 0
        self._say(f"piece {self.piece.name}, {self.piece.piece_end - time.time():.0f} s left of it")
        for variant, why in self.queue.blocked.items():
            self._say(f"variant {variant} cannot be run: {why}")
        try:
            while time.time() < self.piece.stop_at:
                ended += self._poll()
                for device in self.devices:
                    self._measured(device)
                    while time.time() < self.piece.stop_at - _NO_START_SECONDS and self._start_next(device):
                        pass
                if not self.running:
                    self._say("nothing that is left fits the time that is left")
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            self._stop_all()
            ended += self._poll()
            self._write_output()
        return ended

    def _on(self, device: Device) -> list[Running]:
        return [running for running in self.running if running.device is device]

    def _start_next(self, device: Device) -> bool:
        on_it = self._on(device)
        if len(on_it) == self.piece.parallel:
            return False
        at_hand = {running.prepared.experiment.name for running in self.running} | self.failed
        candidates = [self.work.prepare(experiment) for experiment in self.work.waiting(at_hand)[:_LOOK_AHEAD]]
        at_work = [running.prepared.load for running in on_it]
        left = self.piece.piece_end - self.piece.command_end + self.piece.stop_at - time.time()
        chosen = choose(at_work, [c.load for c in candidates], left, self._measured(device))
        if chosen is None:
            return False
        prepared = candidates[chosen]
        name = prepared.experiment.name
        trained = prepared.is_trained
        training = None if trained else MemberProcess(prepared.store, prepared.member.name, self.launcher, device.name)
        self.running.append(Running(prepared, device, training))
        self._say(f"{name}: {'evaluated' if trained else 'started'}, {len(self.running)} at work")
        return True

    def _poll(self) -> int:
        """Look at all that run; the number that has ended for good."""
        ended = 0
        for running in list(self.running):
            if running.training is not None:
                status = running.training.poll()
                if status is None:
                    continue
                running.training = None
                if status.state not in ("finished", "diverged"):
                    self._drop(running, status)
                    continue
                if status.state == "finished" and running.prepared.experiment.section.folders:
                    running.evaluating = self._evaluate(running)
                    continue
            elif running.evaluating is None:  # it was trained by an earlier command
                if running.prepared.experiment.section.folders:
                    running.evaluating = self._evaluate(running)
                    continue
            else:
                code = running.evaluating.process.poll()
                if code is None:
                    continue
                if code or not running.evaluating.result.exists():
                    self._drop(running, Status("failed", code, message="evaluate failed; see its log"))
                    continue
                running.evaluations[_FOLDERS] = json.loads(running.evaluating.result.read_text("utf-8"))
            self._keep(running)
            ended += 1
        return ended

    def _evaluate(self, running: Running) -> Evaluating:
        prepared = running.prepared
        training = prepared.member.config.training
        samples = training.eval_iters * (training.global_batch_size or training.micro_batch_size)
        result = prepared.home / "folders.json"
        command = [sys.executable, "-W", "ignore", "-m", "phd_megatron", "evaluate"]
        command += ["--checkpoint", str(prepared.home / CHECKPOINTS)]
        command += ["--data-path", str(self.texts[prepared.experiment.text] / _FOLDERS), "--num-samples", str(samples)]
        command += ["--json", str(result)]
        with (prepared.home / "evaluate.txt").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=member_environment(self.launcher, running.device.name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return Evaluating(process, result)

    def _keep(self, running: Running) -> None:
        prepared = running.prepared
        record = make_record(prepared.experiment, prepared.member, prepared.store, running.evaluations, self.about)
        write(self.piece.work / DONE / f"{record['name']}.json", dump(record))
        if not self.work.is_start(prepared.experiment):
            shutil.rmtree(prepared.home / CHECKPOINTS, ignore_errors=True)
        self._release(running)
        losses = [loss for loss in record["steps"]["validation_loss"] if loss is not None]
        self._say(f"{record['name']}: {record['state']}, validation loss {losses[-1] if losses else 'none'}")
        self._write_output()

    def _drop(self, running: Running, status: Status) -> None:
        """It stays in the queue, and this command does not start it again."""
        self._release(running)
        prepared = running.prepared
        self._say(f"{prepared.experiment.name}: {status.state}: {status.message}")
        if status.state == "failed":
            write(self.piece.work / FAILED / prepared.experiment.name, _tail(prepared.home))
            self.failed.add(prepared.experiment.name)

    def _release(self, running: Running) -> None:
        self.running.remove(running)

    # ---------------------------------------------------------------- speed

    def _measured(self, device: Device) -> Speed:
        """What a device does now, by the last step that each run on it has logged; what was known, until all have."""
        rates, on_it = [], self._on(device)
        for running in on_it:
            step = last_step(running.prepared.store, running.prepared.member.name)
            if running.training is not None and step.get("tokens_per_second"):
                rates.append(step["tokens_per_second"] * step["consumed_flops"] / step["consumed_tokens"])
        if not rates or len(rates) < len(on_it):
            return device.speed
        device.speed = device.speed.seen(rates, all_places=len(rates) == self.piece.parallel)
        if time.time() - self._spoke.get(device.name, 0.0) > _SPEAK_SECONDS:
            self._spoke[device.name] = time.time()
            where = "" if device.name is None else f"GPU {device.name}: "
            self._say(f"{where}{len(rates)} at work, together {sum(rates):.3g} FLOP/s; {device.speed}")
        return device.speed

    # ---------------------------------------------------------------- the end

    def _stop_all(self) -> None:
        """Running members save, for the next command; an evaluation is begun again there."""
        for running in self.running:
            if running.training is not None:
                running.training.stop()
            elif running.evaluating is not None:
                running.evaluating.process.kill()
                running.evaluating.process.wait()
        for running in list(self.running):
            if running.training is None:
                self._release(running)
        while (
            any(running.training for running in self.running) and time.time() < self.piece.command_end - _LAST_SECONDS
        ):
            if all(r.training is None or r.training.poll() is not None for r in self.running):
                break
            time.sleep(_POLL_SECONDS / 5)
        for running in self.running:
            if running.training is not None and running.training.poll() is None:
                running.training.kill()
                running.training.wait()

    def _write_output(self) -> None:
        """Everything that has ended in this piece, in one file: a command may be the last."""
        done = [json.loads(path.read_text("utf-8")) for path in sorted((self.piece.work / DONE).glob("*.json"))]
        failed = {p.name: p.read_text("utf-8") for p in sorted((self.piece.work / FAILED).glob("*"))}
        content = {"piece": self.piece.name, "records": done, "failed": failed}
        write(self.piece.out / OUTPUT, json.dumps(content) + "\n")

    def _say(self, line: str) -> None:
        text = f"{time.strftime('%H:%M:%S')} {line}"
        print(text, flush=True)
        self.piece.out.mkdir(parents=True, exist_ok=True)
        with (self.piece.out / "evidence.txt").open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")


def _tail(home: Path) -> str:
    """The end of what a run and its evaluation have printed."""
    parts = []
    for name in (LOG_FILE, "evaluate.txt"):
        if (home / name).exists():
            parts.append(f"== {name}\n{(home / name).read_text('utf-8', 'replace')[-_TAIL:]}")
    return "\n".join(parts)


def _visible_devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _free_memory(number: int) -> float:
    """Bytes of a visible GPU that nobody else holds; no limit without one."""
    import torch

    return float(torch.cuda.mem_get_info(number)[0]) if torch.cuda.is_available() else float("inf")
