"""Every kind of file against a plain loop over its texts: the same tokens, however many workers; damage is named."""

import gzip
import io
import itertools
import json
import tarfile

import numpy as np
import pytest

from phd_megatron.data import json_lines, readers
from phd_megatron.data.bpe import train_bpe
from phd_megatron.data.indexed import check_indexed
from phd_megatron.data.inputs import find_files
from phd_megatron.data.preprocess import prepare
from phd_megatron.data.readers import ReadReport, read_pieces
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.errors import UserError

from .archives import tar

TEXTS = [
    "one",
    'zwei, "Zeilen"\nü\r\n',
    "tab\tand 'quote', \\ \\\" back",
    "",
    "漢字 \U0001f600 <|endoftext|> [1, {2}]",
    "a long one, with words\n" * 9000,
    " ",
    "last ]}",
]


def zstd(data, **options):
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(**options).compress(data)


def frames(data):
    """As pzstd and seekable writers do: frames in a row, and one that is to be skipped."""
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    middle = len(data) // 3
    return skipped + zstd(data[:middle]) + zstd(b"") + skipped + zstd(data[middle:])


def long_window(data):
    """Needs a window of 256 MiB, as of ``zstd --long=28``, which a reader refuses unless it is allowed."""
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(
        **{"window_log": 28, "enable_ldm": True, "hash_log": 10, "chain_log": 10, "ldm_hash_log": 10}
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of no size that it knows
    packed = compressor.compress(data) + compressor.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << 28
    return packed


def lines(texts):
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def array(texts):
    return json.dumps([{"text": text, "of": [{"a": "]"}, n]} for n, text in enumerate(texts)], indent=1).encode()


def table(texts, separator):
    """By pandas, which quotes what must be."""
    pandas = pytest.importorskip("pandas")
    return (
        pandas.DataFrame({"n": range(len(texts)), "text": texts, "x": "y"}).to_csv(index=False, sep=separator).encode()
    )


def arrow_table(texts, kind=None):
    pyarrow = pytest.importorskip("pyarrow")
    kind = kind or pyarrow.string()
    column = pyarrow.array(texts, pyarrow.string())
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_encode()
    elif pyarrow.types.is_string_view(kind):
        column = pyarrow.array(texts, kind)
    else:
        column = column.cast(kind)
    return pyarrow.table({"n": list(range(len(texts))), "text": column, "picture": [b"\xff" * 99] * len(texts)})


def ipc(texts, kind=None, *, stream=True, batch=3, **options):
    pyarrow = pytest.importorskip("pyarrow")
    found = arrow_table(texts, kind)
    out = io.BytesIO()
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(out, found.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(found, max_chunksize=batch)
    return out.getvalue()


def parquet(texts, kind=None, **options):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet as library

    out = io.BytesIO()
    library.write_table(arrow_table(texts, kind), out, row_group_size=5, **options)
    return out.getvalue()


def samples(texts, field="txt", form=tarfile.PAX_FORMAT):
    """WebDataset's: pictures and classes beside the texts, a name longer than 100 characters, a folder."""
    name = "shard/" + "n" * 120
    return tar(
        [
            member
            for n, text in enumerate(texts)
            for member in [
                (f"{name}{n:05}.jpg", bytes(512 * n + 7)),
                (f"{name}{n:05}.{field}", json.dumps({"text": text}).encode() if field == "json" else text.encode()),
                (f"{name}{n:05}.cls", b"3"),
            ]
        ],
        form,
    )


def arrow_kind(name):
    return getattr(pytest.importorskip("pyarrow"), name)()


FORMATS = {
    "a.jsonl": lines,
    "a.jsonl.zst": lambda texts: zstd(lines(texts)),
    "frames/a.jsonl.zst": lambda texts: frames(lines(texts)),
    "long/a.jsonl.zst": lambda texts: long_window(lines(texts)),
    "a.json.zst": lambda texts: zstd(lines(texts)),
    "a.json": array,
    "dense/a.json": lambda texts: json.dumps([{"text": text} for text in texts], ensure_ascii=False).encode(),
    "a.json.gz": lambda texts: gzip.compress(array(texts)),
    "array/a.json.zst": lambda texts: zstd(b"\xef\xbb\xbf \n" + array(texts) + b"\n\n"),
    "a.csv": lambda texts: table(texts, ","),
    "a.csv.gz": lambda texts: gzip.compress(b"\xef\xbb\xbf" + table(texts, ",")),
    "a.tsv": lambda texts: table(texts, "\t"),
    "a.tsv.zst": lambda texts: zstd(table(texts, "\t")),
    "a.arrow": ipc,
    "file/a.arrow": lambda texts: ipc(texts, stream=False),
    "packed/a.arrow": lambda texts: ipc(texts, compression="zstd"),
    "large/a.arrow": lambda texts: ipc(texts, arrow_kind("large_string")),
    "view/a.arrow": lambda texts: ipc(texts, arrow_kind("string_view"), stream=False),
    "words/a.arrow": lambda texts: ipc(texts, arrow_table(texts[:1])["text"].dictionary_encode().type),
    "a.parquet": parquet,
    "large/a.parquet": lambda texts: parquet(texts, arrow_kind("large_string")),
    "view/a.parquet": lambda texts: parquet(texts, arrow_kind("string_view")),
    "words/a.parquet": lambda texts: parquet(texts, arrow_table(texts[:1])["text"].dictionary_encode().type),
    "a.tar": samples,
    "gnu/a.tar": lambda texts: samples(texts, "json", tarfile.GNU_FORMAT),
    "a.tar.gz": lambda texts: gzip.compress(samples(texts, "md")),
    "a.tgz": lambda texts: gzip.compress(samples(texts)),
    "a.tar.zst": lambda texts: zstd(samples(texts)),
}


def read_tokens(prefix):
    """Documents by numpy alone."""
    info = check_indexed(str(prefix))
    tokens, pointers = np.fromfile(f"{prefix}.bin", info.dtype), [*info.pointers.read(), info.bin_file.size]
    marks = info.marks.read().tolist()
    size = info.dtype.itemsize
    return [tokens[pointers[a] // size : pointers[b] // size].tolist() for a, b in itertools.pairwise(marks)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_bpe([TEXTS], 300, 1, directory)
    return load_tokenizer(directory)


def loop(tokenizer, texts):
    return [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts if text]


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_a_plain_loop(tmp_path, tokenizer, name):
    path = put(tmp_path / name, FORMATS[name](TEXTS))
    assert find_files([path.parent]) == [path]
    result = prepare([path], tmp_path / "d", tokenizer.directory, progress=False)
    assert read_tokens(tmp_path / "d") == loop(tokenizer, TEXTS)
    assert (result.empty_documents, result.skipped) == (1, [])
    report = ReadReport()
    assert sum(piece.last for piece in read_pieces([path], report)) == len(TEXTS)
    assert report.bytes_read == path.stat().st_size


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_the_text(tmp_path, tokenizer, suffix):
    pack = gzip.compress if suffix == ".gz" else zstd
    latin = "# coding: latin-1\nx = 'é'\n"
    content = {"a.txt": TEXTS[5].encode(), "b.md": "\ufeffü".encode(), "c.py": latin.encode("latin-1"), "d.txt": b""}
    for name, data in content.items():
        put(tmp_path / "packed" / f"{name}{suffix}", pack(data))
        put(tmp_path / "plain" / name, data)
    for place in ("packed", "plain"):
        prepare([tmp_path / place], tmp_path / place, tokenizer.directory, progress=False)
    assert read_tokens(tmp_path / "packed") == loop(tokenizer, [TEXTS[5], "ü", latin])
    for kind in ("bin", "idx"):  # also how a long text is cut
        assert (tmp_path / f"packed.{kind}").read_bytes() == (tmp_path / f"plain.{kind}").read_bytes()


def test_workers_do_not_change_a_byte(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("phd_megatron.data.encode.batches_of.__defaults__", (5000,))
    for name, make in FORMATS.items():
        put(tmp_path / "in" / name, make(TEXTS))
    for workers in (1, 2):
        prepare([tmp_path / "in"], tmp_path / str(workers), tokenizer.directory, workers=workers, progress=False)
    assert len(read_tokens(tmp_path / "1")) == len(FORMATS) * (len(TEXTS) - 1)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_an_array_is_split_wherever_it_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_lines, "_BLOCK", block)
    texts = ['a"]},', "\\", '\\"', "\\\\", "", "{[", "é" * 9]
    path = put(tmp_path / "a.json", array(texts))
    assert [piece.text for piece in read_pieces([path], ReadReport())] == texts
    put(path, b"  [ ]\n")
    assert list(read_pieces([path], ReadReport())) == []


def test_long_runs_of_escapes_in_an_array(tmp_path):
    texts = ['\n\t"\\' * 50_000, "x"]
    path = put(tmp_path / "a.json", array(texts))
    assert [piece.text for piece in read_pieces([path], ReadReport())] == texts


def test_settings_in_a_directory_are_no_input(tmp_path):
    put(tmp_path / "info.json", b'{"text": "settings"}')
    data = put(tmp_path / "data.json", array(["a"]))
    assert find_files([tmp_path]) == [data]
    assert find_files([tmp_path / "info.json"]) == [tmp_path / "info.json"]
    assert [p.text for p in read_pieces([tmp_path / "info.json"], ReadReport())] == ["settings"]


# ---------------------------------------------------------------- Hugging Face's directories


def test_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))})
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    put(tmp_path / "one" / "cache-1.arrow", ipc(["of a map that is not the data"]))
    files = find_files([tmp_path])
    assert [path.name for path in files] == [f"data-0000{n}-of-00003.arrow" for n in range(3)]
    assert [piece.text for piece in read_pieces(files, ReadReport())] == TEXTS
    # A selection is written out by save_to_disk, in its order.
    saved.select([2, 0]).save_to_disk(tmp_path / "some")
    assert [p.text for p in read_pieces(find_files([tmp_path / "some"]), ReadReport())] == [TEXTS[2], TEXTS[0]]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"both' is a data set with the splits train, test; give those .*both/train"):
        find_files([tmp_path / "both"])
    assert len(find_files([tmp_path / "both" / "train"])) == 1
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "single")
    assert len(find_files([tmp_path / "single"])) == 1


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"_data_files": [{"filename": "../secret.arrow"}]}, r"'../secret.arrow', which is no name of a file beside"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "lists gone.arrow, which is not there"),
        ({"_data_files": [3]}, "lists no names of files"),
        ({"_data_files": {}}, "lists no names of files"),
        ({"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}, r"flatten_indices\(\)"),
        ([], "is no JSON object"),
    ],
)
def test_a_damaged_saved_data_set_is_named(tmp_path, state, said):
    put(tmp_path / "secret.arrow", ipc(["a"]))
    put(tmp_path / "d" / "state.json", json.dumps(state).encode())
    with pytest.raises(UserError, match=said):
        find_files([tmp_path / "d"])


