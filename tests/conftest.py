"""``torchrun``: start several processes and see their output when they fail; Triton's interpreter without a GPU.

A share of the kernel tests that are marked ``full`` runs with every commit, another one with another commit.
And one rule for continuous integration (``CI=true``): what is missing there fails instead of being skipped.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phd_megatron.runtime.mcore_versions import MUON_SINCE, SKIP_SINCE, installed, numbers

# Without an NVIDIA driver Triton kernels are interpreted; with one they are not tuned, since what is tested is the
# result. Triton reads the first when it is imported, by whichever test, so it is set here.
os.environ.setdefault(*(("PHD_TRITON_TUNE", "0") if Path("/dev/nvidiactl").exists() else ("TRITON_INTERPRET", "1")))

SHARES = 7
"""Of the kernel cases marked ``full`` (about 7 minutes on one core) each commit runs one of so many shares."""

#: what another environment than this one runs: `bash tests/run.sh --mcore VERSION`
collect_ignore = []
if not os.environ.get("PHD_OTHER_PYTHON"):  # Python of the first environment, of which the second one is told
    collect_ignore.append("integration/test_between_versions.py")
if (installed() or ()) < numbers(MUON_SINCE):
    collect_ignore += ["integration/test_muon.py", "unit/test_muon_step.py"]
if (installed() or ()) < numbers(SKIP_SINCE):
    collect_ignore.append("integration/test_skipped_steps.py")

Launcher = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parents[1]


def _version() -> str:
    """What decides on the share: the commit, or in a released archive, which is no checkout, its version."""
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0 and re.fullmatch(r"[0-9a-f]{40,64}", done.stdout.strip()):
            return done.stdout.strip()[:12]
    found = re.search(r'__version__ = "(.+?)"', (ROOT / "phd_megatron/__init__.py").read_text("utf-8"))
    return found[1] if found else "0"


def share_of(text: str) -> int:
    """The share of a commit, a version or a test, the same everywhere."""
    return zlib.crc32(text.encode()) % SHARES


def _chosen(config: pytest.Config) -> tuple[int, str] | None:
    """This run's share and why; None for a run that chooses by marks itself, such as --full."""
    if config.option.markexpr != "not full":
        return None
    if (given := os.environ.get("PHD_TEST_SHARE")) is None:
        version = _version()
        return share_of(version), version
    if not given.isdecimal() or int(given) >= SHARES:
        raise pytest.UsageError(f"PHD_TEST_SHARE={given} is no share; use 0 to {SHARES - 1}, or leave it out")
    return int(given), "PHD_TEST_SHARE"


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which share it is, so that a failure can be repeated at another commit."""
    if (chosen := _chosen(config)) is None:
        return []
    return [f"full kernel cases: share {chosen[0]} of 0 to {SHARES - 1}, from {chosen[1]}"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the mark off the share's cases, before pytest leaves out what has it."""
    if (chosen := _chosen(config)) is None:
        return
    for item in items:
        path = item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else ""
        # Not by the node's id, whose path begins where pytest was told to.
        if path.startswith("tests/kernels/") and share_of(f"{path}::{item.name}") == chosen[0]:
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "full"]


def launch(
    nproc: int,
    *args: object,
    timeout: float = 400,
    check: bool = True,
    env: dict[str, str] | None = None,
    threads: int = 1,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --nproc-per-node nproc args...`` from the checkout's root.

    ``args`` start with a script, or with "-m" and a module. A run that fails (unless ``check`` is false) or takes
    longer than ``timeout`` seconds fails the test with everything it printed. ``stdout`` holds both streams.
    """
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
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
    """``torchrun(nproc, *args, timeout=400, check=True, env=None, threads=1, python=...) -> CompletedProcess``."""
    return launch


# ---------------------------------------------------------------- continuous integration

LINUX = sys.platform.startswith("linux")
#: (start of a reason to skip, what it is that cannot be installed); everything else fails under CI
ALLOWED_SKIPS: list[tuple[str, str]] = [
    ("needs a CUDA device", "hardware: the GPU tests have runs of their own"),
    ("needs two CUDA devices", "hardware"),
    ("needs FP8", "hardware: GPUs before Hopper have no such products"),
    ("a small file system cannot be mounted here", "a right: only root mounts, and containers may forbid it to root"),
    ("only root can mount a small file system", "a right"),
    ("no file system can be mounted here", "a right"),
    ("permissions do not stop this user", "a right: root that may not give up its own"),
]
if Path("/dev/nvidiactl").exists():
    ALLOWED_SKIPS += [
        ("over gloo, on the CPU", "on a machine with a GPU the same test runs over NCCL"),
        ("device functions are called one by one in the interpreter only", "on a GPU there is no interpreter"),
    ]
if not (LINUX and platform.machine() == "x86_64"):
    ALLOWED_SKIPS += [
        ("Triton is ", "another platform: there are no wheels for it"),
        ("shellcheck is not installed", "another platform: there are no wheels for it"),
    ]
if not LINUX:
    ALLOWED_SKIPS += [
        ("audit of another process and /proc are Linux's", "another platform"),
        ("/proc and the parent-death signal are Linux's", "another platform"),
        ("limits of another process and /proc are Linux's", "another platform"),
        ("a child that follows its parent is Linux's", "another platform"),
        ("there is no /dev/full here", "another platform"),
        ("no /dev/shm", "another platform"),
    ]


def _failed_under_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Make a skip a failure where ``CI`` is set, unless the list above has its reason."""
    if os.environ.get("CI", "").lower() in ("", "0", "false") or report.outcome != "skipped":
        return
    if hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    path, line, said = report.longrepr
    reason = re.sub(r"^Skipped: ", "", said)
    if any(reason.startswith(start) for start, _ in ALLOWED_SKIPS):
        return
    report.outcome = "failed"
    report.longrepr = (
        f"{path}:{line}: skipped under CI: {reason}\ninstall what is missing (the extra `test` has all that the tests "
        "need), or add the reason to ALLOWED_SKIPS of tests/conftest.py with what cannot be installed"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    _failed_under_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _failed_under_ci(report)
    return report
