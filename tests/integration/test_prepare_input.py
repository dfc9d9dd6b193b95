"""``prepare`` on input of every kind that cannot be used: one message, exit code 2, nothing written, no wait."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phd_megatron.cli.main import main
from phd_megatron.data import json_lines, readers

from .conftest import ROOT, program_environment

Make = Callable[[Path], object]


def prepare(source: object, prefix: Path, *more: object) -> list[str]:
    words = source if isinstance(source, list) else [source]
    argv = ["prepare", "--input", *words, "--output-prefix", prefix, "--workers", 1, "--no-progress", *more]
    return [str(word) for word in argv]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], prefix: Path, *words: str) -> str:
    capsys.readouterr()
    code = main(argv)
    out, err = capsys.readouterr()
    assert code == 2, f"{code}\n{out}\n{err}"
    assert err.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err, err
    assert len(err) < 1500, len(err)
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    assert not [*prefix.parent.glob(f"{prefix.name}*")], "nothing half-written"
    return err


def file(name: str, content: bytes | str) -> Make:
    def make(directory: Path) -> Path:
        path = directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def fifo(directory: Path) -> Path:
    os.mkfifo(directory / "pipe.txt")
    return directory / "pipe.txt"


def listening(directory: Path) -> Path:
    before = Path.cwd()
    os.chdir(directory)  # a socket's path may have 108 characters
    try:
        socket.socket(socket.AF_UNIX).bind("s.jsonl")
    finally:
        os.chdir(before)
    return directory / "s.jsonl"


def link(name: str, target: object) -> Make:
    def make(directory: Path) -> Path:
        (directory / name).symlink_to(str(target))
        return directory / name

    return make


def folder_of_pictures(directory: Path) -> Path:
    (directory / "folder.txt").mkdir()
    (directory / "folder.txt" / "a.png").write_bytes(b"\x89PNG")
    return directory / "folder.txt"


GZIP = gzip.compress(b'{"text": "a long enough line"}\n' * 500)
DIGITS = "7" * 5000
CASES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "fifo": (fifo, ("pipe.txt' is a pipe (fifo)", "no regular file", "save what comes out of it")),
    "socket": (listening, ("s.jsonl' is a socket", "no regular file")),
    "device": (link("zero.txt", "/dev/zero"), ("zero.txt' is a character device", "no regular file")),
    "link to nothing": (link("x.txt", "nowhere"), ("x.txt' does not exist, the link points to nothing", "check")),
    "link to itself": (link("x.txt", "x.txt"), ("x.txt' cannot be read", "check the path")),
    "missing": (lambda d: d / "none.txt", ("none.txt' does not exist", "check the path")),
    "empty name": (lambda d: "", ("--input '' is empty", "variable", "give a value")),
    "name too long": (lambda d: d / ("x" * 300 + ".txt"), ("cannot be read", "too long", "check the path")),
    "name with a NUL": (lambda d: f"{d}/a\0b.txt", ("cannot be read", "null", "check the path")),
    "below a file": (lambda d: file("f.txt", "x")(d) / "a.txt", ("cannot be read", "directory", "check the path")),  # type: ignore[operator]
    "folder without text": (folder_of_pictures, ("empty corpus", "no file of a supported kind", ".jsonl")),
    "unknown kind": (file("a.png", b"\x89PNG"), ("a.png' is of an unknown kind", "supported are .txt")),
    "no suffix": (file("README", "text"), ("README' is of an unknown kind", "supported are .txt")),
    "empty text": (file("a.txt", b""), ("empty corpus", "1 empty documents", "check --input")),
    "only a mark": (file("a.txt", codecs.BOM_UTF8), ("empty corpus", "1 empty documents", "check --input")),
    "half a mark": (file("a.txt", codecs.BOM_UTF8[:2]), ("a.txt is not utf-8", "--on-decode-error skip")),
    "empty json lines": (file("a.jsonl", b"\n\n"), ("empty corpus", "check --input and --json-key")),
    "empty gzip": (file("a.jsonl.gz", b""), ("empty corpus", "check --input")),
    "latin-1": (file("a.txt", b"na\xefve"), ("a.txt is not utf-8 near byte 2", "convert", "--on-decode-error skip")),
    "utf-16": (file("a.txt", "text".encode("utf-16")), ("a.txt is not utf-8", "it begins as UTF-16 does", "convert")),
    "utf-16 without a mark": (file("a.md", "text".encode("utf-16-le")), ("a.md is no text", "UTF-16", "NUL", "byte 1")),
    "binary": (file("a.txt", bytes(range(256))), ("a.txt is", "byte", "convert", "--on-decode-error skip")),
    "NUL bytes": (file("a.txt", b"some text\0more"), ("a.txt is no text but binary", "NUL byte (near byte 9)", "skip")),
    "NUL bytes in source": (file("a.py", b"x = 1\0\n"), ("a.py is", "--on-decode-error skip")),
    "executable": (file("a.py", Path(sys.executable).resolve().read_bytes()[:4096]), ("a.py is", "convert")),
    "gzip cut": (file("a.jsonl.gz", GZIP[:-20]), ("a.jsonl.gz: damaged after line", "copy or download the file again")),
    "gzip that is none": (file("a.json.gz", b"no gzip"), ("a.json.gz: damaged after line 0", "again")),
    "gzip with a bad sum": (file("a.json.gz", GZIP[:-8] + b"12345678"), ("a.json.gz: damaged after line", "again")),
    "gzip with a bad byte": (file("a.json.gz", GZIP[:40] + b"\xff" + GZIP[41:]), ("a.json.gz: damaged", "again")),
    "gzip with an end of its own": (file("a.json.gz", GZIP + b"garbage"), ("a.json.gz: damaged after line", "again")),
    "parquet": (file("a.parquet", b"PAR1"), ("a.parquet", "arquet")),
    "broken json": (file("a.jsonl", '{"text": "a"}\n{"text": '), ("a.jsonl:2: malformed JSON", "correct or remove")),
    "two objects": (file("a.jsonl", '{"text": "a"} {"text": "b"}'), ("a.jsonl:1: malformed JSON", "one JSON object")),
    "pretty json": (file("a.jsonl", json.dumps({"text": "a"}, indent=1)), ("a.jsonl:1: malformed", "one JSON object")),
    "array": (file("a.jsonl", '["text"]'), ("a.jsonl:1: a JSON array, not an object", "every line")),
    "number": (file("a.jsonl", DIGITS), ("a.jsonl:1: a JSON number, not an object",)),
    "NUL in json": (file("a.jsonl", b'{"text": "a\0b"}'), ("a.jsonl:1: malformed JSON", "control character")),
    "arrays in arrays": (file("a.jsonl", '{"text": ' + "[" * 100_000), ("a.jsonl:1: malformed JSON", "recursion")),
    "objects in objects": (file("a.jsonl", '{"text": "a", "b": ' + '{"a":' * 100_000), ("a.jsonl:1: malformed JSON",)),
    "nesting that is closed": (file("a.jsonl", '{"text":' + "[" * 90_000 + "]" * 90_000 + "}"), ("a.jsonl:1: malf",)),
    "key twice": (file("a.jsonl", '{"text": "a", "text": "b"}'), ("a.jsonl:1: the key 'text' is there", "keep one")),
    "key twice in disguise": (file("a.jsonl", '{"text": "a", "te\\u0078t": "b"}'), ("'text' is there more than once",)),
    "text is a number": (file("a.jsonl", '{"text": 7}'), ("a.jsonl:1: 'text' is number, not a string", "--json-key")),
    "text is a long number": (file("a.jsonl", f'{{"text": {DIGITS}}}'), ("'text' is number, not a string",)),
    "text is a list": (file("a.jsonl", '{"text": ["a"]}'), ("'text' is array, not a string", "--json-key")),
    "text is true": (file("a.jsonl", '{"text": true}'), ("'text' is boolean, not a string", "--json-key")),
    "text is an object": (file("a.jsonl", '{"text": {"text": "a"}}'), ("'text' is object, not a string", "--json-key")),
    "no such key": (file("a.jsonl", '{"body": "a"}'), ("a.jsonl:1: no key 'text' (its keys: 'body')", "--json-key")),
    "thousands of keys": (
        file("a.jsonl", json.dumps({f"{i}" * 99: 1 for i in range(9000)})), ("no key 'text'", "and 8992 more")
    ),
    "half a pair": (file("a.jsonl", '{"text": "\\ud800"}'), ("a.jsonl:1: half a surrogate pair", "skip")),
    "latin-1 in json": (file("a.jsonl", b'{"text": "\xe9"}'), ("a.jsonl:1: not utf-8", "correct the line", "skip")),
    "utf-16 json": (file("a.jsonl", '{"text": "a"}'.encode("utf-16")), ("a.jsonl:1: not utf-8", "skip")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_input_that_cannot_be_used(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = CASES[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    refused(prepare(make(tmp_path / "in"), tmp_path / "out" / "d"), capsys, tmp_path / "out" / "d", *said)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--workers", "0"], ("--workers 0", "at least one process", "use 1 or more")),
        (["--workers", "-1"], ("--workers -1", "at least one process", "use 1 or more")),
        (["--workers", "100000"], ("--workers 100000", "each is a process", "cores", "at most")),
        (["--workers", "9" * 5000], ("--workers '999", "no number of processes", "for example 4")),
        (["--workers", "two"], ("--workers 'two'", "no number", "for example 4")),
        (["--workers", "1.5"], ("--workers '1.5'", "no number", "for example 4")),
        (["--workers", ""], ("--workers ''", "no number", "for example 4")),
        (["--tokenizer", ""], ("--tokenizer '' is empty", "variable", "give a value")),
        (["--tokenizer", "bpe:0"], ("'bpe:0'", "at least 257", "bpe:4096")),
        (["--tokenizer", "bpe:99999999999"], ("'bpe:99999999999'", "at most 1000000", "bpe:4096")),
        (["--tokenizer", "bpe:" + "9" * 5000], ("'bpe:9999", "at most 1000000", "bpe:4096")),
        (["--tokenizer", "nowhere"], ("'nowhere'", "neither 'byte' nor an existing directory")),
    ],
)
def test_flags_that_cannot_be_used(
    more: list[str], said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    refused(prepare(tmp_path / "a.txt", tmp_path / "d", *more), capsys, tmp_path / "d", *said)


def test_lines_and_texts_without_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LARGEST_TEXT", 1 << 20)
    out = tmp_path / "d"
    line = b'{"text": "' + b"x" * (1 << 20) + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line)
    said = ("has more than 1048576 bytes", "one document a line")
    refused(prepare(tmp_path / "a.jsonl", out), capsys, out, "a.jsonl:2", *said)
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(bytes(50 << 20)))
    refused(prepare(tmp_path / "bomb.json.gz", out), capsys, out, "bomb.json.gz:1", *said)
    assert main(prepare(tmp_path / "a.jsonl", tmp_path / "t", "--json-key", "none")) == 2  # its tokenizer is next
    (tmp_path / "big.txt").write_bytes(b"\n\n" * (1 << 20))
    argv = prepare(tmp_path / "big.txt", out, "--tokenizer", "bpe:300")
    refused(argv, capsys, out, "big.txt: ", "characters without a place", "shorter files")
    assert main(prepare(tmp_path / "big.txt", out)) == 0  # bytes can be cut anywhere


def read(prefix: Path) -> list[str]:
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    return bytes(np.where(tokens == 256, 10, tokens).astype(np.uint8)).decode().split("\n")[:-1]


def test_marks_of_byte_order_are_no_text(tmp_path: Path) -> None:
    mark = codecs.BOM_UTF8
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    (tmp_path / "b.md").write_bytes(mark + "zwei \ufeff".encode())
    (tmp_path / "c.py").write_bytes(mark + b"3")
    (tmp_path / "d.jsonl").write_bytes(mark + b'{"text": "four"}\n' + mark + b'{"text": "five"}')
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(mark + b'{"text": "six"}\n'))
    out = tmp_path / "out"
    assert main(prepare(tmp_path, out)) == 0
    assert read(out) == ["one", "zwei \ufeff", "3", "four", "five", "six"]


def test_marks_are_dropped_from_what_a_tokenizer_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a file that is read in parts, where the first may be shorter than the mark."""
    text = "the same text again, and again the same\n" * 300
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    (tmp_path / "b.txt").write_bytes(text.encode())
    monkeypatch.setattr(readers, "_ONE_GO_BYTES", 0)
    monkeypatch.setattr(readers, "_READ_BYTES", 2)
    for name in "ab":
        assert main(prepare(tmp_path / f"{name}.txt", tmp_path / name, "--tokenizer", "bpe:280")) == 0
    for suffix in ("bin", "idx", "tokenizer/tokenizer.json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_what_looks_odd_but_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f'{{"text": "one", "n": {DIGITS}, "x": 1e999, "y": NaN}}',
        '{"text": "two", "meta": {"text": "other", "a": 1, "a": 2}}',
        '{"n": 1, "n": 2, "text": "a \\"text\\": b"}',
        '  {"text": "four"}  \r',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert main(prepare(tmp_path / "a.jsonl", tmp_path / "out")) == 0
    assert read(tmp_path / "out") == ["one", "two", 'a "text": b', "four"]
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    os.mkfifo(folder / "pipe.txt")  # in a directory only regular files are looked for
    assert main(prepare(folder, tmp_path / "out2")) == 0
    assert read(tmp_path / "out2") == ["text"]


def test_text_that_is_left_out_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    file("a.txt", b"good")(tmp_path / "in")
    file("b.txt", b"a\0b")(tmp_path / "in")
    file("c.txt", b"\xff")(tmp_path / "in")
    assert main(prepare(tmp_path / "in", tmp_path / "out", "--on-decode-error", "skip")) == 0
    error = capsys.readouterr().err
    assert "b.txt: no text but binary" in error and "c.txt: not utf-8" in error
    assert read(tmp_path / "out") == ["good"]


def test_directory_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "locked").mkdir(parents=True)
    file("a.txt", b"good")(tmp_path / "in")
    if os.geteuid() == 0:  # root may read everything
        real = os.scandir

        def scandir(path: str) -> object:
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
    else:
        (tmp_path / "in" / "locked").chmod(0)
    said = ("locked' cannot be read (Permission denied)", "would be left out", "check its rights")
    refused(prepare(tmp_path / "in", tmp_path / "out"), capsys, tmp_path / "out", *said)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_grow(workers: int, tmp_path: Path) -> None:
    """A limit of the process on the size of a file stops a write as a full disk does."""
    (tmp_path / "a.txt").write_text("text and more of it\n" * 20_000)
    out = tmp_path / "out" / "d"
    argv = [*prepare(tmp_path / "a.txt", out), "--workers", str(workers)]
    done = subprocess.run(
        [sys.executable, "-m", "phd_megatron", *argv],
        cwd=ROOT,
        env=program_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and str(out) in done.stderr and "too large" in done.stderr
    assert not [*out.parent.glob("d*")]


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        (tmp_path / "a.txt").write_text("text and more of it\n" * 20_000)
        said = ("no space left", str(disk / "d"), "free some space", "--output-prefix", "nothing was left behind")
        refused(prepare(tmp_path / "a.txt", disk / "d"), capsys, disk / "d", *said)
        refused(prepare(tmp_path / "a.txt", disk / "d", "--tokenizer", "bpe:300"), capsys, disk / "d", *said)
        (tmp_path / "b.txt").write_text("short")
        assert main(prepare(tmp_path / "b.txt", disk / "d")) == 0
        before = {path.name: path.read_bytes() for path in disk.iterdir() if path.is_file()}
        assert main(prepare(tmp_path / "a.txt", disk / "d", "--overwrite")) == 2
        assert {path.name: path.read_bytes() for path in disk.iterdir() if path.is_file()} == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_output_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert main(prepare(tmp_path / "a.txt", tmp_path / "d")) == 0
    capsys.readouterr()
    before = (tmp_path / "d.bin").stat().st_mtime_ns
    assert main(prepare(tmp_path / "a.txt", tmp_path / "d")) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'd.bin'} and" in error and "already exist" in error and "--overwrite" in error
    assert (tmp_path / "d.bin").stat().st_mtime_ns == before


def test_many_workers_for_little_text(tmp_path: Path) -> None:
    """Processes are started as there is work for them."""
    (tmp_path / "a.txt").write_text("text")
    assert main([*prepare(tmp_path / "a.txt", tmp_path / "d"), "--workers", "200"]) == 0
    assert read(tmp_path / "d") == ["text"]


def test_python_without_a_limit_of_digits_is_not_needed() -> None:
    assert json_lines.parse_line(f'{{"text": "a", "n": -{DIGITS}}}'.encode(), "here", "text") == "a"
