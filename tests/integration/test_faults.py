"""Kills, signals, rivals and full disks against the real program: the last complete checkpoint stays usable."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phd_megatron.checkpoint import store
from phd_megatron.checkpoint.run_lock import LOCK_NAME, RunLock
from phd_megatron.cli.main import main

from .conftest import ROOT, TINY_MODEL, flags, program_environment, read_metrics, run_program

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of another process and /proc are Linux's"),
]

PATIENCE = 400.0  # seconds for anything to happen on a busy machine
#: 3.7 million parameters: 45 MB to write, which takes long enough to be killed in
HEAVY = {"hidden-size": 256, "ffn-hidden-size": 768, "num-layers": 4}
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def pretrain(data: Path, save: Path, **changes: object) -> list[str]:
    """A run that goes on until it is stopped, saves after every step and resumes from where it saves."""
    options: dict[str, object] = {
        **TINY_MODEL,
        "norm-scheme": "hybrid_star",
        "phd-repeat": 2,
        "phd-window": 5,
        "phd-chunk": 8,
        "data-path": data,
        "micro-batch-size": 2,
        "global-batch-size": 4,
        "train-iters": 5000,
        "eval-iters": 0,
        "log-interval": 1,
        "device": "cpu",
        "save": save,
        "load": save,
        "save-interval": 1,
        "metrics-file": save.parent / "metrics.jsonl",
    }
    return ["pretrain", *flags(options | {name.replace("_", "-"): value for name, value in changes.items()})]


class Running:
    """The real program in a session of its own; what it prints goes to a file."""

    def __init__(self, argv: list[str], log: Path, launcher: tuple[str, ...] = ()) -> None:
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "phd_megatron", *argv],
                cwd=ROOT,
                env=program_environment(),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, happened: Callable[[], bool], what: str, pause: float = 0.02) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.process.poll() is not None:
                pytest.fail(f"the program ended with {self.process.returncode} before {what}:\n{self.output}")
            if time.monotonic() > deadline:
                pytest.fail(f"not within {PATIENCE:.0f} s: {what}\n{self.output}")
            time.sleep(pause)

    def wait_for(self, pattern: str) -> None:
        self.wait_until(lambda: re.search(pattern, self.output) is not None, f"printing {pattern!r}")

    def kill(self) -> None:
        """kill -9 of the process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def pause_between_saves(self, save: Path) -> None:
        """SIGSTOP when nothing is being written; removing files that are is another fault."""

        def stopped() -> bool:
            self.process.send_signal(signal.SIGSTOP)
            stat = Path(f"/proc/{self.process.pid}/stat")
            while stat.read_text().rpartition(")")[2].split()[0] not in "TZX":
                time.sleep(0.01)
            directories = [path for path in save.iterdir() if "iter_" in path.name]
            idle = all(store.is_complete(path) and not (path / store.UNFINISHED).exists() for path in directories)
            if idle and store.read_tracker(save) == str(store.complete_iterations(save)[-1]):
                return True
            self.process.send_signal(signal.SIGCONT)
            return False

        self.wait_until(stopped, "a moment between two saves")

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@contextmanager
def running(argv: list[str], log: Path, launcher: tuple[str, ...] = ()) -> Iterator[Running]:
    program = Running(argv, log, launcher)
    try:
        yield program
    finally:
        if program.process.poll() is None:
            program.kill()


def unfinished(save: Path) -> Path | None:
    """The checkpoint that is being written: newer than every complete one."""
    complete = store.complete_iterations(save)
    for path in save.glob("iter_*"):
        if complete and (store.iteration_of(path) or 0) > complete[-1] and not (path / store.METADATA).exists():
            return path
    return None


def last_complete(save: Path) -> Path:
    path = store.latest_complete(save, warn=lambda message: None)
    assert path is not None
    return path


def resumed_from(output: str) -> int:
    (start,) = re.findall(r"training from iteration (\d+)", output)
    return int(start)


