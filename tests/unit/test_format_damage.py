"""Files that are damaged, hostile or not what their key says: each is named, with the reason and the cure."""

import csv
import gzip
import io
import json
import sys

import pytest

from phd_megatron.data import readers
from phd_megatron.data.readers import ReadReport, read_pieces
from phd_megatron.errors import UserError

from .archives import tar

LINES = b"".join(b'{"text": "line %d of a text"}\n' % n for n in range(3000))
TABLE = "n,text\n" + "".join(f'{n},"line {n}, and\nmore"\n' for n in range(3000))


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


def ipc(column, *, stream=True, names=("text",)):
    pyarrow = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    batch = pyarrow.RecordBatch.from_arrays([column] * len(names), names=list(names))
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(out, batch.schema) as writer:
        for _ in range(4):
            writer.write_batch(batch)
    return out.getvalue()


def strings(texts, kind="string"):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.array(texts, getattr(pyarrow, kind)())


def parquet(data):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet as library

    out = io.BytesIO()
    library.write_table(pyarrow.table(data), out)
    return out.getvalue()


def put(path, data):
    path.write_bytes(data() if callable(data) else data)
    return path


def texts(path, report=None, **options):
    pieces = read_pieces([path], report or ReadReport(), **options)
    joined = [""]
    for piece in pieces:
        joined[-1] += piece.text
        if piece.last:
            joined.append("")
    return joined[:-1]


def swap(data, old, new):
    assert data.count(old) >= 1
    return data.replace(old, new, 1)


TAR = tar([(f"{n}.txt", b"some text " * 100) for n in range(30)])
ARRAY = b"[" + LINES.strip().replace(b"\n", b",\n") + b"]"

