"""Input of ``prepare`` in files of many documents, and data sets that ``prepare merge`` and ``inspect`` do not take."""

from __future__ import annotations

import gzip
import io
import tarfile

from .rows import DIRECTORY, FIFO, Content, Link, Row
from .rows_files import TEXT, prepare

#: ten letters as Zstandard has them
ZSTD = b"\x28\xb5\x2f\xfd\x20\x0a\x51\x00\x00xxxxxxxxxx"


def _tar(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def of(name: str, content: Content, *said: str, more: str = "", title: str = "") -> Row:
    """One file as input."""
    return prepare(f"--input {name} {more}", name, *said, files={name: content}, name=title)


def saved(name: str, content: str, *said: str) -> Row:
    """A directory like those of Hugging Face's data sets."""
    return prepare("--input d", *said, files={f"d/{name}": content}, name=f"d/{name} {content}")


def merge(words: str, *said: str, files: dict[str, Content] | None = None) -> Row:
    return Row(f"prepare merge {words}", said, files=files or {})


def inspect(words: str, *said: str, files: dict[str, Content] | None = None) -> Row:
    return Row(f"prepare inspect {words}", said, files=files or {})


KINDS = [
    of("a.jsonl.zst", "no zstd", "damaged after line 0", "again"),
    of("cut.jsonl.zst", ZSTD[:-3], "damaged after line 0", "inside of a frame", "again"),
    of("a.txt.zst", ZSTD[:-3], "damaged", "inside of a frame", "again"),
    of("a.txt.gz", gzip.compress(b"text")[:-4], "damaged", "again"),
    of("a.md.gz", gzip.compress(b"\xff"), "is not utf-8", "--on-decode-error skip"),
    of("a.json", "[1]", "element 1", "number", "must be one object"),
    of("a.json", '[{"text": "a"}', "no end", "again", title="an array without an end"),
    of("a.json", "[{}, {}]", "element 1", "no key 'text'", "--json-key", title="an array without texts"),
    of("a.json", '{"x": {"y": 1}}', "no key 'x.z'", "--json-key", more="--json-key x.z"),
    of("a.json", '{"x": 1}', "'x' is number, not an object", "another", more="--json-key x.z", title="a key in 1"),
    of("a.csv", 'text\n"a', "a.csv:2", "unexpected end", "quotes"),
    of("a.csv", "text,n\na\n", "a.csv:2", "the header names 2", "quotes", title="a row that is short"),
    of("a.csv", "n\n1\n", "a.csv:1", "no column 'text'", "--json-key", title="no such column"),
    of("a.tsv", b"text\n\xff\n", "a.tsv:2", "not utf-8", "--on-decode-error skip"),
    of("a.csv", b"t\0e", "NUL byte", "convert the file", title="a binary .csv"),
    of("a.arrow", "x", "not a readable Arrow file", "write it again"),
    of("a.arrow", b"ARROW1\0\0", "not a readable Arrow file", "write it again", title="a cut file of Arrow's"),
    of("a.parquet", "x", "not a readable Parquet file", "write it again"),
    of("a.tar", "x", "damaged", "again"),
    of("a.tar", _tar("a.txt", b"text")[:600], "damaged", "again", title="a cut archive"),
    of("a.tar", _tar("a.jpg", b"x"), "'a' has no text", "its fields: jpg", "--json-key", title="no text in an archive"),
    of("a.tgz", "x", "damaged", "gzip", "again"),
    saved("state.json", '{"_data_files": [{"filename": "/x"}]}', "'/x'", "no name of a file", "save_to_disk"),
    saved("state.json", '{"_data_files": [{"filename": "x"}]}', "lists x", "not there"),
    saved("state.json", "[", "d/state.json", "save_to_disk"),
    saved("dataset_dict.json", '{"splits": 3}', "lists no names", "save_to_disk"),
    saved("dataset_dict.json", '{"splits": ["a", "b"]}', "splits a, b", "such as d/a"),
    saved("dataset_dict.json", '{"splits": ["a"]}', "d/a is no saved data set", "save_to_disk"),
    prepare("--input in.txt --json-key a --json-keys b", "--json-keys", "give one of them", files=TEXT),
    prepare("--input in.txt --json-keys", "--json-keys has no value", "write --json-keys VALUE", files=TEXT),
    prepare("--input in.txt --json-keys a a", "'a' is there twice", "different keys", files=TEXT),
    prepare("--input in.txt --json-keys ../a", "'../a'", "no part of a file's name", files=TEXT),
    prepare("--input in.txt --json-keys a b --tokenizer bpe:300", "of its own", "PREFIX.tokenizer", files=TEXT),
    Row("prepare marge --input a", ("'marge'", "merge, inspect, or --input")),
]

DATA_SETS = [
    merge("--input @data --output-prefix out", "one data set", "two or more"),
    merge("--input @data @data --output-prefix out", "is there twice", "once"),
    merge("--input @data none --output-prefix out", "none.bin", "correct --input"),
    merge("--input @data @data.bin --output-prefix out", "data.bin", "without .bin or .idx"),
    merge("--input @data x --output-prefix out", "x.idx", "header", files={"x.idx": "x" * 99, "x.bin": ""}),
    merge("--input @data p --output-prefix out", "p.idx", "not found", files={"p.idx": FIFO, "p.bin": FIFO}),
    merge("--input @data l --output-prefix out", "l.idx", "not found", files={"l.idx": Link("l.idx"), "l.bin": ""}),
    merge("--input @data --output-prefix @data --overwrite", "one data set", "two or more"),
    merge("--input @data none --output-prefix ''", "--output-prefix", "is empty"),
    merge("--input --output-prefix out", "--input has no value", "write --input VALUE"),
    merge("--output-prefix out", "--input not given", "it is needed"),
    merge("--input @data --workers 2", "unknown flag --workers", "--input"),
    inspect("none", "none.bin", "not found", "correct the prefix"),
    inspect("", "not given", "it is needed"),
    inspect("d", "d.bin", "not found", files={"d": DIRECTORY}),
    inspect("@data --samples -1", "--samples -1", "use 0 to"),
    inspect("@data --samples 9999999999", "--samples 9999999999", "use 0 to"),
    inspect("@data --samples many", "--samples 'many'", "an integer"),
    inspect("@data --tokenizer none", "'none'", "neither 'byte' nor"),
    inspect("@data --sample 3", "unknown flag --sample", "did you mean --samples?"),
]