def kill_in_a_save(argv: list[str], save: Path, part: str) -> None:
    """Start the run, and kill -9 its process group when ``part`` of a checkpoint that is being written exists."""

    def in_the_middle() -> bool:
        path = unfinished(save)
        return path is not None and (path / part).exists()

    for _ in range(5):
        with running(argv, save.parent / "killed.log") as program:
            program.wait_until(in_the_middle, "a checkpoint was being written", pause=0.0005)
            program.kill()
        if unfinished(save) is not None:
            return
    pytest.fail("five times the save was complete before the kill arrived")


@pytest.mark.parametrize("background", [False, True])
def test_kill_9_during_a_save_and_sigterm(documents: Path, tmp_path: Path, background: bool) -> None:
    """Killed when a checkpoint's directory appears, resumed, killed when its tensors are written, resumed, stopped."""
    save = tmp_path / "save"
    argv = pretrain(documents, save, **HEAVY, **({"async_save": True} if background else {}))
    said = ""
    for part in (".", "__0_0.distcp"):
        kill_in_a_save(argv, save, part)
        expected = last_complete(save)
        with running(argv, tmp_path / "resumed.log") as program:
            program.wait_for(r"iteration +\d+/")
            assert f"loaded checkpoint {expected}" in program.output
            assert resumed_from(program.output) == store.iteration_of(expected)
            if part == ".":
                program.kill()  # during training, or in whatever it does just now
            else:
                if background:
                    program.wait_for("in the background")  # the save on SIGTERM itself waits
                program.process.send_signal(signal.SIGTERM)
                assert program.end() == 0, program.output
            said = program.output
    assert "received SIGTERM: saving and stopping after this step" in said
    (stopped,) = re.findall(r"stopped at iteration (\d+): received SIGTERM", said)
    assert last_complete(save) == store.iteration_dir(save, int(stopped))
    assert f"saved checkpoint {last_complete(save)}" in said
    assert ("in the background" in said) == background

    # A step that was done again after a kill gave the same numbers.
    lines = read_metrics(tmp_path / "metrics.jsonl")
    seen: dict[float, tuple[float, float]] = {}
    for line in lines:
        numbers = (line["lm_loss"], line["grad_norm"])
        assert seen.setdefault(line["iteration"], numbers) == numbers
    assert len(seen) == int(stopped) and len(lines) > len(seen), "at least one step was done twice"


def test_torchrun_kill_9_rival_and_sigterm(documents: Path, tmp_path: Path) -> None:
    """Two data-parallel ranks with overlap; only the launcher is killed, so its workers must not go on saving."""
    save = tmp_path / "save"
    argv = pretrain(documents, save, overlap_grad_reduce=True, overlap_param_gather=True)
    with running(argv, tmp_path / "killed.log", LAUNCHER) as program:
        program.wait_until(lambda: len(store.complete_iterations(save)) >= 2, "two checkpoints")
        program.kill()
    RunLock(save, grace_seconds=PATIENCE).acquire().release()  # its worker is gone, and saves no more
    newest = store.complete_iterations(save)[-1]
    assert newest >= 2
    store.write_tracker(
        save, newest - 1
    )  # wherever the kill fell: now it was between the commit and the tracker's move

    with running(argv, tmp_path / "resumed.log", LAUNCHER) as program:
        program.wait_for(r"training from iteration \d+\n(.*\n)*.*iteration +\d+/")
        start = resumed_from(program.output)
        assert start == newest and "another run" not in program.output
        assert f"says '{newest - 1}', but iteration {newest} of the same run is complete and newer" in program.output

        rival = run_program(*pretrain(documents, save))
        assert rival.returncode == 2
        assert "error: another run saves into" in rival.stdout and "Traceback" not in rival.stdout
        (pid,) = re.findall(rf"process (\d+) on host {re.escape(socket.gethostname())} since \d{{4}}-", rival.stdout)
        assert b"phd_megatron" in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert not re.search(r"iteration +\d+/", rival.stdout)

        program.process.send_signal(signal.SIGTERM)  # to torchrun, as Slurm and Kubernetes do
        program.end()
        said = program.output
    (stopped,) = re.findall(r"stopped at iteration (\d+): received SIGTERM", said)
    assert int(stopped) > start
    assert last_complete(save) == store.iteration_dir(save, int(stopped))
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in said


