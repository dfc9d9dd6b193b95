"""Reading sequences while a run trains: cut, overwritten, touched and replaced files, ids, damaged caches."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from phd_megatron.data import open_file, token_files
from phd_megatron.data.indexed import IndexedWriter, check_indexed
from phd_megatron.data.loader import SampleStream
from phd_megatron.data.open_file import FileArray, OpenFile, open_npy, spread
from phd_megatron.data.token_files import TokenFiles
from phd_megatron.data.verify import verify
from phd_megatron.errors import UserError

LENGTHS = [5, 0, 7, 1, 300]


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(token_files, "SECONDS_BETWEEN_LOOKS", 0.0)
    with IndexedWriter(tmp_path, np.uint16) as writer:
        writer.add(np.arange(313), np.array(LENGTHS), np.array([1, 2, 2, 5]))
        writer.finish()
    return tmp_path / "data"


def open_files(prefix: Path, vocab_size: int = 313) -> TokenFiles:
    return TokenFiles(check_indexed(str(prefix)), vocab_size)


def test_sequences_are_megatrons(prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = open_files(prefix), IndexedDataset(str(prefix))
    assert len(ours) == len(theirs) == 5
    for index, length in enumerate(LENGTHS):
        for offset in range(length):
            assert ours.get(index, offset).tolist() == theirs.get(index, offset).tolist()
            assert ours.get(index, offset, 1).tolist() == theirs.get(index, offset, 1).tolist()
        assert ours.get(np.int64(index)).dtype == np.uint16
    with ours.lengths_in_memory():
        assert ours.sequence_lengths.tolist() == LENGTHS and ours.sequence_lengths.dtype == np.int32
    assert pickle.loads(pickle.dumps(ours)).get(2).tolist() == ours.get(2).tolist()


def test_an_index_written_by_hand_is_read_where_it_says(tmp_path: Path) -> None:
    """Three sequences of int32, in two documents; the layout is Megatron's, byte for byte."""
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index = header + struct.pack("<3i", 2, 4, 1) + struct.pack("<3q", 0, 8, 24) + struct.pack("<3q", 0, 1, 3)
    (tmp_path / "data.idx").write_bytes(index)
    (tmp_path / "data.bin").write_bytes(struct.pack("<7i", 10, 11, 20, 21, 22, 23, 30))
    info = check_indexed(str(tmp_path / "data"))
    assert (info.documents, info.tokens, info.tokens_of(range(1, 3))) == (2, 7, 5)
    read = (info.lengths.read().tolist(), info.pointers.read().tolist(), info.marks.read().tolist())
    assert read == ([2, 4, 1], [0, 8, 24], [0, 1, 3])
    files = TokenFiles(info, 31)
    assert [files.get(number).tolist() for number in range(3)] == [[10, 11], [20, 21, 22, 23], [30]]
    assert files.get(1, 1).tolist() == [21, 22, 23] and files.get(1, 2, 1).tolist() == [22]
    with pytest.raises(UserError, match="30"):
        TokenFiles(info, 30).get(2)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_cut_and_longer_files(prefix: Path, suffix: str) -> None:
    path = Path(f"{prefix}{suffix}")
    for size in (0, 40, path.stat().st_size - 2):
        content, files = path.read_bytes(), open_files(prefix)
        os.truncate(path, size)
        with pytest.raises(UserError, match=f"{suffix} was cut while .* has {size} bytes, and had {len(content)}"):
            files.get(4)
        path.write_bytes(content)
    files = open_files(prefix)
    with path.open("ab") as stream:
        stream.write(b"xx")
    with pytest.raises(UserError, match=f"{suffix} was made longer while"):
        files.get(0)