DAMAGED = {
    # cut, and packed wrongly
    "cut.jsonl.zst": (lambda: zstd(LINES)[:-9], r"damaged after line \d+ \(.*\); copy or download"),
    "frame.jsonl.zst": (lambda: zstd(LINES) + zstd(LINES)[:20], r"damaged after line 3000 \(it ends inside of a frame"),
    "byte.jsonl.zst": (lambda: zstd(LINES)[:60] + b"\xff" * 9 + zstd(LINES)[69:], "damaged after line"),
    "more.jsonl.zst": (lambda: zstd(LINES) + b"garbage", r"damaged after line 3000 \("),
    "none.jsonl.zst": (b"no zstd at all", "damaged after line 0"),
    "cut.txt.gz": (lambda: gzip.compress(LINES)[:-20], r"damaged \(Compressed file ended"),
    "cut.txt.zst": (lambda: zstd(LINES)[:-20], r"damaged \(it ends inside of a frame\); copy"),
    "none.md.zst": (b"no zstd at all", r"damaged \("),
    "cut.csv.gz": (lambda: gzip.compress(TABLE.encode())[:-40], r"damaged after line \d+ \(Compressed file ended"),
    "cut.tar.zst": (lambda: zstd(TAR)[:-20], "damaged after"),
    "cut.tar.gz": (lambda: gzip.compress(TAR)[:-20], "damaged after"),
    # arrays
    "cut.json": (ARRAY[:5000], r"damaged after element \d+ \(its array has no end\)"),
    "bracket.json": (ARRAY[:-1] + b"}", "element 3000 ends with a } too many"),
    "more.json": (ARRAY + b"\n[]", "more stands behind its array"),
    "comma.json": (ARRAY[:-1] + b",]", "element 3001: malformed JSON"),
    "nothing.json": (b'[,{"text": "a"}]', "element 1: malformed JSON"),
    "two.json": (b'[{"text": "a"} {"text": "b"}]', "element 1: malformed JSON"),
    "number.json": (b"[1, 2]", "element 1: a JSON number, not an object"),
    "nokey.json": (b'[{"text": "a"}, {"body": "b"}]', "element 2: no key 'text'.*'body'.*--json-key"),
    # tables
    "quote.csv": (b'text\n"no end\nof it\n', r":2: no well-formed row \(unexpected end of data\); put fields"),
    "after.csv": (b'text,n\n"a"b,1\n', ":2: no well-formed row"),
    "wide.csv": (b'n,text\n1,"a\nb"\n2,a, b\n', r":4: 3 fields in a row, but the header names 2; put fields"),
    "short.tsv": (b"n\ttext\n1\n", ":2: 1 fields in a row"),
    "nocolumn.csv": (b"id;text\n1;a\n", r":1: no column 'text' .*'id;text'.*--json-key"),
    "twice.csv": (b"text,text\na,b\n", ":1: the column 'text' is there more than once"),
    "latin.csv": (b"text\nfine\n\xe9\n", r":3: not utf-8 .* of line 3\); correct the line.*skip"),
    "header.csv": (b"text,\xe9\na,b\n", ":1: the header is not utf-8"),
    "nul.csv": (b"text\na\0\n", ":2: no text but binary, or UTF-16: it holds a NUL byte"),
    "utf16.tsv": ("text\na".encode("utf-16-le"), ":1: no text but binary"),
    # columns
    "cut.arrow": (lambda: ipc(strings(["a text"] * 50))[:-300], "not a readable Arrow file.*copy or write it again"),
    "mark.arrow": (lambda: ipc(strings(["a text"]))[:-8], r"not a readable Arrow file \(it has no mark at its end"),
    "cutfile.arrow": (lambda: ipc(strings(["a text"]), stream=False)[:-20], "not a readable Arrow file"),
    "none.arrow": (b"nothing of Arrow's", "not a readable Arrow file"),
    "empty.arrow": (b"", "not a readable Arrow file"),
    "number.arrow": (lambda: ipc(strings([1], "int64")), r"column 'text' is int64, not a string; choose another"),
    "nocolumn.arrow": (lambda: ipc(strings(["a"]), names=["b", "c"]), r"no column 'text' \(its columns: b, c\)"),
    "twice.arrow": (lambda: ipc(strings(["a"]), names=["text", "text"]), "more than one column 'text'"),
    "latin.arrow": (lambda: swap(ipc(strings(["a text"])), b"a text", b"a te\xe9t"), r"row 1: not utf-8 .*skip"),
    "cut.parquet": (lambda: parquet({"text": ["a"] * 99})[:-30], "not a readable Parquet file"),
    "number.parquet": (lambda: parquet({"text": [1]}), "column 'text' is int64, not a string"),
    "list.parquet": (lambda: parquet({"text": [["a"]]}), r"column 'text' is list<.*>, not a string"),
    # archives
    "cut.tar": (TAR[: 512 * 10 + 100], r"damaged after member 2.txt \(.*\); copy"),
    "block.tar": (TAR[: 512 * 9], r"damaged after member 1.txt \(no end of the archive\)"),
    "header.tar": (TAR[: 512 * 9] + b"x" * 512 + TAR[512 * 10 :], r"damaged after member 1.txt \(no end of the arch"),
    "none.tar": (b"no tar at all", "damaged after its beginning"),
    "empty.tar": (b"", "damaged after its beginning"),
    "nothing.tar": (tar([("7.jpg", b"\xff"), ("7.cls", b"1")]), r"sample '7' has no text .*jpg, cls.*json.caption"),
    "both.tar": (tar([("7.txt", b"a"), ("7.md", b"b")]), "sample '7' has txt and md, so which .*--json-key txt"),
    "twice.tar": (tar([("7.txt", b"a"), ("7.txt", b"b")]), "member '7.txt' is there twice"),
    "latin.tar": (tar([("7.txt", b"\xe9")]), r"member '7.txt': not utf-8 near byte 0 .*correct the member"),
    "json.tar": (tar([("7.json", b'{"text": 7}')]), "member '7.json': 'text' is number, not a string"),
    "broken.tar": (tar([("7.json", b"{")]), "member '7.json': malformed JSON"),
}  # fmt: skip


