"""The table of what differs between versions of Megatron-Core, and what is read of a version."""

from __future__ import annotations

import logging
import logging.handlers
import re
from pathlib import Path

import pytest

from phd_megatron.runtime import mcore_fixes, mcore_versions
from phd_megatron.runtime.mcore_versions import DIFFERENCES, RANGE, installed, numbers
from phd_megatron.runtime.redirects import Redirect

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.16.1", (0, 16, 1)), ("0.20.0rc1", (0, 20, 0)), ("0.19.2+local", (0, 19, 2)), ("1", (1,)), ("x", ())],
)
def test_the_numbers_of_a_version(text: str, expected: tuple[int, ...]) -> None:
    assert numbers(text) == expected


def test_the_range_is_that_of_the_requirements() -> None:
    assert f'"megatron-core{RANGE}",' in (ROOT / "pyproject.toml").read_text()


def test_only_this_table_knows_of_versions() -> None:
    """Elsewhere a form is taken as it is met."""
    asking = re.compile(r"version\(.megatron|megatron[.\w]*__version__|mcore_versions\.installed")
    found = [path for path in ROOT.glob("phd_megatron/**/*.py") if asking.search(path.read_text("utf-8"))]
    assert [path.name for path in found] == ["mcore_versions.py"]
    assert all((ROOT / row.test).exists() for row in DIFFERENCES)


@pytest.mark.parametrize(("here", "needed"), [((0, 16, 9), True), ((0, 17), False), ((0, 17, 1), False), (None, True)])
def test_a_correction_ends_with_the_version_that_has_it(
    monkeypatch: pytest.MonkeyPatch, here: tuple[int, ...] | None, needed: bool
) -> None:
    monkeypatch.setattr("phd_megatron.runtime.redirects.installed", lambda: here)
    assert Redirect("a", (), lambda module: None, "why", until="0.17").is_needed is needed
    assert Redirect("a", (), lambda module: None, "why").is_needed


def test_without_megatron_there_is_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed() is not None

    def missing(name: str) -> str:
        raise mcore_versions.PackageNotFoundError(name)

    monkeypatch.setattr(mcore_versions, "version", missing)
    assert installed() is None


def test_lines_that_nobody_can_act_on_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    mcore_fixes.install()
    mcore_fixes.install()
    for name, begin in mcore_fixes._LOGGED_NOISE:
        logger, heard = logging.getLogger(name), logging.handlers.BufferingHandler(9)
        assert len([each for each in logger.filters if each == mcore_fixes._Without(begin)]) == 1
        # Torch's loggers hand nothing on, and lose pytest's handler when torch reads its settings of logs again.
        caplog.set_level(logging.WARNING, name)
        logger.addHandler(heard)
        logger.warning("%s: words", begin)
        logger.warning("something else")
        logger.removeHandler(heard)
        assert [record.getMessage() for record in heard.buffer] == ["something else"], name