@pytest.mark.parametrize("background", [{}, {"async_save": True}], ids=["waited-for", "background"])
def test_disk_that_is_full_in_the_middle_of_a_save(
    documents: Path, tmp_path: Path, background: dict[str, object]
) -> None:
    """A limit on the size of files stands in for the full disk: it needs no rights and fails in the same call."""
    save = tmp_path / "save"
    with running(pretrain(documents, save, **background), tmp_path / "full.log") as program:
        program.wait_until(lambda: bool(store.complete_iterations(save)), "the first checkpoint")
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        assert program.end() == 2, program.output
        said = program.output
    last = last_complete(save)
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(rf"saving {save}/iter_\d+ failed: .*File too large", error)
    assert error.endswith(f"the last complete checkpoint is {last}")
    assert "Traceback" not in said
    assert unfinished(save) is None, "the space of the half-written one is given back"
    assert main(pretrain(documents, save, exit_interval=1)) == 0
    assert last_complete(save) == store.iteration_dir(save, (store.iteration_of(last) or 0) + 1)


@pytest.mark.parametrize("removed", ["lock", "directory"])
@pytest.mark.parametrize("background", [{}, {"async_save": True}], ids=["waited-for", "background"])
def test_a_run_whose_lock_was_removed_saves_nothing_more_once_another_has_begun(
    documents: Path, tmp_path: Path, background: dict[str, object], removed: str
) -> None:
    save = tmp_path / "save"
    with running(pretrain(documents, save, **background), tmp_path / "first.log") as first:
        first.wait_until(lambda: bool(store.complete_iterations(save)), "the first checkpoint")
        first.pause_between_saves(save)  # so that the other one comes first
        if removed == "lock":
            (save / LOCK_NAME).unlink()
        else:
            shutil.rmtree(save)
        second_place = pretrain(documents, save, metrics_file=tmp_path / "second.jsonl")
        with running(second_place, tmp_path / "second.log") as second:
            second.wait_until(lambda: "saved checkpoint" in second.output, "saving")
            first.process.send_signal(signal.SIGCONT)
            assert first.end() == 2, first.output
            second.process.send_signal(signal.SIGTERM)
            assert second.end() == 0, second.output
    (error,) = [line for line in first.output.splitlines() if line.startswith("error: ")]
    assert f"another run saves into {save}: process {second.process.pid} on host" in error
    assert "the last checkpoint is " in error and "Traceback" not in first.output
    (stopped,) = re.findall(r"stopped at iteration (\d+): received SIGTERM", second.output)
    assert last_complete(save) == store.iteration_dir(save, int(stopped))
    assert main(pretrain(documents, save, exit_interval=1)) == 0, "and what lies there is whole"


