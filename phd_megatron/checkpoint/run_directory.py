"""Whose directory ``--save`` is: a run saves into its own alone, and goes back in it only when it is told to.

``run.json`` (`checkpoint/run_file.py`) names the run. A directory of an earlier release, which has none, is adopted by
the run that goes on from a checkpoint in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from phd_megatron.checkpoint import store
from phd_megatron.checkpoint.run_file import RUN_FILE, RunFile, is_foreign, new_id, origin_of, read_run, write_run
from phd_megatron.checkpoint.run_lock import RunLock
from phd_megatron.console.terminal import say
from phd_megatron.errors import UserError
from phd_megatron.runtime import agreement

Log = Callable[[str], None]


@dataclass
class RunDirectory:
    """The directory that a run saves into, after :func:`claim`.

    Attributes:
        run: the id that its checkpoints carry.
    """

    root: Path
    run: str
    _content: RunFile
    _lock: RunLock | None

    def check(self, log: Log = say) -> None:
        """Make sure that nobody else has begun to save here; on rank 0, before something is written.

        Raises:
            UserError: another run has.
        """
        if self._lock is None:
            return
        self._lock.check(log)
        found = read_run(self.root)
        if found is None:
            write_run(self.root, self._content)
        elif found.start != self._content.start:
            raise UserError(
                f"another run has begun to save into {self.root} since this one did ({self.root / RUN_FILE} is of "
                "another start): this one saves nothing more there, since two would overwrite each other's "
                "checkpoints. Give one of them another --save directory"
            )


def is_restart(save_dir: str | os.PathLike[str], load: str, *, finetune: bool, rewind: bool) -> bool:
    """Whether the run that saves there began with this very start, and has a checkpoint of its own since.

    A job that is killed is started again with the same words, by torchrun, Slurm or Kubernetes: it goes on then, and
    does not fine-tune or go back once more.
    """
    survey = store.Survey(save_dir)
    origin = origin_of(load, finetune, rewind)
    is_another_place = os.path.realpath(load) != os.path.realpath(save_dir)
    return is_another_place and survey.file is not None and survey.file.origin == origin and survey.has_own


def claim(
    save_dir: str | os.PathLike[str],
    lock: RunLock | None,
    *,
    resume_from: Path | None,
    finetune: bool = False,
    rewind: bool = False,
    load: str | None = None,
    log: Log = say,
) -> RunDirectory:
    """Make the directory this run's, if it may be; collective, while ``lock`` is held (on rank 0).

    Args:
        resume_from: the checkpoint that the run goes on from.
        finetune: only its parameters are taken: the run is another one.
        rewind: it may be older than the newest one of the run; those after it are then left, and replaced one by one.
        load: where the checkpoint was looked for, to know the same start again.

    Raises:
        UserError: on all ranks, when checkpoints there would be overwritten or deleted that nobody named.
    """
    root = Path(save_dir)

    def decide() -> RunFile:
        content = _decide(root, None if finetune else resume_from, rewind, log)
        if content.origin is None:
            content = replace(content, origin=origin_of(load, finetune, rewind))
        try:
            if is_foreign(root):
                log(f"note: {root / RUN_FILE} is no run's; it is kept as {store.keep(root / RUN_FILE).name}")
            write_run(root, content)
        except OSError as error:
            raise UserError(f"cannot save into {root}: {error.strerror}; choose a writable --save directory") from error
        store.tidy(root)
        return content

    content = agreement.from_rank_zero(decide)
    return RunDirectory(root, content.run, content, lock)


def lies_in(checkpoint: Path | None, save_dir: str | None) -> bool:
    """Whether a checkpoint is one of a directory; collective."""
    if checkpoint is None or save_dir is None:
        return False
    return agreement.from_rank_zero(lambda: checkpoint.parent.samefile(save_dir))


def _decide(root: Path, resume_from: Path | None, rewind: bool, log: Log) -> RunFile:
    if store.iteration_of(root) is not None or (root / store.METADATA).exists():
        raise UserError(f"--save {root} is itself a checkpoint; give the directory above it, or another one")
    survey = store.Survey(root)
    if is_foreign(root) and not survey.is_in_use:
        raise UserError(
            f"{root / RUN_FILE} is not what a run of phd-megatron wrote, so it is not replaced; move it away, or "
            "choose another --save directory"
        )
    own = resume_from is not None and resume_from.parent.samefile(root)
    if not own:
        if rewind:
            raise UserError(
                f"--rewind goes back to an older checkpoint of --save {root}, and "
                + (f"{resume_from} is not in it" if resume_from else "none is loaded with its place in the run")
                + f"; load one of {root} by name without --finetune, or leave --rewind out"
            )
        if survey.is_in_use:
            raise UserError(_foreign(root, survey))
        return RunFile(survey.file.run if survey.file is not None else new_id())
    assert resume_from is not None
    start = _iteration(resume_from)
    known = survey.file
    newest = max([*(i for i in (survey.newest,) if i is not None), *_damaged_of_the_run(survey)], default=start)
    if start < newest:
        if not rewind:
            raise UserError(
                f"--load {resume_from} --save {root} goes back: iteration {newest} of this run is there"
                f"{' (damaged)' if newest in survey.damaged else ''}, and the checkpoints after {start} would be "
                f"replaced as the run comes to them; add --rewind to do that, load {root} to go on from the newest, "
                "or choose another --save directory"
            )
        log(f"note: --rewind: going back from iteration {newest} to {start}; what lies after it is replaced bit by bit")
        store.write_tracker(root, start)
        return RunFile(new_id(), start)
    if start > 0 and survey.iteration is not None and survey.iteration < start and survey.is_of_the_run(start):
        store.write_tracker(root, start)
    if known is None:
        run = store.run_of(resume_from)
        why = f"has no valid {RUN_FILE}" if run else "is of an earlier release, or of Megatron-LM"
        log(f"note: {root} {why}; this run goes on in it as its own")
        return RunFile(run or new_id(), start)
    began = known.began if store.run_of(resume_from) == known.run else max(known.began, start)
    return replace(known, began=began, start=new_id())


def _iteration(checkpoint: Path) -> int:
    named = store.iteration_of(checkpoint)
    if named is not None:
        return named
    saved = store.training_state(checkpoint).get("iteration")
    return saved if isinstance(saved, int) else 0


def _damaged_of_the_run(survey: store.Survey) -> list[int]:
    return [iteration for iteration in survey.damaged if survey.is_of_the_run(iteration)]


def _foreign(root: Path, survey: store.Survey) -> str:
    iterations = sorted({*survey.complete, *survey.damaged})
    shown = ", ".join(map(str, iterations[-3:]))
    held = f"checkpoints (iteration{'s' * (len(iterations) > 1)} {'..., ' * (len(iterations) > 3)}{shown})"
    return (
        f"--save {root} holds {held if iterations else 'a checkpoint'} that this run does not go on from: it would "
        f"replace and delete them. Add --load {root} (without --finetune) to go on from the newest, choose another "
        "--save directory, or move them away"
    )