def test_state_of_somebody_else_is_no_data_set(tmp_path):
    put(tmp_path / "state.json", b'{"optimizer": 1}')
    text = put(tmp_path / "a.txt", b"text")
    assert find_files([tmp_path]) == [text]


# ---------------------------------------------------------------- reading in bounded memory


def test_a_document_longer_than_any_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_TEXT", 4000)
    long = ["short", "x" * 5000]
    for name in ("a.jsonl.zst", "a.json", "a.csv", "a.tsv.zst", "a.arrow", "a.parquet", "a.tar", "a.tar.zst"):
        path = put(tmp_path / name, FORMATS[name](long))
        pieces = read_pieces([path], ReadReport())
        assert next(pieces).text == "short"
        with pytest.raises(UserError, match=rf"{name}.*has more than 4000 bytes, so it is no document"):
            next(pieces)


def test_a_bomb_takes_no_memory(tmp_path):
    """4 GiB of zeros in 130 kB: refused after LARGEST_TEXT, and never unpacked whole."""
    import tracemalloc

    zstandard = pytest.importorskip("zstandard")
    compressor = zstandard.ZstdCompressor().compressobj()
    zeros = bytes(1 << 24)
    packed = b"".join([compressor.compress(zeros) for _ in range(64)]) + compressor.flush()
    assert len(packed) < 200_000
    path = put(tmp_path / "bomb.txt.zst", packed)
    tracemalloc.start()
    with pytest.raises(UserError, match="NUL"):
        list(read_pieces([path], ReadReport()))
    path = path.rename(tmp_path / "bomb.jsonl.zst")
    readers_limit = 1 << 24
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="more than"):
        patch.setattr(readers, "LARGEST_TEXT", readers_limit)
        list(read_pieces([path], ReadReport()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 160 << 20  # a step of the decompressor is at most 64 MiB, and is copied


def test_an_archive_of_many_members_is_not_kept(tmp_path):
    import tracemalloc

    path = put(tmp_path / "a.tar", tar([(f"{n:06}.txt", b"t") for n in range(5000)]))
    pieces = read_pieces([path], ReadReport())
    for _ in range(50):
        next(pieces)
    tracemalloc.start()
    assert sum(1 for _ in pieces) == 4950
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20  # 5,000 TarInfo are 5 MB
