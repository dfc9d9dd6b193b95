"""Which checkpoint of a directory is the one to load. Standard library only.

The newest complete one of the run whose directory it is (`run_file.py`): a run that is killed between a commit and the
tracker's move has a newer one than the tracker says. The tracker decides where the run is not known, as in directories
of earlier releases and of Megatron-LM.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from phd_megatron.checkpoint.run_file import RunFile, read_run
from phd_megatron.checkpoint.status import (
    ASIDE,
    METADATA,
    SAME_IN_ALL,
    TRAINING_STATE,
    CheckpointError,
    is_complete,
    iteration_dir,
    iteration_of,
    looks_like_one,
    run_of,
    status,
    training_state,
)
from phd_megatron.config.files import kind_of
from phd_megatron.console.terminal import say
from phd_megatron.runtime.durable import read_small

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # what Megatron-LM's tracker says of converted weights

Warn = Callable[[str], None]


def read_tracker(root: str | os.PathLike[str]) -> str | None:
    """Stripped text of the tracker file, or None when there is none. Bytes that are no text are shown as such.

    Raises:
        CheckpointError: what stands there is no file that can be read.
    """
    path = Path(root) / TRACKER
    try:
        return read_small(path).strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        return f"? ({error})"
    except OSError as error:
        kind = "is a directory" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise CheckpointError(
            f"{path} {kind}: it should be a file that holds the number of an iteration; move it away, or load one "
            "iter_... directory by name"
        ) from error


def complete_iterations(root: str | os.PathLike[str]) -> list[int]:
    """Iterations with a complete checkpoint under ``root``, ascending; empty when there is no such directory."""
    return sorted({iteration for iteration, path in _candidates(Path(root)) if is_complete(path)})


def complete_dir(root: str | os.PathLike[str], iteration: int) -> Path | None:
    """The complete checkpoint of one iteration, else None.

    While an iteration is saved anew its old checkpoint lies set aside; after a kill at that moment it is the answer.
    """
    path = iteration_dir(root, iteration)
    for candidate in (path, aside(path)):
        if is_complete(candidate):
            return candidate
    return None


def aside(path: Path) -> Path:
    """Where a complete checkpoint lies while its iteration is saved anew."""
    return path.with_name(path.name + ASIDE)


class Survey:
    """The checkpoints of one directory, each looked at once.

    Attributes:
        file: content of ``run.json``; None when there is none that can be read.
        run: whose directory this is, by ``run.json`` or else by the checkpoint that the tracker names; None: not known.
        complete: iterations that have one, ascending.
        damaged: iteration -> what is wrong, of those that had one. They are never deleted.
        misnamed: iteration of the name -> iteration of the state inside, where somebody renamed or copied a directory.
            They are neither loaded nor deleted.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.tracked = read_tracker(root)
        #: what the tracker says, where it is an iteration
        self.iteration = (
            int(self.tracked) if self.tracked and self.tracked.isdecimal() and len(self.tracked) < 19 else None
        )
        self.file = read_run(root)
        self.run = self.file or self._run_of_the_tracked()
        self.complete: list[int] = []
        self.damaged: dict[int, str] = {}
        self.misnamed: dict[int, int] = {}
        for iteration in sorted({iteration for iteration, _ in _candidates(self.root)}):
            found_dir = complete_dir(root, iteration)
            if found_dir is not None:
                inside = saved_iteration(found_dir)
                if inside in (None, iteration):
                    self.complete.append(iteration)
                else:
                    self.misnamed[iteration] = inside
                continue
            for path in (iteration_dir(root, iteration), aside(iteration_dir(root, iteration))):
                found = status(path, tracked=iteration == self.iteration)
                if found.kind == "damaged":
                    self.damaged[iteration] = found.reason
                    break

    def is_of_the_run(self, iteration: int, *, by_tracker: bool = True) -> bool:
        """Whether a checkpoint is of the run that goes on here, and not of one that it left behind.

        Args:
            by_tracker: where the run is not known, only the one that the tracker names is.
        """
        if iteration == self.iteration:
            return True
        if self.run is None:
            return not by_tracker or (self.iteration is None and self.tracked != RELEASE)
        return iteration <= self.run.began or self._run_of(iteration) == self.run.run

    @cached_property
    def newest(self) -> int | None:
        """The newest complete iteration of the run; None when there is none."""
        return next((iteration for iteration in reversed(self.complete) if self.is_of_the_run(iteration)), None)

    @property
    def is_in_use(self) -> bool:
        """Whether there is anything here that a run of another directory must not save over."""
        return bool(self.complete or self.damaged or self.misnamed) or is_complete(self.root / RELEASE)

    @property
    def has_own(self) -> bool:
        """Whether a checkpoint, be it damaged, carries the id of ``run.json``."""
        return self.file is not None and any(
            self._run_of(iteration) == self.file.run for iteration in (*self.complete, *self.damaged)
        )

    def older_than(self, iteration: int) -> int | None:
        """The newest complete one of the run before an iteration."""
        before = [other for other in self.complete if other < iteration and self.is_of_the_run(other, by_tracker=False)]
        return before[-1] if before else None

    def refuse_damage(self) -> None:
        """Refuse to go on from something else than the newest checkpoint of the run because that is damaged.

        Raises:
            CheckpointError: naming the file.
        """
        newest = self.newest
        for iteration, inside in sorted(self.misnamed.items(), reverse=True):
            if newest is None or iteration > newest or iteration == self.iteration:
                raise CheckpointError(misnamed_message(iteration_dir(self.root, iteration), inside))
        for iteration in sorted(self.damaged, reverse=True):
            if (newest is None or iteration > newest) and self.is_of_the_run(iteration):
                raise CheckpointError(
                    f"{self.damaged[iteration]}, so {iteration_dir(self.root, iteration)} is not a complete checkpoint "
                    "any more; it was one and its tensors may be intact, so nothing older is taken instead: "
                    f"{self._cure(iteration)}"
                )

    def choose(self, warn: Warn) -> Path | None:
        """The checkpoint to load; None when there is none.

        Raises:
            CheckpointError: the newest one of the run is damaged, or the tracker names one and there is none at all.
        """
        self.refuse_damage()
        tracker, newest = self.root / TRACKER, self.newest
        named: Path | None = None
        if self.iteration is not None:
            named = complete_dir(self.root, self.iteration)
        elif self.tracked == RELEASE and is_complete(self.root / RELEASE):
            named = self.root / RELEASE
        if named is not None and newest in (None, self.iteration):
            return named
        if named is not None:
            warn(
                f"note: {tracker} says {self.tracked!r}, but iteration {newest} of the same run is complete and newer; "
                f"taking iteration {newest} (an older one is taken when it is loaded by name, such as {named})"
            )
        else:
            newest = self._fall_back(warn)
        return complete_dir(self.root, newest) if newest is not None else None

    def _fall_back(self, warn: Warn) -> int | None:
        newest = self.newest
        if newest is None and self.complete:
            newest = self.complete[-1]
        tracker = self.root / TRACKER
        rest = f"; taking the newest complete checkpoint, iteration {newest}" if newest is not None else ""
        if self.tracked is None:
            if newest is not None:
                warn(f"warning: {self.root} has no {TRACKER}{rest}")
            return newest
        if self.iteration is not None:
            problem = f"{iteration_dir(self.root, self.iteration).name} is missing or its save was not finished"
        else:
            problem = (
                f"{self.root / RELEASE} is not complete" if self.tracked == RELEASE else "that is not an iteration"
            )
        if newest is None and (self.iteration is not None or self.tracked == RELEASE):
            raise CheckpointError(
                f"{tracker} says {self.tracked!r}, but {problem}, and there is no other complete checkpoint: put it "
                f"back, or delete {tracker} to start from scratch"
            )
        warn(f"warning: {tracker} says {self.tracked[:80]!r}, but {problem}{rest}")
        return newest

    def _run_of_the_tracked(self) -> RunFile | None:
        run = self._run_of(self.iteration) if self.iteration is not None else None
        return RunFile(run, self.iteration or 0) if run is not None else None

    def _run_of(self, iteration: int) -> str | None:
        path = iteration_dir(self.root, iteration)
        return run_of(path if path.is_dir() else aside(path))

    def _cure(self, iteration: int) -> str:
        older = self.older_than(iteration)
        other = ""
        if older is not None:
            other = f", load {iteration_dir(self.root, older)} by name (with --rewind where the run also saves here)"
        return f"put the file back ({SAME_IN_ALL}){other}, or move the directory away to do without it"


