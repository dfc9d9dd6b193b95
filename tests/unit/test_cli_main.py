"""The program around the commands: what ``--help`` lists, exit codes, Ctrl-C, broken pipes, one message per job."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phd_megatron.cli import main as program
from phd_megatron.cli.main import COMMANDS, available, main
from phd_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def command(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Let ``doctor`` be a command that calls ``run(argv)``."""
    monkeypatch.setitem(sys.modules, "phd_megatron.cli.doctor", SimpleNamespace(run=run, __spec__=object()))


def raising(error: BaseException) -> Any:
    def run(argv: list[str]) -> int:
        raise error

    return run


def test_help_lists_exactly_the_commands_whose_module_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    modules = {path.stem.rstrip("_") for path in (ROOT / "phd_megatron/cli").glob("*.py")}  # import_.py is `import`
    for name, text in COMMANDS.items():
        assert any(name in line and text in line for line in lines) == (name in modules)

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.endswith(".export") else find(name, *rest)
    )
    assert "export" not in available() and "pretrain" in available()
    assert main(["--help"]) == 0
    assert COMMANDS["export"] not in capsys.readouterr().out
    assert main(["export"]) == 2, "not a traceback about a module"
    assert "unknown command 'export'" in capsys.readouterr().err


def test_no_command_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: phd-megatron COMMAND")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("phd-megatron 0.")


@pytest.mark.parametrize(
    ("word", "hint"), [("pretrian", "did you mean 'pretrain'?"), ("xyz", "choose one of prepare,")]
)
def test_unknown_command(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err == f"error: unknown command {word!r}; {hint}" + (
        "\n" if "mean" in hint else f" {', '.join([*available()][1:])}\n"
    )


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(monkeypatch, lambda argv: len(argv))
    assert main(["doctor", "a", "b", "c"]) == 3, "the command's own code"
    command(monkeypatch, raising(UserError("seq_length=-1: too short; use 1 or more")))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: seq_length=-1: too short; use 1 or more\n"
    command(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    command(monkeypatch, raising(SystemExit(7)))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 7


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), BrokenPipeError("of a worker process")])
def test_anything_unexpected_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its traceback is seen; a broken pipe too, unless it is that of our own output."""
    command(monkeypatch, raising(error))
    with pytest.raises(type(error), match=str(error)):
        main(["doctor"])


def child(code: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = f"import sys, types, time\nfrom phd_megatron.cli.main import main\ndef run(argv):\n{code}\n"
    program += "module = types.SimpleNamespace(run=run, __spec__=object())\n"
    program += "sys.modules['phd_megatron.cli.doctor'] = module\nraise SystemExit(main(['doctor']))"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "code",
    [
        "    [print('x' * 100) for _ in range(10_000)]",
        "    sys.stdin.read()\n    print('a line that stays in the buffer')\n    return 0",
        "    sys.stdin.read()\n    print('help')\n    raise SystemExit(0)",
    ],
    ids=["much", "at the end", "of help"],
)
def test_closed_output_is_no_traceback(code: str, unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``phd-megatron ... | head`` ends as other programs do, by code 128 + SIGPIPE and in silence."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    process = child(code, stdin=subprocess.PIPE)
    assert process.stdout and process.stderr and process.stdin
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(300) == 128 + signal.SIGPIPE


def test_ctrl_c_is_no_traceback() -> None:
    # a test run in the background of a shell ignores the signal, and its children would inherit that
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = child("    print('ready', flush=True)\n    time.sleep(600)", preexec_fn=listen)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, "error: interrupted\n")


# ---------------------------------------------------------------- one message per job


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The variables of a rank under torchrun, with the launcher's store in this process."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("WORLD_SIZE", "2")
    return store


def test_ranks_that_fail_alike_speak_once(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [threading.Thread(target=program.say_once, args=("error: the same",)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert capsys.readouterr().err == "error: the same\n"
    program.say_once("error: rank 1's own")
    assert capsys.readouterr().err == "error: rank 1's own\n"


def test_a_new_start_of_the_job_speaks_again(
    job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program.say_once("error: the same")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    program.say_once("error: the same")
    assert capsys.readouterr().err == "error: the same\n" * 2


def test_a_message_whose_speaker_died_is_not_lost(
    job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    from phd_megatron.console import say_once as module

    monkeypatch.setattr(module, "_WAIT", timedelta(seconds=0.3))

    class Killed:
        def write(self, text: str) -> None:
            raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Killed())
        with pytest.raises(SystemExit):
            program.say_once("error: the same")
    program.say_once("error: the same")
    assert capsys.readouterr().err == "error: the same\n"


def test_without_the_launchers_store_everyone_speaks(
    job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    from phd_megatron.console import say_once as module

    monkeypatch.setattr(module, "_WAIT", timedelta(seconds=0.3))
    for name, value in (("MASTER_PORT", "1"), ("MASTER_PORT", "many"), ("TORCHELASTIC_USE_AGENT_STORE", "False")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            program.say_once("error: the same")
            program.say_once("error: the same")
    assert capsys.readouterr().err == "error: the same\n" * 6


@pytest.mark.parametrize("before", [None, "0"])
def test_commands_keep_the_hub_offline_unless_it_is_said(monkeypatch, capsys, before):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that it is put back
    if before is None:
        monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main(["plan", "--nonsense"]) == 2
    assert os.environ["HF_HUB_OFFLINE"] == (before or "1")
