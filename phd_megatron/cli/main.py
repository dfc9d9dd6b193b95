"""The ``phd-megatron`` program: one table of commands, each a module with ``run(argv) -> exit code``."""

from __future__ import annotations

import importlib
import importlib.util
import keyword
import os
import select
import signal
import sys
from contextlib import nullcontext

from phd_megatron import __version__
from phd_megatron.cli.stop import CLEAN_UP, clean_stop
from phd_megatron.console.say_once import say_once
from phd_megatron.console.terminal import has_no_room, hearing, show, unwritable, warn
from phd_megatron.errors import UserError, for_terminal
from phd_megatron.runtime.launcher import die_with_launcher
from phd_megatron.runtime.open_files import is_lack_of_files, lack_of_files, raise_limit

COMMANDS = {
    "prepare": "turn text into Megatron .bin/.idx data",
    "pretrain": "train a model (also under torchrun)",
    "sweep": "train a family of models and report how they compare",
    "compare": "compare two runs at equal tokens, FLOPs and time",
    "plan": "say what a run costs: parameters, FLOPs, memory, device hours",
    "parity": "compare every parallel layout of a configuration with one rank",
    "average": "average checkpoints of a run into one",
    "export": "write a checkpoint as a Hugging Face directory",
    "import": "make a checkpoint of a Hugging Face directory, to go on from, also as a PHD model or with experts",
    "generate": "continue a prompt from a checkpoint or an exported directory",
    "serve": "serve a checkpoint or an exported directory to OpenAI's clients",
    "chat": "talk to a checkpoint or an exported directory in the terminal",
    "evaluate": "loss and perplexity of a checkpoint or an exported directory on prepared data (also under torchrun)",
    "doctor": "show versions and which implementation each operation uses here, and why",
    "bench": "measure attention and training on this machine",
}


def available() -> dict[str, str]:
    """The commands whose module is installed."""
    return {name: text for name, text in COMMANDS.items() if importlib.util.find_spec(module_of(name))}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 for success, 1 for a run that lost one of its ranks, 2 for a refusal that the message explains or output for
        which there is no room (a run goes on to its end without the lines of its log, and has the code of that), 130
        after Ctrl-C, 141 when the reader of the output is gone (``| head``). Anything unexpected is raised, with its
        traceback.
    """
    die_with_launcher()  # again, for whoever starts the console script under torchrun
    try:
        return _guarded(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        if not _stdout_has_no_reader():
            raise
        _discard_stdout()
        return 128 + signal.SIGPIPE


def _guarded(argv: list[str]) -> int:
    end: int | SystemExit
    try:
        end = _run(argv)
    except SystemExit as stop:  # of --help
        end = stop
    except UserError as error:
        say_once(f"error: {for_terminal(str(error))}")
        end = error.exit_code
    except Exception as error:
        if has_no_room(error) and (lost := unwritable(failed=True)) is not None:
            end = _output_is_lost(lost)
        elif is_lack_of_files(error):
            say_once(f"error: {lack_of_files(error)}")
            end = 2
        else:
            raise
    except KeyboardInterrupt:
        warn("error: interrupted")
        end = 128 + signal.SIGINT
    # Here, where a broken pipe and a full disk are handled, and not at the interpreter's end.
    if (lost := unwritable()) is not None and not (end.code if isinstance(end, SystemExit) else end):
        end = _output_is_lost(lost)
    if isinstance(end, SystemExit):
        raise end
    return end


def _output_is_lost(error: OSError) -> int:
    warn(
        f"error: the output of this command cannot be written ({error.strerror}), and what is missing of it is lost; "
        "free some space, or send it elsewhere, and start it again"
    )
    return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        show(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        show(f"phd-megatron {__version__}")
        return 0
    name, *rest = argv
    commands = available()
    if name not in commands:
        from phd_megatron.console.arguments import unknown_word

        raise unknown_word("command", name, commands)
    raise_limit()
    # transformers fetches kernels for some families, and where flash-attn is missing; huggingface_hub reads this once.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with hearing(), clean_stop() if name in CLEAN_UP else nullcontext():
        code: int = importlib.import_module(module_of(name)).run(rest)
    return code


def module_of(name: str) -> str:
    """The module of a command."""
    return f"phd_megatron.cli.{name}_" if keyword.iskeyword(name) else f"phd_megatron.cli.{name}"


def _usage() -> str:
    commands = available()
    width = max(map(len, commands), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, text in commands.items()]
    return "\n".join(
        ["usage: phd-megatron COMMAND [OPTIONS]", "", "commands:", *lines, "", "COMMAND --help says more."]
    )


def _stdout_has_no_reader() -> bool:
    """Whether a ``BrokenPipeError`` is about our output, and not about a socket or a process of ours."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


def _discard_stdout() -> None:
    # What is still buffered would be written once more at the interpreter's end.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
