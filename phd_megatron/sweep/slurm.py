"""Members as a SLURM array: one task a member, each the command ``phd-megatron sweep member``."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from phd_megatron.errors import UserError
from phd_megatron.sweep.options import Launcher
from phd_megatron.sweep.store import Store, write

SCRIPT_FILE, JOB_FILE = "slurm.sbatch", "slurm.json"
_SAVE_SECONDS = 300  #: before its time limit a task is asked to save and stop


def member_line(store: Store, name: str) -> list[str]:
    """The command that runs one member and records how it ended."""
    return [sys.executable, "-m", "phd_megatron", "sweep", "member", str(store.directory.resolve()), name]


def script(store: Store, names: Sequence[str], launcher: Launcher, uses_gpus: bool = True) -> str:
    """The batch script of these members."""
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={store.name}",
        f"#SBATCH --array=0-{len(names) - 1}%{launcher.parallel}",
        f"#SBATCH --nodes={launcher.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gpus-per-node={launcher.ranks}"] if uses_gpus else []),
        f"#SBATCH --signal=B:TERM@{_SAVE_SECONDS}",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={store.directory.resolve()}/slurm-%A_%a.log",
        *(f"#SBATCH {option}" for option in launcher.slurm_options),
        "set -euo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        "members=(",
        *(f"    {shlex.quote(name)}" for name in names),
        ")",
        "export PYTHONSAFEPATH=1",
        # exec: the signal before the time limit goes to the batch shell, and must reach the program
        f'exec {shlex.join(member_line(store, "")[:-1])} "${{members[SLURM_ARRAY_TASK_ID]}}"',
    ]
    return "\n".join(lines) + "\n"


def submit(store: Store, names: Sequence[str], launcher: Launcher, uses_gpus: bool, print_only: bool) -> str:
    """Write the script and hand it to SLURM; with ``print_only`` only write it. What to tell the user.

    Raises:
        UserError: when SLURM is not here, refuses, or still has the sweep's last array in its queue.
    """
    path = store.directory / SCRIPT_FILE
    if not print_only:
        _refuse_queued(store.directory)
    write(path, script(store, names, launcher, uses_gpus))
    if print_only:
        return f"{path.read_text('utf-8')}# {len(names)} members; submit with: sbatch {shlex.quote(str(path))}"
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch on this machine; submit {path} from a login node, or use --print")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses {path}: {done.stderr.strip() or done.stdout.strip()}")
    job = done.stdout.strip().partition(";")[0]
    write(store.directory / JOB_FILE, json.dumps({"job": job, "members": list(names)}) + "\n")
    return f"submitted {len(names)} members as array {job}; `phd-megatron sweep status {store.directory}` shows them"


def _refuse_queued(directory: Path) -> None:
    try:
        job = json.loads((directory / JOB_FILE).read_text("utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if shutil.which("squeue") is None:
        return
    queue = subprocess.run(["squeue", "--noheader", "--jobs", str(job)], capture_output=True, text=True)
    if queue.returncode == 0 and queue.stdout.strip():
        raise UserError(f"array {job} of this sweep is still in the queue; wait for it, or scancel {job}")
