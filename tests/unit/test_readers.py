"""Readers: every kind of file, exactness of pieces, refusals with file and line."""

import gzip
import json
import sys

import pytest

from phd_megatron.data import readers
from phd_megatron.data.inputs import find_files
from phd_megatron.data.readers import ReadReport, read_pieces
from phd_megatron.errors import UserError


def documents(inputs, report=None, **options):
    """Documents as strings, joined from their pieces."""
    result, open_text = [], None
    for piece in read_pieces(find_files(inputs), report or ReadReport(), **options):
        assert piece.first == (open_text is None)
        open_text = (open_text or "") + piece.text
        if piece.last:
            result.append(open_text)
            open_text = None
    assert open_text is None
    return result


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_directories_are_sorted_and_other_kinds_left_out(tmp_path):
    for name in ("b/2.txt", "b/10.md", "a.py", "z.bin", "c.txt", "b/a/x.txt"):
        write(tmp_path / name, name)
    assert documents([tmp_path]) == ["a.py", "c.txt", "b/10.md", "b/2.txt", "b/a/x.txt"]


def test_json_lines_plain_and_compressed(tmp_path):
    lines = [{"text": "one", "n": 1}, {"text": "zwei\nZeilen ü"}, {"text": ""}, {"text": None}]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    write(tmp_path / "a.jsonl", text)
    write(tmp_path / "b.jsonl.gz", gzip.compress(text.encode()))
    write(tmp_path / "c.json.gz", gzip.compress(text.encode()))
    expected = ["one", "zwei\nZeilen ü", "", ""]
    report = ReadReport()
    assert documents([tmp_path], report) == expected * 3
    assert report.bytes_read == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert documents([write(tmp_path / "d.jsonl", '{"body": "x"}')], json_key="body") == ["x"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", None, "ü\n"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert documents([tmp_path]) == ["a", "", "ü\n"]
    with pytest.raises(UserError, match="no column 'body'"):
        documents([tmp_path], json_key="body")
    with pytest.raises(UserError, match="not a string"):
        documents([tmp_path], json_key="n")
    with pytest.raises(UserError, match="Parquet"):
        documents([write(tmp_path / "b.parquet", b"PAR1 nonsense")])


def test_parquet_without_pyarrow_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        documents([write(tmp_path / "a.parquet", b"")])


@pytest.mark.parametrize("filler", ["word ü\r\n", "x", "no newline 漢 ", "\n\n\n", "a\n b\n"])
def test_long_files_are_exact_in_pieces(tmp_path, monkeypatch, filler):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(readers, "_READ_BYTES", 37)
    monkeypatch.setattr(readers, "_ONE_GO_BYTES", 10)
    for size in (99, 100, 149, 151, 200, 1000, 1001):
        text = (filler * size)[:size]
        path = write(tmp_path / "long.txt", text)
        assert documents([path]) == [text]
        pieces = list(read_pieces([path], ReadReport()))
        assert all(0 < len(piece.text) <= 150 for piece in pieces)
        monkeypatch.setattr(readers, "_READ_BYTES", 1 << 20)
        monkeypatch.setattr(readers, "_ONE_GO_BYTES", 1 << 20)
        assert pieces == list(read_pieces([path], ReadReport()))  # however it is read
        monkeypatch.setattr(readers, "_READ_BYTES", 37)
        monkeypatch.setattr(readers, "_ONE_GO_BYTES", 10)


def test_pieces_end_after_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 100)
    path = write(tmp_path / "lines.txt", "".join(f"line {i} of the text\n" for i in range(100)))
    assert all(piece.text.endswith("\n") for piece in read_pieces([path], ReadReport()))


def test_python_source_honours_its_coding_line(tmp_path):
    latin = "# -*- coding: latin-1 -*-\nname = 'é'\n"
    write(tmp_path / "a.py", latin.encode("latin-1"))
    write(tmp_path / "b.py", b"\xef\xbb\xbfx = 1\r\n")
    write(tmp_path / "c.txt", b"\xef\xbb\xbfwords")
    assert documents([tmp_path]) == [latin, "x = 1\r\n", "words"]


BAD = {
    "utf8.py": b"x = '\xff'\n",
    "unknown.py": b"# coding: klingon\n",
    "rot.py": b"# coding: rot13\nk = 1\n",
    "text.txt": b"good \xe9t\xe9",
    "cut.md": "ü".encode()[:1],
}


@pytest.mark.parametrize("name", BAD)
def test_undecodable_fails_by_default(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}.*--on-decode-error skip"):
        documents([write(tmp_path / name, BAD[name])])


@pytest.mark.parametrize("one_go", [1 << 20, 0])
def test_skip_lists_every_file_and_emits_none_of_it(tmp_path, monkeypatch, one_go):
    monkeypatch.setattr(readers, "_ONE_GO_BYTES", one_go)
    monkeypatch.setattr(readers, "_READ_BYTES", 64)
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 50)
    for name, data in BAD.items():
        write(tmp_path / name, data)
    write(tmp_path / "late.txt", b"fine " * 200 + b"\xff")
    write(tmp_path / "good.txt", "kept")
    write(tmp_path / "mixed.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "b"}\n')
    report = ReadReport()
    assert documents([tmp_path], report, on_decode_error="skip") == ["kept", "a", "b"]
    skipped = {entry["file"].rsplit("/", 1)[1]: entry for entry in report.skipped}
    assert sorted(skipped) == sorted([*BAD, "late.txt", "mixed.jsonl"])
    assert skipped["mixed.jsonl"]["lines"] == 2
    assert "byte 1000" in skipped["late.txt"]["reason"] or "byte" in skipped["late.txt"]["reason"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "malformed JSON"),
        (b"[1, 2]", "not an object"),
        (b'{"body": "a"}', "no key 'text'.*'body'.*--json-key"),
        (b'{"text": 3}', "not a string"),
        (b'{"text": "\xff"}', "not utf-8"),
        (b'{"text": "\\udfff"}', "surrogate"),
        (b"[" * 100000, "malformed JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}"):
        documents([path])


def test_damaged_gzip_is_named(tmp_path):
    data = gzip.compress(b'{"text": "a long enough line"}\n' * 1000)
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: damaged"):
        documents([write(tmp_path / "cut.jsonl.gz", data[:-20])])
    with pytest.raises(UserError, match=r"not\.jsonl\.gz: damaged"):
        documents([write(tmp_path / "not.jsonl.gz", b"no gzip at all")])


def test_bad_inputs(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_files([tmp_path / "nothing"])
    with pytest.raises(UserError, match="unknown kind"):
        find_files([write(tmp_path / "x.pdf", "x")])
    with pytest.raises(UserError, match="empty corpus"):
        find_files([tmp_path])


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.parquet"])
def test_a_file_that_is_gone_when_its_turn_comes_is_named(tmp_path, name):
    write(tmp_path / name, "{}")
    files = find_files([tmp_path / name])
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(No such file.*check the file and its rights"):
        list(read_pieces(files, ReadReport()))