def test_a_cut_is_met_between_two_looks_too(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SECONDS_BETWEEN_LOOKS", 3600.0)
    files = open_files(prefix)
    assert len(files.get(4)) == 300
    os.truncate(f"{prefix}.bin", 100)
    assert files.get(0).tolist() == [0, 1, 2, 3, 4]  # it is there
    with pytest.raises(UserError, match="was cut while"):
        files.get(4)
    os.truncate(f"{prefix}.idx", 40)
    with pytest.raises(UserError, match="idx was cut while"):
        files.get(3)


def test_other_content_in_as_many_bytes(prefix: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = open_files(prefix)
    os.utime(f"{prefix}.bin", ns=(1, 1))
    with caplog.at_level(logging.WARNING):
        assert len(files.get(2)) == 7 and len(files.get(2)) == 7
    assert caplog.text.count("got a new time") == 1
    np.memmap(f"{prefix}.bin", np.uint16, "r+")[:] = 1
    os.utime(f"{prefix}.bin", ns=(2, 2))
    with pytest.raises(UserError, match=r"bin was overwritten with other content.*bring the data back"):
        files.get(2)


def test_data_that_is_replaced_or_removed_is_read_to_the_end(prefix: Path) -> None:
    """By another file under the name: the run has the old one open."""
    files = open_files(prefix)
    assert len(files.get(4)) == 300
    for suffix in (".bin", ".idx"):
        Path(f"{prefix}{suffix}.new").write_bytes(b"something else")
        os.replace(f"{prefix}{suffix}.new", f"{prefix}{suffix}")
    assert files.get(4).tolist() == list(range(13, 313))
    with pytest.raises(UserError, match="was replaced while"):
        pickle.loads(pickle.dumps(files)).get(4)  # as a worker that is no fork would
    for suffix in (".bin", ".idx"):
        os.unlink(f"{prefix}{suffix}")
    assert files.get(4).tolist() == list(range(13, 313))


def test_ids_and_indices_are_checked_where_they_are_read(prefix: Path) -> None:
    files = open_files(prefix, 300)
    assert len(files.get(4, 0, 287)) == 287
    with pytest.raises(UserError, match=r"token id 300 \(300 at token 300 of 313\).*only 300 tokens"):
        files.get(4)
    for offset, length in ((1, 7), (8, None), (0, 400), (-1, 2)):
        with pytest.raises(UserError, match=r"asks for tokens .* of sequence 2 .*index cache .* is damaged; delete it"):
            files.get(2, offset, length)


def test_ids_that_a_start_did_not_look_at(tmp_path: Path) -> None:
    """Of a file of more than 8 MiB a start looks at parts."""
    count = 8 << 20
    with IndexedWriter(tmp_path, np.uint16) as writer:
        tokens = np.ones(count, np.uint16)
        tokens[100_000] = 7  # between two parts
        writer.add(tokens, np.array([count]), np.array([1]))
        writer.finish()
    info = check_indexed(str(tmp_path / "data"))
    verify(info, 5)
    with pytest.raises(UserError, match=r"token id 7 \(7 at token 100000 of 8388608\)"):
        TokenFiles(info, 5).get(0, 99_000, 2000)
    with (tmp_path / "data.bin").open("r+b") as stream:
        stream.seek(2 * (count - 3))
        stream.write(np.array([8], np.uint16).tobytes())
    with pytest.raises(UserError, match=r"token id 8 \(8 at token 8388605 of 8388608\)"):
        verify(check_indexed(str(tmp_path / "data")), 5)


def test_a_refusal_of_a_worker_is_the_message_alone(prefix: Path) -> None:
    import torch

    class Samples(torch.utils.data.Dataset):
        files = open_files(prefix)

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens = torch.from_numpy(self.files.get(4, index, 4).astype(np.int64))
            return {key: tokens for key in ("tokens", "labels", "loss_mask", "position_ids")}

    os.truncate(f"{prefix}.bin", 0)
    for workers in (0, 2):
        with pytest.raises(UserError) as caught:
            next(SampleStream(Samples(), 2, num_workers=workers).microbatches(0, 1))
        assert str(caught.value).startswith(f"{prefix}.bin was cut") and "Traceback" not in str(caught.value)


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_file, "_most_open", lambda: 3)
    files = []
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 4)
        files.append(OpenFile(tmp_path / str(number)))
    for _ in range(2):
        assert [file.read(2, 1) for file in files] == [bytes([number]) * 2 for number in range(10)]
    assert sum(file._descriptor >= 0 for file in files) <= 3
    (tmp_path / "new").write_bytes(b"aaaa")
    os.replace(tmp_path / "new", tmp_path / "0")
    with pytest.raises(UserError, match="0 was replaced while"):
        files[0].read(1, 0)


def test_pipes_and_missing_files_are_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.idx")
    os.mkfifo(tmp_path / "data.bin")
    with pytest.raises(UserError, match="not found"):
        check_indexed(str(tmp_path / "data"))
    with pytest.raises(UserError, match="cannot be read"):
        OpenFile(tmp_path / "none")


@pytest.mark.parametrize("shape", [(7,), (7, 2), (0,), (1,)])
def test_arrays_in_files(tmp_path: Path, shape: tuple[int, ...]) -> None:
    expected = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    np.save(tmp_path / "a.npy", expected)
    array = open_npy(tmp_path / "a.npy")
    assert isinstance(array, FileArray) and (array.shape, array.ndim, array.dtype) == (shape, len(shape), np.int32)
    assert np.array_equal(array.read(), expected)
    assert np.array_equal(np.concatenate([*array.chunks(rows=2), expected[:0]]), expected)
    assert np.array_equal(array.read(1, 3), expected[1:3])
    assert all(np.array_equal(array[i], expected[i]) for i in range(-len(expected), len(expected)))
    with pytest.raises(IndexError):
        array[len(expected)]
    os.truncate(tmp_path / "a.npy", 100)
    with pytest.raises((ValueError, UserError)):
        open_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000, 4097, 1_000_003])
def test_spread_reaches_both_ends(size: int) -> None:
    parts = list(spread(size, 4, 16))
    assert parts[0][0] == 0 and parts[-1][1] == size
    assert all(begin % 16 == 0 and 0 <= begin <= end <= size for begin, end in parts)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(parts))
    assert len(parts) == (1 if size <= 64 else 4)


@pytest.mark.parametrize(("last", "refused"), [(2, True), (3, False), (4, True)])
def test_documents_count_all_sequences(tmp_path: Path, last: int, refused: bool) -> None:
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index = header + struct.pack("<3i", 2, 4, 1) + struct.pack("<3q", 0, 8, 24) + struct.pack("<3q", 0, 1, last)
    (tmp_path / "data.idx").write_bytes(index)
    (tmp_path / "data.bin").write_bytes(struct.pack("<7i", *range(7)))
    with pytest.raises(UserError, match="damaged") if refused else contextlib.nullcontext():
        verify(check_indexed(str(tmp_path / "data")), 31)


def test_an_index_of_no_document_is_refused(tmp_path: Path) -> None:
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 0)
    (tmp_path / "data.idx").write_bytes(header + struct.pack("<3i", 2, 4, 1) + struct.pack("<3q", 0, 8, 24))
    (tmp_path / "data.bin").write_bytes(struct.pack("<7i", *range(7)))
    with pytest.raises(UserError, match="of its document marks there is none, and the first should be 0"):
        verify(check_indexed(str(tmp_path / "data")), 31)
