"""``torchrun``: start several processes and see their output when they fail; Triton's interpreter without a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Without an NVIDIA driver Triton kernels are interpreted; with one they are not tuned, since what is tested is the
# result. Triton reads the first when it is imported, by whichever test, so it is set here.
os.environ.setdefault(*(("PHD_TRITON_TUNE", "0") if Path("/dev/nvidiactl").exists() else ("TRITON_INTERPRET", "1")))

Launcher = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parents[1]


def launch(
    nproc: int,
    *args: object,
    timeout: float = 400,
    check: bool = True,
    env: dict[str, str] | None = None,
    threads: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --nproc-per-node nproc args...`` from the checkout's root.

    ``args`` start with a script, or with "-m" and a module. A run that fails (unless ``check`` is false) or takes
    longer than ``timeout`` seconds fails the test with everything it printed. ``stdout`` holds both streams.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command += [str(arg) for arg in args]
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    variables |= {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **(env or {})}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(command)}\ntook longer than {timeout} s; it printed:\n{output}")
    if check and process.returncode:
        pytest.fail(f"{' '.join(command)}\nended with {process.returncode}; it printed:\n{output}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@pytest.fixture(scope="session")
def torchrun() -> Launcher:
    """``torchrun(nproc, *args, timeout=400, check=True, env=None, threads=1) -> CompletedProcess``."""
    return launch
