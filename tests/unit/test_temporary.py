"""A temporary directory vanishes whatever a signal interrupts: its making, its use, its deleting."""

from __future__ import annotations

import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from phd_megatron.runtime import temporary
from phd_megatron.runtime.temporary import temporary_directory


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_use(place: Path) -> None:
    with temporary_directory("some") as made:
        assert made.parent == place and made.name.startswith("phd-megatron-some-")
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        (made / "folder").mkdir()
        (made / "folder" / "file").write_text("text")
        with temporary_directory("some") as other:
            assert other != made
    assert not list(place.iterdir())


def test_a_signal_while_it_is_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Path.mkdir

    def make(path: Path, mode: int) -> None:
        genuine(path, mode)
        raise SystemExit(143)

    monkeypatch.setattr(Path, "mkdir", make)
    with pytest.raises(SystemExit), temporary_directory("some"):
        pass
    assert not list(place.iterdir())


def test_a_signal_while_it_is_used(place: Path) -> None:
    with pytest.raises(SystemExit), temporary_directory("some") as made:
        (made / "file").write_text("text")
        raise SystemExit(143)
    assert not list(place.iterdir())


def test_a_signal_while_it_is_deleted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came = []

    def delete(path: Path, ignore_errors: bool) -> None:
        if not came:
            came.append(path)
            raise SystemExit(143)
        genuine(path, ignore_errors)

    genuine = shutil.rmtree
    monkeypatch.setattr(temporary.shutil, "rmtree", delete)
    with pytest.raises(SystemExit), temporary_directory("some"):
        pass
    assert came and not list(place.iterdir())


def test_what_is_read_only_vanishes_too(place: Path) -> None:
    with temporary_directory("some") as made:
        (made / "folder").mkdir()
        (made / "folder" / "file").write_text("text")
        (made / "folder").chmod(0o500)
    assert not list(place.iterdir())