def latest_complete(load_dir: str | os.PathLike[str], warn: Warn = say) -> Path | None:
    """The checkpoint to load from ``load_dir``: a root directory, or one iteration's directory.

    Of a root directory the newest complete one of its run; ``warn`` says so where the tracker says something else.

    Returns:
        The checkpoint's directory, or None when ``load_dir`` is missing or holds no complete checkpoint.

    Raises:
        CheckpointError: ``load_dir`` is itself a checkpoint's directory and not complete, the newest checkpoint in it
            is damaged or holds something that is no file, or it is a file.
    """
    found = _latest(Path(load_dir), warn)
    if found is not None:
        _refuse_what_is_no_file(found)
        named, inside = iteration_of(found), saved_iteration(found)
        if None not in (named, inside) and named != inside:
            raise CheckpointError(misnamed_message(found, inside))
    return found


def _refuse_what_is_no_file(directory: Path) -> None:
    """A pipe among the files would be waited for when it is read."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent) / name
            with suppress(FileNotFoundError):  # a link that leads nowhere is told by who reads it
                mode = path.stat().st_mode
                if not stat.S_ISREG(mode):
                    raise CheckpointError(f"{path} is no file but {kind_of(mode)}; load another checkpoint")


def _latest(root: Path, warn: Warn) -> Path | None:
    if root.exists() and not root.is_dir():
        raise CheckpointError(
            f"{root} is a file; give the directory that was saved into, or one iter_... directory of it"
        )
    if is_complete(root):
        return root
    if iteration_of(root) is not None and is_complete(aside(root)):
        return aside(root)
    if root.is_dir() and (iteration_of(root) is not None or looks_like_one(root)):
        raise CheckpointError(_incomplete_message(root))
    if iteration_of(root) is not None:
        there = complete_iterations(root.parent)
        cure = f"load one of {', '.join(map(str, there[-8:]))}, or {root.parent}" if there else "correct the path"
        raise CheckpointError(f"there is no checkpoint {root}; {cure}")
    return Survey(root).choose(warn)


def saved_iteration(checkpoint: Path) -> int | None:
    """The iteration that a checkpoint's own state says; None where it does not, as in those of Megatron-LM."""
    found = training_state(checkpoint).get("iteration")
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def misnamed_message(checkpoint: Path, inside: int | None) -> str:
    """Why a checkpoint whose directory says another iteration than its content is not loaded."""
    return (
        f"{checkpoint} holds the state of iteration {inside}, by its {TRAINING_STATE}: somebody renamed or copied it, "
        f"and a run that goes on from it would replace its own later checkpoints. Call it iter_{inside:07d} again, "
        "move it away, or load another one by name"
    )


def _candidates(root: Path) -> Iterator[tuple[int, Path]]:
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise CheckpointError(
            f"{root} cannot be read ({error.strerror}): correct its permissions, or give another directory"
        ) from error
    for name in names:
        iteration = iteration_of(name)
        if iteration is not None:
            yield iteration, root / name


def _incomplete_message(path: Path) -> str:
    found = status(path)
    others = [other for other in complete_iterations(path.parent) if other != iteration_of(path)]
    cure = (
        f"load {iteration_dir(path.parent, others[-1])}, the newest complete one"
        if others
        else "there is no complete checkpoint beside it"
    )
    if found.kind == "damaged":
        why = f"{found.reason}: something changed it, or its save was interrupted"
        cure = f"put the file back ({SAME_IN_ALL}), or {cure}" if others else f"{cure}; put the file back"
    else:
        why = f"no valid {METADATA}: its save was interrupted"
    return f"{path} is not a complete checkpoint ({why}); {cure}"
