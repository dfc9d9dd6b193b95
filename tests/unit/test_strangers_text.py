"""What may be read of a stranger's YAML and JSON, and how a message shows what it was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.config.files import read_file, read_json, require_regular
from phd_megatron.config.yaml_text import parse_yaml
from phd_megatron.errors import UserError, for_terminal, shown


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: &x [1, 2]\nb: *x\n", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {k: 1}\nb: {<<: *x, l: 2}\n", {"a": {"k": 1}, "b": {"k": 1, "l": 2}}),
        ("b: {<<: [{k: 1}, {l: 2}]}\n", {"b": {"k": 1, "l": 2}}),
        ("\ufeffa: 1\n", {"a": 1}),
        ("a: 1e-3\nb: 1.0e-3\nc: 0x10\nd: 1_000\n", {"a": "1e-3", "b": 1e-3, "c": 16, "d": 1000}),
        ("[" * 39 + "1" + "]" * 39, None),
        ("a: {x: 1}\nb: {x: 1}\n", {"a": {"x": 1}, "b": {"x": 1}}),
    ],
)
def test_what_is_small_is_read_as_ever(text: str, value: Any) -> None:
    found = parse_yaml(text, "f")
    if text.startswith("[["):
        for _ in range(39):
            (found,) = found
        value = 1
    assert found == value


def test_aliases_are_counted_as_what_they_stand_for() -> None:
    row = "a: &a [" + ",".join(["1"] * 999) + "]\n"
    many = parse_yaml(row + "b: [" + ",".join(["*a"] * 190) + "]\n", "f")
    assert sum(map(len, many["b"])) == 999 * 190
    with pytest.raises(UserError, match="line 2: its aliases stand for more than 200,000 values"):
        parse_yaml(row + "b: [" + ",".join(["*a"] * 210) + "]\n", "f")


def test_a_value_is_shown_by_its_ends() -> None:
    assert shown("a b") == "'a b'" and shown(5) == "5" and shown([1, None]) == "[1, None]"
    assert shown("x" * 1000).endswith("xxx' (1000 characters)") and len(shown("x" * 10**7)) < 300
    assert len(shown(list(range(10**6)))) < 100
    assert shown(10**6000).endswith("(19932 bits)") and shown(-(2**9000)).startswith("-0x1000")
    bomb: Any = "x"
    for _ in range(100):
        bomb = [bomb] * 9
    assert len(shown(bomb)) < 500


def test_a_message_fits_a_terminal() -> None:
    assert for_terminal("a\nb\té") == "a\nb\té"
    assert for_terminal("\x1b[2J\x07\udc80") == "\\x1b[2J\\x07\\udc80"
    assert for_terminal("see " + "p" * 500 + " there") == f"see {'p' * 200}...{'p' * 60} there"
    assert len(for_terminal("word " * 10**6)) < 8100


@pytest.mark.timeout(20)
def test_only_regular_files_are_read_and_only_so_far(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("[1]")
    (tmp_path / "link").symlink_to("f")
    assert read_json(tmp_path / "link", "x") == [1]
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "it is a pipe"), ("none", "No such file"), (".", "it is a directory")):
        with pytest.raises(UserError, match=rf"{said}.*; do so"):
            require_regular(tmp_path / name, "do so")
    with pytest.raises(UserError, match="it has 3 bytes, and at most 2 are read; do so"):
        read_file(tmp_path / "f", "do so", 2)
    (tmp_path / "f").write_text("[" * 10**5)
    with pytest.raises(UserError, match=r"cannot be read .*recursion.*; do so"):
        read_json(tmp_path / "f", "do so")
