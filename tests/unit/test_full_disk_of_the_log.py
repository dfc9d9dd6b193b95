"""Output on a full disk: a command ends in one message, and what trains or works for long goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phd_megatron.console.terminal import warn

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
#: in place of `doctor`: what the command does
COMMANDS = {
    "at the end": "print('a line that stays in the buffer')",
    "much": "[print('x' * 100) for _ in range(1000)]",
    "flushed": "print('x', flush=True)",
    "of help": "print('help'); raise SystemExit(0)",
    "after a refusal of its own": "print('x'); raise UserError('no')",
}


def python(code: str, unbuffered: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, text=True, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


def command(what: str) -> str:
    return f"""
import sys, types
from phd_megatron.cli.main import main
from phd_megatron.errors import UserError
def run(argv):
    {what}
    return 0
sys.modules['phd_megatron.cli.doctor'] = types.SimpleNamespace(run=run, __spec__=object())
raise SystemExit(main(['doctor']))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_output_is_lost_says_so(unbuffered: str) -> None:
    with FULL.open("w") as full:
        for name, what in COMMANDS.items():
            done = python(command(what), unbuffered, stdout=full, stderr=subprocess.PIPE)
            assert done.returncode == 2, (name, done.stderr)
            lines = done.stderr.strip().splitlines()
            said = "the output of this command cannot be written (No space left on device)"
            if name.startswith("after") and not unbuffered:
                said = "no"  # the first thing that went wrong
            assert len(lines) == 1 and lines[0].startswith(f"error: {said}"), (name, done.stderr)
            assert python(command(what), unbuffered, stdout=full, stderr=full).returncode == 2, name
        done = python(command("raise OSError(28, 'No space left on device', 'x.bin')"), stderr=subprocess.PIPE)
        assert done.returncode == 1 and "Traceback" in done.stderr, "another disk's"
        lost = command("print('a warning', file=sys.stderr)")
        assert python(lost, unbuffered, stdout=subprocess.PIPE, stderr=full).returncode == 2


def test_a_warning_that_is_lost_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        warn("nobody reads this")
        full.flush()  # would fail if it still held the line


SAY = """
import resource, sys
from phd_megatron.console.terminal import say
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
for number in range(300):
    say(f"line {number} " + "x" * 40)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
say("there is room again")
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_a_log_are_lost_and_later_ones_are_not(tmp_path: Path, unbuffered: str) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        done = python(SAY, unbuffered, stdout=stream, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr == (
        "warning: standard output cannot be written (File too large); lines are lost, the work goes on\n"
    )
    assert log.read_text().endswith("there is room again\n") and log.stat().st_size < 100
    with FULL.open("w") as full:
        assert python(SAY, unbuffered, stdout=full, stderr=full).returncode == 0, "nobody can be told"
