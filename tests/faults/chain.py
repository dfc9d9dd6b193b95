"""A chain of faults over one run: what is started again after one fault is the victim of the next."""

from __future__ import annotations

import re
import shutil
import signal
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import directory
from launch import PATIENCE, Launch, Numbers, Unexpected, read_numbers
from layouts import SAVE_INTERVAL, STEPS, Layout, flags
from plan import MOMENTS, START, STEP, Fault

#: seconds that ranks may outlive a killed torchrun, and a killed rank's peers their torchrun's notice
ORPHANS, PEERS = 15.0, 60.0
ROOM = 40  # steps before the reference's end at which a run is begun anew


@dataclass
class Outcome:
    """What came of one fault."""

    layout: str
    fault: dict[str, Any]
    detail: str = ""
    resumed_from: int | None = None  #: by the start that was hit
    newest_before: int | None = None  #: complete checkpoint when the fault came
    newest_after: int | None = None
    problems: list[str] = field(default_factory=list)
    skipped: str = ""  #: why it could not be tried here
    seconds: float = 0.0
    logs: str = ""


class Chain:
    """One run and its faults.

    Args:
        reference: step -> numbers of the undisturbed run.
        work: an empty directory.
    """

    def __init__(self, layout: Layout, faults: list[Fault], data: str, reference: Numbers, work: Path) -> None:
        self._layout, self._faults, self._data, self._reference = layout, faults, data, dict(reference)
        self._work = work
        self._starts = self._directories = 0
        self._disk = directory.Disk(work / "disk")
        self._new_directory()

    def run(self, say: Any) -> list[Outcome]:
        """Every fault, then one start that is left in peace."""
        outcomes = []
        try:
            for fault in self._faults:
                outcomes.append(self._guarded(fault))
                say(outcomes[-1])
            outcomes.append(self._guarded(None))
            say(outcomes[-1])
        finally:
            self._disk.close()
        return outcomes

    def _new_directory(self) -> None:
        if self._directories:
            shutil.rmtree(self._save)
        self._directories += 1
        self._save = self._disk.path / f"save{self._directories}"

    def _guarded(self, fault: Fault | None) -> Outcome:
        outcome = Outcome(self._layout.name, asdict(fault) if fault else {"kind": "none, at the end", "moment": "-"})
        began = time.monotonic()
        try:
            if self._newest() + ROOM > STEPS:
                self._new_directory()
            if fault is None:
                self._in_peace(outcome)
            elif fault.kind == "damaged file":
                self._damage(fault, outcome)
            else:
                self._hit(fault, outcome)
        except Unexpected as error:
            outcome.problems.append(str(error))
        except Exception:
            outcome.problems.append(f"the harness itself: {traceback.format_exc()}")
        outcome.seconds = time.monotonic() - began
        return outcome

    def _newest(self) -> int:
        return max(directory.complete(self._save), default=0)

    def _start(self, outcome: Outcome, fault: Fault | None = None, **more: object) -> Launch:
        moment = None
        if fault is not None and fault.moment in MOMENTS:
            event, pattern, _ = MOMENTS[fault.moment]
            moment = f"{fault.held_rank}:{event}:{pattern}:{fault.steps}"
        self._starts += 1
        place = self._work / f"start{self._starts}"
        words = [*self._layout.command(self._data), *self._layout.saving(), *flags(more)]
        outcome.logs = str(place)
        return Launch(self._layout.ranks, [*words, "--save", str(self._save), "--load", str(self._save)], place, moment)

    # ---------------------------------------------------------------- faults

    def _hit(self, fault: Fault, outcome: Outcome) -> None:
        expected = self._newest()
        more = {"distributed-timeout-minutes": 0.4} if fault.kind == "rank stopped for good" else {}
        run = self._start(outcome, fault, **more)
        undo: list[Any] = []
        try:
            if fault.moment == START:
                run.wait_until(lambda: time.monotonic() - run.began >= fault.delay, "the fault's time")
            else:
                start = run.wait_started()
                if fault.moment == STEP:
                    run.wait_until(lambda: run.steps >= fault.steps, f"step {start + fault.steps}")
                    time.sleep(fault.delay)
                else:
                    run.wait_until(run.marker.exists, f"the moment {fault.moment!r}", pause=0.002)
            before = directory.complete(self._save)
            outcome.newest_before = max(before, default=0)
            patience = self._do(fault, run, outcome, undo)
            if patience != ORPHANS:  # those that are to die now must not go on first
                run.release()
            left = run.wait_gone(patience)
            if left and not outcome.skipped:
                outcome.problems.append(f"{len(left)} processes were still there after {patience:.0f} s")
        finally:
            run.kill_all()
            run.wait_gone(10.0)
            for step in undo:
                step()
        self._check(run, outcome, expected)
        self._check_end(fault, run, outcome)

    def _do(self, fault: Fault, run: Launch, outcome: Outcome, undo: list[Any]) -> float:
        """The fault itself. Seconds within which everything must have ended."""
        ranks = run.ranks
        victim = ranks.get(fault.rank)
        if fault.kind == "kill -9 torchrun":
            run.send(signal.SIGKILL, run.agent.pid)
            return ORPHANS
        if fault.kind == "kill -9 all" or victim is None:  # None: torchrun has not started it yet
            run.kill_all()
            return ORPHANS
        if fault.kind.startswith("stop"):
            run.send(signal.SIGSTOP, victim)
            time.sleep(0.5 + 2 * fault.choice)
            run.send(signal.SIGCONT, victim)
            run.release()
            steps = run.steps
            run.wait_until(lambda: run.steps >= steps + 2, "two steps after a rank was stopped for a while")
        if "kill -9 rank" in fault.kind:
            run.send(signal.SIGKILL, victim)
            return PEERS
        if fault.kind == "SIGTERM":
            run.send(signal.SIGTERM, victim)
        elif fault.kind == "rank stopped for good":
            run.send(signal.SIGSTOP, victim)
        elif fault.kind.startswith("full disk"):
            in_a_save = fault.moment in MOMENTS
            outcome.detail = "" if self._disk.mounted else "as a limit on the size of files"
            self._disk.fill([*ranks.values()], int(fault.choice * (20_000 if in_a_save else 900_000)))
            undo.append(self._disk.empty)
        elif fault.kind == "read-only directory":
            restore = directory.make_read_only(self._save)
            if restore is None:
                outcome.skipped = "nothing can be mounted here"
                run.kill_all()
            else:
                undo.append(restore)
        elif fault.kind == "directory moved away":
            away = self._save.with_name(f"{self._save.name}.away")
            self._save.rename(away)

            undo.append(lambda: self._bring_back(away, outcome))
            self._wait_for_another(run)
            return PEERS
        elif fault.kind == "unfinished checkpoint removed":
            done = {directory.checkpoint(self._save, iteration) for iteration in directory.complete(self._save)}
            for path in set(self._save.glob("iter_*")) - done:
                shutil.rmtree(path)
        return PATIENCE

    def _wait_for_another(self, run: Launch) -> None:
        """Until the run has ended, or has saved into a directory that it has made again; then it is killed."""
        run.wait_until(lambda: run.agent.poll() is not None or self._newest() > 0, "an end or a save elsewhere")
        if run.agent.poll() is None:
            run.kill_all()

    def _bring_back(self, away: Path, outcome: Outcome) -> None:
        """After the directory was moved away: what was in it is whole, and the next start goes on from the newest."""
        for iteration in directory.complete(away):
            if wrong := directory.damage_in(directory.checkpoint(away, iteration)):
                outcome.problems.append(
                    f"LOST: the files {wrong} of checkpoint {iteration}, in the directory moved away"
                )
        if self._newest() > max(directory.complete(away), default=-1):
            outcome.detail = "made again, and went on"
            shutil.rmtree(away)
            return
        if self._save.exists():
            shutil.rmtree(self._save)
        away.rename(self._save)

    def _damage(self, fault: Fault, outcome: Outcome) -> None:
        if not self._newest():
            first = self._start(outcome, **{"exit-interval": 2 * SAVE_INTERVAL})
            first.wait_gone(PATIENCE)
        newest = outcome.newest_before = self._newest()
        outcome.detail, undo = directory.damage(directory.checkpoint(self._save, newest), fault.choice)
        before = directory.contents(self._save)
        run = self._start(outcome, **{"exit-interval": SAVE_INTERVAL})
        if run.wait_gone(PATIENCE):
            outcome.problems.append("it does not end")
        if not run.agent.returncode or run.steps:
            outcome.problems.append(f"it went on from iteration {run.start}, with exit code {run.agent.returncode}")
        elif Path(outcome.detail.partition(":")[0]).name not in run.output:
            outcome.problems.append("the refusal does not name the file")
        after = directory.contents(self._save)
        if after != before:
            changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
            outcome.problems.append(f"the refused start changed the directory: {changed}")
            newest = 0  # whatever is there now is the truth of the next start
        undo()
        outcome.newest_after = self._newest()
        if outcome.newest_after < newest:
            outcome.problems.append(f"LOST: checkpoint {newest}")

    def _in_peace(self, outcome: Outcome) -> None:
        expected = outcome.newest_before = self._newest()
        run = self._start(outcome, **{"exit-interval": 2 * SAVE_INTERVAL})
        if run.wait_gone(PATIENCE):
            outcome.problems.append("it does not end")
        self._check(run, outcome, expected)
        if run.agent.returncode or run.steps != 2 * SAVE_INTERVAL:
            outcome.problems.append(f"exit code {run.agent.returncode} after {run.steps} steps")

    # ---------------------------------------------------------------- what must hold

    def _check(self, run: Launch, outcome: Outcome, expected: int) -> None:
        """What holds whatever the fault was.

        Args:
            expected: the newest complete checkpoint when this start began, 0 for none.
        """
        output, problems = run.output, outcome.problems
        newest = outcome.newest_after = self._newest()
        outcome.resumed_from = run.start
        if newest < (outcome.newest_before or 0):
            problems.append(f"LOST: checkpoint {outcome.newest_before} was complete, now {newest} is the newest")
        for iteration in directory.complete(self._save):
            if wrong := directory.damage_in(directory.checkpoint(self._save, iteration)):
                problems.append(f"LOST: the files {wrong} of checkpoint {iteration}")
        if run.start is not None and run.start != expected:
            problems.append(f"LOST: it went on from iteration {run.start}, and {expected} was complete")
        if expected and run.start is not None and not re.search(rf"loaded checkpoint \S*/iter_{expected:07d}", output):
            problems.append(f"the log does not say that checkpoint {expected} was loaded")
        said = [int(found) for found in re.findall(r"saved checkpoint \S*/iter_(\d{7})", output)]
        if said and max(said) > newest:
            problems.append(f"LOST: the log says that {max(said)} was saved, and {newest} is the newest")
        for found in re.findall(r"the last complete checkpoint is \S*/iter_(\d{7})", output):
            if int(found) != newest:
                problems.append(f"the log calls {int(found)} the last complete checkpoint, and {newest} is it")
        for step, numbers in read_numbers(run.metrics).items():
            if self._reference.setdefault(step, numbers) != numbers:
                problems.append(f"WRONG: step {step} gave {numbers}, and {self._reference[step]} undisturbed")
                break

    def _check_end(self, fault: Fault, run: Launch, outcome: Outcome) -> None:
        code, output, problems = run.agent.returncode, run.output, outcome.problems
        if fault.is_kill or outcome.skipped:
            return
        if outcome.detail.startswith("made again"):
            if not re.search(r"warning: .*was removed while this run", output):
                problems.append("no warning that the directory was removed")
            return
        if fault.kind == "SIGTERM":
            stopped = re.search(r"stopped at iteration (\d+): received SIGTERM", output)
            if code or not stopped or int(stopped.group(1)) != outcome.newest_after:
                problems.append(f"exit code {code} after SIGTERM, and not saved where it stopped")
            return
        if not code:
            problems.append("it ended with exit code 0")
        if fault.kind == "rank stopped for good":
            if not re.search(
                rf"(warning|error): .*rank {fault.rank} \(host \S+, process \d+\).* at iteration \d+", output
            ):
                problems.append("nobody names the stopped rank")
            return
        if outcome.newest_after and not re.search(r"error: .*iter_\d{7}", output):
            problems.append("no error names the checkpoint that is left")
        # What TensorBoard's own thread says about a full disk is not ours, nor what torchrun says about its ranks.
        ours = output.split("torch/distributed/elastic/multiprocessing")[0]
        ours = re.sub(r"Exception in thread Thread-.*\nTraceback", "", ours)
        if "Traceback (most recent call last)" in ours:
            problems.append("it ended with a traceback")
