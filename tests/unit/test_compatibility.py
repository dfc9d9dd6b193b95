"""Which versions were tested together, and what is said of others."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from phd_megatron.errors import UserError
from phd_megatron.runtime import compatibility
from phd_megatron.runtime.compatibility import (
    PACKAGES,
    TESTED,
    installed_versions,
    missing_names,
    note_of_a_start,
    standing,
)

ROOT = Path(__file__).resolve().parents[2]
HERE: dict[str, str | None] = {
    **{"python": "3.11.7", "torch": "2.13.0+cpu", "megatron-core": "0.16.1", "transformers": "5.24.0"},
    "transformer-engine": None,
}


@pytest.mark.parametrize(
    ("package", "text", "said"),
    [
        ("python", "3.11.7", "tested"),
        ("python", "3.13.0", "newer than 3.12, the newest that was tested"),
        ("python", "3.10.13", "older than 3.11, the oldest that was tested"),
        ("torch", "2.13.1+cu130", "tested"),
        ("torch", "2.12.0", "not tested; tested are 2.11.0, 2.13.0"),
        ("torch", "2.10.0", "older than 2.11.0, the oldest that was tested"),
        ("megatron-core", "0.16.1", "tested"),
        ("megatron-core", "0.17.1", "not tested; tested are 0.16.1, 0.19.2"),
        ("megatron-core", "0.19.0", "tested"),
        ("megatron-core", "0.20.0rc1", "newer than 0.19.2, the newest that was tested"),
        ("megatron-core", "1.0", "newer than 0.19.2, the newest that was tested"),
        ("transformer-engine", "2.9", "older than 2.11.0, the oldest that was tested"),
        ("transformer-engine", None, "not installed"),
    ],
)
def test_what_is_said_of_a_version(package: str, text: str | None, said: str) -> None:
    assert standing({package: text}) == {package: said}


def test_a_tested_or_older_environment_starts_without_a_word() -> None:
    assert note_of_a_start(HERE) is None
    assert note_of_a_start({**HERE, "torch": "2.10.0", "megatron-core": "0.17.1", "transformers": "5.99.0"}) is None


def test_a_newer_one_starts_with_one_line_that_names_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "missing_names", lambda: [])
    note = note_of_a_start({**HERE, "torch": "2.14.0", "megatron-core": "0.20.0"})
    assert note is not None and "\n" not in note
    assert "torch 2.14.0 is newer than 2.13.0" in note and "megatron-core 0.20.0 is newer than 0.19.2" in note


def test_it_is_refused_when_something_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import layers

    monkeypatch.delattr(layers, "set_tensor_model_parallel_attributes")
    with pytest.raises(UserError) as refusal:
        note_of_a_start({**HERE, "megatron-core": "0.20.0"})
    said = str(refusal.value)
    assert said.startswith(
        "megatron-core 0.20.0 does not have megatron.core.tensor_parallel.layers.set_tensor_model_parallel_attributes; "
    )
    assert "tested are 0.16.1, 0.19.2: install one of those" in said
    assert note_of_a_start(HERE) is None, "nobody looks for it in a version that was tested"


def test_a_module_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_names() == []
    monkeypatch.setitem(sys.modules, "megatron.core.optimizer_param_scheduler", None)
    assert missing_names() == ["megatron.core.optimizer_param_scheduler"]


def test_what_is_asked_of_megatron_is_read_from_the_source() -> None:
    asked = compatibility._asked_of_megatron()
    assert ("megatron.core", "parallel_state") in asked and len(asked) > 50
    text = "if TYPE_CHECKING:\n    from megatron.a import b\ndef f():\n    from megatron.c import d, e\n"
    assert list(compatibility._imports(ast.parse(text))) == [("megatron.c", "d"), ("megatron.c", "e")]


def test_the_table_says_what_continuous_integration_installs() -> None:
    """The rows of the CPU are the locked versions and the torch that the scripts install."""
    scripts = ROOT / "launch_scripts"
    lock = (scripts / "constraints.txt").read_text("utf-8")
    (torch,) = re.findall(r'^PHD_TORCH="torch==(.+)"$', (scripts / "_env.sh").read_text("utf-8"), re.MULTILINE)
    rows = [row for row in TESTED if row.where == "CPU"]
    assert len(rows) == len(re.findall(r"^megatron-core==", lock, re.MULTILINE)) == 2
    for row in rows:
        assert row.torch == torch
        for package in ("megatron-core", "transformers"):
            assert f'{package}=={row.versions()[package]} ; python_version == "{row.python}"' in lock


def test_every_package_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.13.0", "transformer-engine": "2.11.0"}

    def version(name: str) -> str:
        if name not in there:
            raise compatibility.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(compatibility, "version", version)
    monkeypatch.setattr(compatibility, "platform", SimpleNamespace(python_version=lambda: "3.12.1"))
    expected = {**dict.fromkeys(PACKAGES), "python": "3.12.1", **there}
    assert installed_versions() == expected