def test_a_removed_lock_is_made_again_where_nobody_came(documents: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    with running(pretrain(documents, save), tmp_path / "alone.log") as program:
        program.wait_until(lambda: bool(store.complete_iterations(save)), "the first checkpoint")
        (save / LOCK_NAME).unlink()
        program.wait_for("warning: .* was removed or replaced while this run holds it; no other run has taken it")
        seen = store.complete_iterations(save)[-1]
        program.wait_until(lambda: store.complete_iterations(save)[-1] > seen, "saving again")
        rival = run_program(*pretrain(documents, save))
        assert rival.returncode == 2 and "error: another run saves into" in rival.stdout
        program.pause_between_saves(save)
        shutil.rmtree(save)
        program.process.send_signal(signal.SIGCONT)
        program.wait_for("warning: .* was removed while this run holds it")
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 0, program.output
    (stopped,) = re.findall(r"stopped at iteration (\d+): received SIGTERM", program.output)
    assert last_complete(save) == store.iteration_dir(save, int(stopped))


#: root without the right to pass over permissions (CAP_DAC_OVERRIDE is 1, PR_CAPBSET_DROP is 24)
OBEDIENT = (
    "-c",
    "import ctypes, os, sys; os.geteuid() or ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) and sys.exit('no right to'); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
)


@pytest.mark.parametrize("background", [{}, {"async_save": True}], ids=["waited-for", "background"])
def test_a_directory_that_becomes_unwritable_names_the_last_good_checkpoint(
    documents: Path, tmp_path: Path, background: dict[str, object]
) -> None:
    tried = subprocess.run([sys.executable, *OBEDIENT, "--version"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"permissions do not stop this user: {tried.stderr}")
    save = tmp_path / "save"
    argv = pretrain(documents, save, keep_last=2, tensorboard_dir=tmp_path / "tensorboard", **background)
    with running(argv, tmp_path / "readonly.log", OBEDIENT) as program:
        program.wait_until(lambda: bool(store.complete_iterations(save)), "the first checkpoint")
        save.chmod(0o500)
        try:
            assert program.end() == 2, program.output
        finally:
            save.chmod(0o700)
    (error,) = [line for line in program.output.splitlines() if line.startswith("error: ")]
    assert re.search(r"saving \S*/iter_\d+ failed: .*Permission denied", error), error
    assert error.endswith(f"the last complete checkpoint is {last_complete(save)}")
    assert "Traceback" not in program.output


def test_too_many_open_files_name_the_last_good_checkpoint(documents: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    with running(pretrain(documents, save), tmp_path / "files.log") as program:
        program.wait_until(lambda: bool(store.complete_iterations(save)), "the first checkpoint")
        resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (5, 5))
        assert program.end() == 2, program.output
    (error,) = [line for line in program.output.splitlines() if line.startswith("error: ")]
    assert "Too many open files" in error and f"checkpoint is {last_complete(save)}" in error
    assert "Traceback" not in program.output


def test_a_low_limit_on_open_files_is_said(documents: Path, tmp_path: Path) -> None:
    argv = ["-m", "phd_megatron", *pretrain(documents, tmp_path / "save", exit_interval=1)]
    code = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, env=program_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: Too many open files") and "ulimit -n" in done.stderr
    assert "may open 24" in done.stderr and "Traceback" not in done.stderr


@contextmanager
def small_file_system(directory: Path, size: str) -> Iterator[Path]:
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_full_file_system(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_file_system(tmp_path / "disk", "4m") as disk:
        metrics = tmp_path / "metrics.jsonl"
        assert main(pretrain(documents, disk, metrics_file=metrics)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "no space left" in error and " are free; " in error
        assert "lower keep_last, or choose another --save directory" in error
        last = last_complete(disk)
        assert error.rstrip().endswith(f"the last complete checkpoint is {last}")
        assert unfinished(disk) is None
        resumed = pretrain(documents, tmp_path / "elsewhere", load=disk, exit_interval=1, metrics_file=metrics)
        assert main(resumed) == 0
        assert f"loaded checkpoint {last}" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_full_disk_under_the_metrics_does_not_end_a_run(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = pretrain(documents, tmp_path / "save", metrics_file="/dev/full", exit_interval=3)
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("warning: metrics cannot be written any more") == 1 and "No space left on device" in out
    assert last_complete(tmp_path / "save").name == "iter_0000003"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_full_disk_under_the_log_does_not_end_a_run(documents: Path, tmp_path: Path) -> None:
    """The steps are worth more than their lines: saved, exit code 0, and stderr says once that lines are missing."""
    save = tmp_path / "save"
    argv = [sys.executable, "-W", "ignore", "-m", "phd_megatron", *pretrain(documents, save, exit_interval=2)]
    with open("/dev/full", "w") as full:
        for end, errors in ((2, subprocess.PIPE), (4, full)):
            done = subprocess.run(
                argv, cwd=ROOT, env=program_environment(), stdout=full, stderr=errors, text=True, timeout=PATIENCE
            )
            assert done.returncode == 0, done.stderr
            assert last_complete(save) == store.iteration_dir(save, end)
            if errors is subprocess.PIPE:
                said = "warning: standard output cannot be written (No space left on device)"
                assert done.stderr.count(said) == 1 and "Traceback" not in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