@pytest.mark.parametrize("skip", ["fail", "skip"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path, name, skip):
    data, said = DAMAGED[name]
    path = put(tmp_path / name, data)
    if skip == "skip" and name.startswith("latin."):
        return  # test_what_does_not_decode_is_counted
    with pytest.raises(UserError, match=f"(?s){name}.*({said})"):
        texts(path, on_decode_error=skip)


def test_what_does_not_decode_is_counted(tmp_path):
    files = {
        "a.jsonl.zst": (lambda: zstd(b'{"text": "a"}\n{"text": "\xe9"}\n'), "lines", "first at line 2: not utf-8"),
        "a.json": (b'[{"text": "a"}, {"text": "\xe9"}, {"text": "\\ud800"}]', "elements", "first at element 2"),
        "a.csv": (b'text,n\na,1\n"x\n\xe9",2\n\xff,3\n', "lines", "first at line 3: not utf-8"),
        "a.arrow": (lambda: swap(ipc(strings(["a", "x."])), b"ax.", b"ax\xe9"), "rows", "first at row 2"),
        "a.tar": (tar([("1.txt", b"a"), ("2.txt", b"\xe9"), ("3.txt", b"a\0")]), "members", "first at member 2.txt"),
    }  # fmt: skip
    for name, (data, unit, reason) in files.items():
        report = ReadReport()
        found = texts(put(tmp_path / name, data), report, on_decode_error="skip")
        assert found[0] == "a" and "\ufffd" not in "".join(found)
        (entry,) = report.skipped
        assert entry["file"].endswith(name) and reason in entry["reason"]
        assert entry[unit] == (1 if name in ("a.jsonl.zst", "a.arrow") else 2)
    report = ReadReport()
    assert texts(put(tmp_path / "a.txt.zst", lambda: zstd(b"ok" * 99 + b"\xe9")), report, on_decode_error="skip") == []
    assert [entry["reason"].split(" (")[0] for entry in report.skipped] == ["not utf-8 near byte 198"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_places_in_an_arrow_file_that_lie_outside_of_it_are_refused(tmp_path, kind, stream):
    """Arrow believes them: reading on would end the process, or show other parts of its memory."""
    size = 4 if kind == "string" else 8
    data = ipc(strings(["aa", "bb", "cc"], kind), stream=stream)
    good = b"".join(n.to_bytes(size, "little") for n in (0, 2, 4, 6))
    for places in ((0, 2, 1 << 30, 6), (0, 2, 4, 1 << 30), (0, 5, 2, 6), (-(1 << 30), 2, 4, 6)):
        bad = b"".join(n.to_bytes(size, "little", signed=True) for n in places)
        with pytest.raises(UserError, match="not a readable Arrow file"):
            texts(put(tmp_path / "a.arrow", swap(data, good, bad)))


def test_indices_outside_of_a_dictionary_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([1, 0, 1], pyarrow.int32()), ["a", "b"])
    data = ipc(words)
    assert texts(put(tmp_path / "a.arrow", data)) == ["b", "a", "b"] * 4
    good = b"".join(n.to_bytes(4, "little") for n in (1, 0, 1))
    bad = swap(data, good, b"".join(n.to_bytes(4, "little") for n in (1, 0, 1 << 20)))
    with pytest.raises(UserError, match="not a readable Arrow file"):
        texts(put(tmp_path / "a.arrow", bad))


@pytest.mark.parametrize(
    ("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.arrow", "pyarrow"), ("a.parquet", "pyarrow")]
)
def test_a_package_that_is_not_there_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"{name}: reading it needs {package}.*pip install {package}.*the extra `data`"):
        texts(put(tmp_path / name, b"x"))


# ---------------------------------------------------------------- keys


