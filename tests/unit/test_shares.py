"""Which of the kernel cases marked ``full`` a commit runs: each belongs to one share, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("PHD_TEST_SHARE", raising=False)
    return request.config.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py"))


def run(marks: str = "not full") -> Any:
    return SimpleNamespace(option=SimpleNamespace(markexpr=marks))


def items(folder: str) -> list[Any]:
    marks = (pytest.mark.full, pytest.mark.slow)
    path = ROOT / folder / "test_x.py"
    return [
        SimpleNamespace(path=path, name=f"test_x[{n}]", own_markers=[mark.mark for mark in marks]) for n in range(100)
    ]


def taken(shares: Any, config: Any, folder: str = "tests/kernels") -> list[str]:
    found = items(folder)
    shares.pytest_collection_modifyitems(config, found)
    assert all([mark.name for mark in item.own_markers][-1] == "slow" for item in found), "other marks stay"
    return [item.name for item in found if len(item.own_markers) == 1]


def test_all_shares_together_are_all_cases_once(shares: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for share in range(7):
        monkeypatch.setenv("PHD_TEST_SHARE", str(share))
        part = taken(shares, run())
        assert 5 <= len(part) <= 30 and part == taken(shares, run())
        assert taken(shares, run(), "tests/integration") == [], "others of an hour stay out"
        assert taken(shares, run("full")) == taken(shares, run("")) == [], (
            "who chooses by marks gets what was asked for"
        )
        assert f"share {share} of 0 to 6" in shares.pytest_report_header(run())[0]
        found += part
    assert sorted(found) == sorted(item.name for item in items("tests/kernels"))
    assert shares.pytest_report_header(run("full")) == []
    for wrong in ("7", "-1", "x", ""):
        monkeypatch.setenv("PHD_TEST_SHARE", wrong)
        with pytest.raises(pytest.UsageError, match="use 0 to 6"):
            taken(shares, run())


def test_the_commit_chooses_and_without_git_the_version(
    shares: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "phd_megatron").mkdir()
    (tmp_path / "phd_megatron/__init__.py").write_text('"""x"""\n\n__version__ = "1.2.3"\n')
    monkeypatch.setattr(shares, "ROOT", tmp_path)
    assert shares._chosen(run()) == (6, "1.2.3")  # CRC-32 is 0x89b6e7e2, 330,066,500 x 7 + 6
    (tmp_path / ".git").write_text("gitdir: nowhere")  # a checkout that git cannot read
    assert shares._chosen(run()) == (6, "1.2.3")
    answer = SimpleNamespace(returncode=0, stdout="3b2941d0c1f5e6a7b8c9d0e1f2a3b4c5d6e7f809\n")
    monkeypatch.setattr(shares.subprocess, "run", lambda *_, **__: answer)
    share, why = shares._chosen(run())
    assert why == "3b2941d0c1f5" and share == shares.share_of(why)
    assert len({shares.share_of(f"{n:012x}") for n in range(100)}) == 7
