"""The script that measures the sources, on a checkout of three small files."""

from __future__ import annotations

import json
from pathlib import Path

import measure_house
import pytest

LOOSE = '''"""Any and object in words are none."""
from typing import Any, cast
import typing

def f(x: Any, y: object) -> typing.Any:  # type: ignore[misc]
    text = "# type: ignore"
    return cast(int, x)
'''
KERNEL = (
    "import triton\n\n@triton.jit\ndef kernel():\n" + "    x = 1\n" * 50 + "\n\ndef short():\n" + "    x = 1\n" * 49
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in (
        ("phd_megatron/__init__.py", "\n"),
        ("phd_megatron/__main__.py", "print('help')\n"),
        ("phd_megatron/config/loose.py", LOOSE),
        ("kernels/op/kernel.py", KERNEL),
        ("tools/long.py", "class C:\n    async def long(self):\n" + "        x = 1\n" * 50),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_files_lines_types_and_functions_by_room(checkout: Path) -> None:
    found = {room.name: room for room in measure_house.rooms(checkout)}
    assert list(found) == [".", "config", "kernels", "tools"]
    assert (found["."].files, found["."].lines) == (2, 2)
    config = found["config"]
    assert (config.files, config.lines, config.loose) == (1, 7, 5), "Any, object, typing.Any, cast and type: ignore"
    assert config.loose_per_thousand == pytest.approx(5000 / 7)
    assert found["kernels"].long_triton == {"kernels/op/kernel.py:kernel": 51} and not found["kernels"].long
    assert found["tools"].long == {"tools/long.py:long": 51}
    whole = measure_house.product([*found.values()])
    assert (whole.files, whole.loose, whole.long) == (4, 5, {}), "tools are no part of the product"


def test_the_table_and_json_say_the_same(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure_house.main(["--root", str(checkout), "--runs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["config", "1", "7", "5", "714.3", "0", "0"]
    assert lines[5].split() == ["product", "4", "115", "5", "43.5", "0", "1"]
    assert lines[-1].startswith("phd-megatron --help: ")
    measure_house.main(["--root", str(checkout), "--runs", "0", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["rooms"][1] == {
        **{"name": "config", "files": 1, "lines": 7, "loose": 5, "long": {}, "long_triton": {}},
        "loose_per_thousand": pytest.approx(714.29, abs=0.01),
    }
    assert said["seconds"] == {}
