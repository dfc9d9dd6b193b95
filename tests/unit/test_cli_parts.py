"""What the commands share: flags that are refused in the program's own words, tables, and numbers that are printed."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from pathlib import Path

import pytest

from phd_megatron.cli.main import COMMANDS, main
from phd_megatron.cli.stop import CLEAN_UP
from phd_megatron.cli.sweep import _verdict
from phd_megatron.console.arguments import Parser, parse_strictly
from phd_megatron.console.tables import print_table
from phd_megatron.console.terminal import hearing
from phd_megatron.errors import DIVERGED, RunLost, UserError, for_terminal, shown
from phd_megatron.sweep.store import Status

ROOT = Path(__file__).resolve().parents[2]


def parser() -> Parser:
    made = Parser(prog="phd-megatron test")
    made.add_argument("--output", required=True)
    made.add_argument("--count", type=int, default=3)
    made.add_argument("--share", type=float)
    made.add_argument("--kind", choices=("a", "b"))
    made.add_argument("--tags", nargs="+", default=[])
    made.add_argument("--quiet", action="store_true")
    made.add_argument("--empty", default="")
    return made


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--output not given; it is needed"),
        (["--output"], "--output has no value; write --output VALUE"),
        (["--output", ""], "--output '' is empty, as a shell variable is that was never set"),
        (["--output", "x", "--count", "1.5"], "--count '1.5' is not an integer; correct it"),
        (["--output", "x", "--count", str(2**63)], "--count 9223372036854775808: it is beyond 9223372036854775807"),
        (["--output", "x", "--count", str(-(2**63))], "it is beyond 9223372036854775807 (64 bits)"),
        (["--output", "x", "--share", "x"], "--share 'x' is not a number; correct it"),
        (["--output", "x", "--share", "nan"], "--share nan: it is not finite"),
        (["--output", "x", "--share", "inf"], "--share inf: it is not finite"),
        (["--output", "x", "--kind", "c"], "--kind 'c' is not known; use one of"),
        (["--output", "x", "--tags", "a", ""], "--tags '' is empty"),
        (["--output", "x", "--tags"], "--tags has no value"),
        (["--output", "x", "--quiet=1"], "--quiet='1': --quiet takes no value; write --quiet alone"),
        (["--output", "x", "stray word"], "unexpected words stray word: they belong to no flag"),
        (["--outptu", "x"], "unknown flag --outptu; did you mean --output?"),
        (["--output", "x", "--zzzzz=1"], "unknown flag --zzzzz; the flags are --help, --output, --count"),
        (["--output", "x", "--coun", "4"], "unknown flag --coun; did you mean --count?"),
    ],
)
def test_wrong_flags(argv: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_strictly(parser(), argv)
    assert said in str(caught.value)


def test_right_flags() -> None:
    found = parse_strictly(parser(), ["--output", "--not a flag", "--count", str(2**63 - 1), "--tags", "a", "b"])
    assert (found.output, found.count, found.tags, found.quiet) == ("--not a flag", 2**63 - 1, ["a", "b"], False)
    found = parse_strictly(parser(), ["--output=x", "--empty", "", "--quiet", "--share", "1e3"])
    assert (found.output, found.count, found.empty, found.quiet, found.share) == ("x", 3, "", True, 1000.0)


def test_tables_in_files_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ["name", "n"], [["a", "1"], ["longer", "12345"]])
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "name        n",
        "------  -----",
        "a           1",
        "longer  12345",
    ]


def test_tables_on_a_terminal_stand_to_the_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_table("title", ["name", "number"], [["a", "1"], ["longer", "12345"]])
    said = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert said[0].rstrip() == "title"
    cells = [[cell for cell in re.split("[│┃]", line)[1:-1]] for line in said if re.search("[│┃]", line)]
    assert cells == [[" name   ", " number "], [" a      ", "      1 "], [" longer ", "  12345 "]]


def test_only_the_console_prints() -> None:
    """Everything else speaks through :mod:`phd_megatron.console.terminal`."""
    found = []
    for path in [*(ROOT / "phd_megatron").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert [place for place in found if not place.startswith("phd_megatron/console/terminal.py")] == []


def test_a_command_hears_what_modules_tell_logging(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("phd_megatron.data.somewhere")
    root = logging.getLogger()
    before, root.handlers[:] = root.handlers[:], []
    try:
        with hearing():
            logger.warning("a file of %s is damaged", "x")
            logger.info("a detail")
            root.addHandler(logging.NullHandler())
            logger.warning("heard by who set logging up")
    finally:
        root.handlers[:] = before
    assert capsys.readouterr().err == "a file of x is damaged\n"


def test_values_in_messages_are_short() -> None:
    assert shown("a" * 198) == repr("a" * 198)
    assert shown("a" * 5000).endswith("(5000 characters)") and len(shown("a" * 5000)) < 250
    assert shown(list(range(100))) == "[0, 1, 2, 3, 4, 5, 6, 7, ...]"
    assert shown(-(10**5000)).startswith("-0x") and shown(-(10**5000)).endswith("(16610 bits)")
    assert len(shown({f"{i}" * 50: "b" * 150 for i in range(8)})) <= 200 + 3 + 40
    assert for_terminal("a\x1b[31mb\n\tc") == "a\\x1b[31mb\n\tc"
    assert for_terminal("x" * 400) == "x" * 200 + "..." + "x" * 60
    assert for_terminal("x" * 399) == "x" * 399
    assert for_terminal("y " * 6000) == ("y " * 2000) + "\n...\n" + "y " * 2000
    assert (UserError.exit_code, RunLost.exit_code, DIVERGED) == (2, 1, "the run has diverged")


def test_a_plan_prints_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A layer: 2 x 8 x 16 + 2 x 8 x 8 + 6 x 8 x 12 operations a row; 16 entries of vocabulary are padded to 128."""
    sizes = {"num-layers": 2, "hidden-size": 8, "ffn-hidden-size": 12, "num-attention-heads": 2, "num-query-groups": 1}
    sizes |= {"seq-length": 4, "vocab-size": 16, "train-iters": 30, "micro-batch-size": 2, "peak-tflops": 1e-9}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert main(["plan", *words, "--ranks", "3", "--mfu", "0.5", "--train-iters", "30"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split()[-1] for line in out.splitlines() if "  " in line}
    # 4 tokens see 10 pairs of 32 operations a layer; head 2 x 4 x 8 x 128
    forward = 2 * (4 * 960 + 320) + 8192
    samples = 30 * 3 * 2
    hours = 3 * forward * samples / (1e-9 * 1e12 * 0.5) / 3600
    assert rows["iterations"] == "30"
    assert rows["tokens (original)"] == rows["tokens (processed)"] == "720"
    assert rows["training FLOPs of a token"] == f"{3 * forward / 4:.4g}"
    assert rows["training FLOPs"] == f"{3 * forward * samples:.4g}"
    assert rows["device hours"] == f"{hours:,.4g}" and rows["days on 3 ranks"] == f"{hours / 3 / 24:,.3g}"
    assert rows["parameters"] == "2.02k"  # 2 x 496 + 128 x 8 + 8 = 2024
    assert rows["active ones outside the vocabulary's matrices"] == "1.00k"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0"], "--ranks 0 is out of range"),
        (["--mfu", "0"], "--mfu 0.0 is no share"),
        (["--mfu", "1.01"], "--mfu 1.01 is no share"),
        (["--mfu", "-0.1"], "--mfu -0.1 is no share"),
    ],
)
def test_a_plan_of_what_cannot_be(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_sweep_has_succeeded_when_all_members_have(capsys: pytest.CaptureFixture[str]) -> None:
    class Somewhere:
        directory = Path("runs/x")

    done, failed = Status("finished", 0, 1), Status("failed", 1, 1, message="no memory")
    assert _verdict(Somewhere(), {"a": done, "b": done}) == 0
    assert "2 of 2 members finished in runs/x" in capsys.readouterr().out
    for state in ("failed", "waiting", "running", "stopped", "diverged"):
        assert _verdict(Somewhere(), {"a": done, "b": Status(state)}) == 1  # type: ignore[arg-type]
        out = capsys.readouterr().out
        assert f"b: {state}\n" in out and "1 of 2 members finished" in out and "sweep report runs/x" in out
    assert _verdict(Somewhere(), {"b": failed}) == 1
    out = capsys.readouterr().out
    assert "b: failed: no memory\n0 of 1 members finished" in out and "sweep report" not in out


def test_a_comparison_with_a_run_that_diverged_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def metrics(name: str, losses: list[float]) -> str:
        rows = [
            {
                **{"iteration": i, "consumed_samples": i, "consumed_tokens": 10 * i, "consumed_flops": 100.0 * i},
                **{"lm_loss": loss, "iteration_seconds": 1.0},
            }
            for i, loss in enumerate(losses, 1)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{name.partition('.')[0]}={tmp_path / name}"

    whole, better = metrics("a.jsonl", [4.0, 3.0]), metrics("b.jsonl", [4.0, 2.5])
    broken = metrics("c.jsonl", [4.0, float("nan")])
    assert main(["compare", whole, better, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "-0.5000" in said.out and said.err == ""
    assert main(["compare", whole, broken, "--output", str(tmp_path / "out2")]) == 1
    said = capsys.readouterr()
    assert "error: c has diverged: from iteration 2 on" in said.err


def test_commands_that_clean_up_after_a_signal() -> None:
    """Those that write into temporary places; pretrain and sweep save what they have instead."""
    assert {"prepare", "export", "import", "average", "generate", "evaluate", "parity", "bench"} == CLEAN_UP


@pytest.mark.parametrize("command", [*COMMANDS, "bench train", "bench attention", "sweep status"])
def test_no_command_takes_a_part_of_a_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The next release may have another flag that begins so."""
    assert main([*command.split(), "--hel"]) == 2
    assert "usage" not in capsys.readouterr().out


def test_a_parser_takes_no_part_of_a_flag() -> None:
    made = Parser(prog="phd-megatron test")
    made.add_argument("--number", type=int)
    with pytest.raises(UserError, match="--num"):
        made.parse_args(["--num", "3"])
