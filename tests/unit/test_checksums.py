"""Checksums of a checkpoint: every damaged, missing or short file is named, and nothing else is."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from phd_megatron.checkpoint import checksums, store
from phd_megatron.checkpoint.store import CheckpointError

FILES = {
    "__0_0.distcp": b"zero" * 1000,
    "__1_0.distcp": b"one" * 500,
    "common.pt": b"c",
    "tokenizer/tokenizer.json": b"{}",
}
COMMIT = json.dumps({"sharded_backend": "torch_dist"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory of files with its manifest, and ``metadata.json`` written after it."""
    directory = tmp_path / "iter_0000002"
    known = {}
    for name, content in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with checksums.SummingWriter(path) as stream:
            stream.write(content[:7])
            stream.write(memoryview(content)[7:])
        if name.endswith(".distcp"):
            known[name] = stream.sum
    checksums.write_manifest(directory, known, {store.METADATA: COMMIT})
    (directory / store.METADATA).write_text(COMMIT)
    return directory


def check(directory: Path, **part: int) -> None:
    manifest = checksums.read_manifest(directory)
    assert manifest is not None
    checksums.verify(directory, manifest, **part)


def test_sums_are_those_of_zlib_and_cover_every_file(saved: Path) -> None:
    manifest = checksums.read_manifest(saved)
    expected = {**FILES, store.METADATA: COMMIT.encode()}
    assert manifest == {name: (len(data), f"{zlib.crc32(data):08x}") for name, data in expected.items()}
    check(saved)


@pytest.mark.parametrize("name", [*FILES, store.METADATA, checksums.MANIFEST])
def test_any_flipped_byte_is_found_and_its_file_named(saved: Path, name: str) -> None:
    path = saved / name
    good = path.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 50)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x04]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match=r"is (damaged|missing)") as refused:
            check(saved)
        assert str(path) in str(refused.value) and "--no-verify-checkpoint" in str(refused.value)
    path.write_bytes(good)
    check(saved)


def test_every_damaged_file_is_named_with_the_reason(saved: Path) -> None:
    (saved / "__0_0.distcp").write_bytes(FILES["__0_0.distcp"][:10])
    (saved / "__1_0.distcp").write_bytes(FILES["__1_0.distcp"] + b"!")
    shutil.rmtree(saved / "tokenizer")
    other = saved.parent / "iter_0000001"
    other.mkdir()
    (other / store.METADATA).write_text(COMMIT)
    with pytest.raises(CheckpointError) as refused:
        check(saved)
    said = str(refused.value)
    assert f"{saved / '__0_0.distcp'} is truncated: it has 10 bytes, and had 4000" in said
    assert f"{saved / '__1_0.distcp'} is damaged: it has 1501 bytes" in said
    assert f"{saved / 'tokenizer/tokenizer.json'} is missing" in said
    assert f"load {other}, or" in said and "common.pt" not in said


def test_parts_together_read_every_file_once(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = checksums.sum_file
    monkeypatch.setattr(checksums, "sum_file", lambda path: read.append(Path(path).name) or original(path))
    for part in range(3):
        check(saved, part=part, parts=3)
    assert sorted(read) == sorted(Path(name).name for name in (*FILES, store.METADATA))


def test_no_manifest_is_an_older_checkpoint(tmp_path: Path) -> None:
    assert checksums.read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"algorithm": "md5", "files": {}, "own": ""}', '{"files": {"a": 1}}']
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / checksums.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"checksums\.json is damaged"):
        checksums.read_manifest(tmp_path)


def test_a_file_that_lost_bytes_before_the_commit_is_refused(tmp_path: Path) -> None:
    with checksums.SummingWriter(tmp_path / "a") as stream:
        stream.write(b"12345")
    (tmp_path / "a").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="3 bytes after 5 were written"):
        checksums.write_manifest(tmp_path, {"a": stream.sum}, {})


def test_torch_writes_through_the_summing_file_in_order(tmp_path: Path) -> None:
    """Were torch's archive writer to seek back, the sum would not be the file's."""
    with checksums.SummingWriter(tmp_path / "t") as stream:
        for size in (3, 100_000):
            torch.save(torch.arange(size), stream)
    assert stream.sum == checksums.sum_file(tmp_path / "t")