NESTED = {"meta": {"text": "nested", "deep": {"er": "two down"}, "a.b": "with a dot", "none": None}, "x.y": "literal"}
NESTED |= {"x": {"y": "not this"}, "gone": None, "n": 3}
KEYS = {
    "meta.text": "nested", "meta.deep.er": "two down", "meta.a.b": "with a dot", "x.y": "literal",
    "meta.none": "", "gone.text": "",
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_with_dots_goes_down_unless_it_is_there(tmp_path, key):
    record = json.dumps(NESTED).encode()
    assert texts(put(tmp_path / "a.jsonl", record), json_key=key) == [KEYS[key]]
    assert texts(put(tmp_path / "a.json", b"[" + record + b"]"), json_key=key) == [KEYS[key]]
    assert texts(put(tmp_path / "a.tar", tar([("7.json", record)])), json_key=f"json.{key}") == [KEYS[key]]


@pytest.mark.parametrize("key", [key for key in KEYS if key != "gone.text"])
def test_a_column_with_dots_goes_down_unless_it_is_there(tmp_path, key):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([NESTED, {**NESTED, "meta": None}])
    if key == "meta.none":  # else it would be of no type
        kind = pyarrow.struct([("none", pyarrow.string())])
        table = pyarrow.table({"meta": pyarrow.array([{"none": None}, None], kind)})
    expected = [KEYS[key], KEYS[key] if key == "x.y" else ""]
    put(tmp_path / "a.parquet", parquet(table))
    assert texts(tmp_path / "a.parquet", json_key=key) == expected
    out = io.BytesIO()
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    assert texts(put(tmp_path / "a.arrow", out.getvalue()), json_key=key) == expected


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("meta.body", r"no key 'meta.body' \(the keys of 'meta': 'text', 'deep'.*--json-key"),
        ("n.text", "'n' is number, not an object, so it holds no 'text'"),
        ("other.text", r"no key 'other.text' \(its keys: 'meta'"),
        ("meta", "'meta' is object, not a string"),
    ],
)
def test_a_key_that_leads_nowhere_is_named(tmp_path, key, said):
    with pytest.raises(UserError, match=f"a.jsonl:1: {said}"):
        texts(put(tmp_path / "a.jsonl", json.dumps(NESTED).encode()), json_key=key)


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": {"b": "x", "b": "y"}}',
        b'{"a": {"b": "x"}, "a": {"b": "y"}}',
        b'{"a": {"b": "x"}, "\\u0061": {"b": "y"}}',
        b'{"a.b": "x", "a.b": "y"}',
    ],
)
def test_a_nested_key_that_is_there_twice_is_refused(tmp_path, line):
    with pytest.raises(UserError, match="is there more than once, so which text is meant is open"):
        texts(put(tmp_path / "a.jsonl", line), json_key="a.b")
    assert texts(put(tmp_path / "a.jsonl", b'{"a": {"b": "x"}, "c": {"b": 1, "b": 2}}'), json_key="a.b") == ["x"]


def test_a_column_is_named_literally(tmp_path):
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["a.b", "text"], ["x", "y"]])
    path = put(tmp_path / "a.csv", out.getvalue().encode())
    assert (texts(path), texts(path, json_key="a.b")) == (["y"], ["x"])


def test_fields_of_a_sample(tmp_path):
    one = [("7.txt", b"words"), ("7.cap.en.txt", b"caption"), ("7.json", b'{"text": "in json", "of": {"x": "y"}}')]
    path = put(
        tmp_path / "a.tar", tar([("readme", b"no sample"), (".hidden", b""), *one, ("8.json", b'{"text": "8"}')])
    )
    assert texts(path) == ["words", "8"]
    with pytest.raises(UserError, match=r"member '8.json': no key 'txt'"):
        texts(path, json_key="txt")
    with pytest.raises(UserError, match=r"member '8.json': no key 'cap.en.txt'"):
        texts(path, json_key="cap.en.txt")
    path = put(tmp_path / "b.tar", tar(one))
    for key, text in {"txt": "words", "cap.en.txt": "caption", "json.text": "in json", "of.x": "y"}.items():
        assert texts(path, json_key=key) == [text]


def test_long_members_are_cut_like_files(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 100)
    text = b"a line of it\n" * 100
    plain = list(read_pieces([put(tmp_path / "a.txt", text)], ReadReport()))
    assert len(plain) > 9
    assert list(read_pieces([put(tmp_path / "a.tar", tar([("a.txt", text)]))], ReadReport())) == plain
