"""``training_data.json`` of an export: written, read back, and refused when it is anything else."""

import json
import os

import pytest

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.record import RECORD, TrainingData, names_recorded_data, require_files
from phd_megatron.errors import UserError


def make_run(*path, **fields):
    run = RunConfig()
    run.model.seq_length = 48
    run.data.data_path = [str(word) for word in path]
    for name, value in fields.items():
        setattr(run.data, name, value)
    return run


@pytest.fixture
def prefix(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x" * 10)
    (tmp_path / "a.idx").write_bytes(b"x" * 7)
    return tmp_path / "a"


def test_what_is_written_is_read(tmp_path, prefix):
    run = make_run("0.3", prefix, "0.7", "gone/b", split="8,1,1", eod_mask_loss=True)
    record = TrainingData.of_run(run)
    record.write(tmp_path)
    found = TrainingData.read(tmp_path)
    assert found == record and found.sizes == {str(prefix): [10, 7]}, "what is not there has no size"
    other = RunConfig()
    found.put_into(other)
    assert other.data == run.data and other.model.seq_length == 48


def test_a_run_without_data_has_no_record(tmp_path):
    assert TrainingData.of_run(RunConfig()) is None
    assert TrainingData.read(tmp_path) is None


def test_data_that_changed_or_is_gone_is_refused(tmp_path, prefix):
    run = make_run(prefix)
    record = TrainingData.of_run(run)
    record.check_unchanged(run, "valid")
    require_files(tmp_path, run, "valid")
    prefix.with_suffix(".bin").write_bytes(b"x" * 11)
    with pytest.raises(UserError, match=r"have \[11, 7\] bytes, and had \[10, 7\].*--data-path"):
        record.check_unchanged(run, "valid")
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=r"validation split from .*cannot be read; bring them back.*--data-path"):
        require_files(tmp_path, run, "valid")


def test_the_very_data_is_known_by_where_it_lies(tmp_path, prefix, monkeypatch):
    data = make_run(prefix, tmp_path / "b").data
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for words, expected in (
        (["a"], True),
        (["link/a", "./b"], True),
        (["2", "b", "1", "a"], True),
        (["c"], False),
        (["a", "c"], False),
    ):
        assert names_recorded_data(words, data) is expected, words
    assert not names_recorded_data(["a"], make_run(train_data_path=["a"], valid_data_path=["b"]).data)


GOOD = {
    **{"data_path": ["a"], "split": "9,1,0", "train_data_path": None, "valid_data_path": None, "test_data_path": None},
    **{"eod_mask_loss": False, "seq_length": 48, "files": {"a": [1, 2]}},
}
BAD = {
    "empty": b"",
    "cut short": json.dumps(GOOD).encode()[:-9],
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "long": b" " * (1 << 20) + json.dumps(GOOD).encode(),
    "a huge number": json.dumps(GOOD).replace("48", "9" * 5000).encode(),
    **{
        name: json.dumps(content).encode()
        for name, content in {
            "a field lacks": {key: value for key, value in GOOD.items() if key != "split"},
            "a field too many": {**GOOD, "more": 1},
            "data_path is text": {**GOOD, "data_path": "a"},
            "data_path holds numbers": {**GOOD, "data_path": [1]},
            "data_path is null": {**GOOD, "data_path": None},
            "no data": {**GOOD, "data_path": []},
            "two ways": {**GOOD, "train_data_path": ["a"]},
            "weights without pairs": {**GOOD, "data_path": ["0.5"]},
            "weight nan": {**GOOD, "data_path": ["nan", "a"]},
            "split of words": {**GOOD, "split": "a,b"},
            "split of nothing": {**GOOD, "split": "0,0,0"},
            "split is null": {**GOOD, "split": None},
            "length of zero": {**GOOD, "seq_length": 0},
            "length is text": {**GOOD, "seq_length": "many"},
            "length is null": {**GOOD, "seq_length": None},
            "mask is a number": {**GOOD, "eod_mask_loss": 3},
            "files is a list": {**GOOD, "files": [1]},
            "a file of one size": {**GOOD, "files": {"a": [1]}},
            "a file of text": {**GOOD, "files": {"a": ["1", "2"]}},
            "a surrogate": {**GOOD, "data_path": ["\ud800"]},
            "a NUL": {**GOOD, "data_path": ["a\0b"]},
            "an escape code": {**GOOD, "data_path": ["\033[2Ja"]},
            "a line end in files": {**GOOD, "files": {"a\nb": [1, 2]}},
        }.items()
    },
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused_by_name(tmp_path, name):
    (tmp_path / RECORD).write_bytes(BAD[name])
    with pytest.raises(UserError, match="is no record of training data") as refused:
        TrainingData.read(tmp_path)
    str(refused.value).encode()  # it can be printed
    assert "--data-path" in str(refused.value) and len(str(refused.value)) < 2000


def test_the_good_one_is_read(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps(GOOD))
    assert TrainingData.read(tmp_path).sizes == {"a": [1, 2]}


def test_a_directory_in_its_place_is_refused(tmp_path):
    (tmp_path / RECORD).mkdir()
    with pytest.raises(UserError, match="is no record of training data"):
        TrainingData.read(tmp_path)


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / RECORD)
    with pytest.raises(UserError, match=r"is no record of training data.*a pipe"):
        TrainingData.read(tmp_path)
