"""``prepare merge`` against Megatron's builder, byte for byte; ``prepare inspect`` against plain counting."""

import itertools
import json
import shutil
import statistics
import tracemalloc

import numpy as np
import pytest

from phd_megatron.cli.main import main
from phd_megatron.data import inspection, preprocess
from phd_megatron.data import merge as work
from phd_megatron.data.bpe import train_bpe
from phd_megatron.data.indexed import IndexedWriter, check_indexed
from phd_megatron.data.inspection import inspect
from phd_megatron.data.merge import merge
from phd_megatron.data.output import Output, read_sidecar
from phd_megatron.data.preprocess import prepare
from phd_megatron.errors import UserError


def write(prefix, documents, dtype=np.uint16):
    """A data set of Megatron's kind, without sidecar: for each document the lengths of its sequences."""
    generator = np.random.default_rng(len(documents))
    with Output(str(prefix), False) as output, IndexedWriter(output.directory, dtype) as writer:
        lengths = np.array(list(itertools.chain(*documents)), np.int32)
        marks = np.cumsum([len(document) for document in documents])
        writer.add(generator.integers(0, 257, lengths.sum()), lengths, marks)
        writer.finish()
        output.publish(None)
    return str(prefix)


def bytes_of(prefix):
    return [open(f"{prefix}.{kind}", "rb").read() for kind in ("bin", "idx")]


@pytest.fixture
def three(tmp_path):
    documents = [[3], [1, 7, 2], [], [5]], [[9, 9]], [[4]] * 50
    return [write(tmp_path / f"in{n}", found) for n, found in enumerate(documents)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("block", [6 << 1, 1 << 22])
def test_merged_bytes_are_megatrons(tmp_path, monkeypatch, dtype, block):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr(work, "_BLOCK", block)
    inputs = [
        write(tmp_path / f"in{n}", documents, dtype)
        for n, documents in enumerate([[[3], [1, 7, 2], [], [5]], [[9, 9]], [[4]] * 50])
    ]
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    for prefix in inputs:
        theirs.add_index(prefix)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    result = merge(inputs, str(tmp_path / "ours"))
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "theirs")
    assert (result.documents, result.sequences, result.tokens) == (55, 57, 236)
    assert not result.has_tokenizer
    assert not [*tmp_path.glob("ours.[mtp]*")]


def test_a_merge_of_prepared_data_is_prepared_data(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "three"}\n{"text": ""}\n{"text": "\xff"}\n')
    for name in ("a.txt", "b.jsonl"):
        prepare([tmp_path / name], tmp_path / name[0], on_decode_error="skip", progress=False)
    prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "both", on_decode_error="skip", progress=False)
    inputs = [str(tmp_path / name) for name in "ab"]
    result = merge(inputs, str(tmp_path / "m"))
    assert result.has_tokenizer
    assert bytes_of(tmp_path / "m") == bytes_of(tmp_path / "both")
    merged, expected = (read_sidecar(str(tmp_path / name)) for name in ("m", "both"))
    left_out = {"inputs", "json_key", "on_decode_error"}
    assert {k: v for k, v in merged.items() if k != "inputs"} == {
        k: v for k, v in expected.items() if k not in left_out
    }
    for path in (tmp_path / "both.tokenizer").iterdir():
        assert path.read_bytes() == (tmp_path / "m.tokenizer" / path.name).read_bytes()


def test_merged_memory_does_not_grow_with_the_data(tmp_path):
    inputs = [write(tmp_path / f"{n}", [[1000]] * 20_000) for n in range(2)]  # 40 MB each
    tracemalloc.start()
    merge(inputs, str(tmp_path / "m"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_what_does_not_fit_together_is_refused(tmp_path, three):
    out = str(tmp_path / "out")
    other = write(tmp_path / "wide", [[3]], np.int32)
    (tmp_path / "a.txt").write_text("some text, some text")
    train_bpe([["some text"]], 260, 1, tmp_path / "bpe")
    for name, options in {"ours": {}, "bpe": {"tokenizer": tmp_path / "bpe"}, "no_eod": {"append_eod": False}}.items():
        prepare([tmp_path / "a.txt"], tmp_path / f"p_{name}", progress=False, **options)
    ours, bpe, no_eod = (str(tmp_path / f"p_{name}") for name in ("ours", "bpe", "no_eod"))
    before = sorted(path.name for path in tmp_path.iterdir())
    for inputs, said in [
        ([three[0], other], "holds tokens as int32, and .*in0' as uint16.*prepare them with one tokenizer"),
        ([three[0]], "one data set is nothing to join; name two or more"),
        ([three[0], three[1], three[0]], "in0' is there twice; name each data set once"),
        ([three[0], out], "is the output too"),
        ([three[0], ours], r"in0' has no \.meta\.json that names its tokenizer, and .*p_ours' has one"),
        ([ours, three[0]], r"in0' has no \.meta\.json"),
        ([ours, bpe], "p_bpe' was made with another tokenizer than .*p_ours'.*prepare them with one"),
        ([ours, no_eod], "p_no_eod' and .*p_ours': only in one of them documents end with the end-of-document"),
        ([three[0], f"{three[1]}x"], r"in1x\.bin and .* not found.*or correct --input"),
    ]:
        with pytest.raises(UserError, match=said):
            if out in inputs:
                merge(inputs, three[1] if three[1] in inputs else write(tmp_path / "out", [[1]]), overwrite=True)
            merge(inputs, out)
    for path in tmp_path.glob("out.*"):
        path.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_damaged_data_is_not_merged(tmp_path, three):
    with open(f"{three[1]}.bin", "ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(UserError, match=r"in1\.bin is longer than its index"):
        merge(three, str(tmp_path / "out"))
    assert not [*tmp_path.glob("out*")]


def test_merge_replaces_data_only_when_asked(tmp_path, three, capsys):
    words = ["prepare", "merge", "--input", *three[:2], "--output-prefix", str(tmp_path / "out")]
    assert main(words) == 0
    assert "5 documents, 7 sequences, 36 tokens of 2 data sets; none of the inputs has" in capsys.readouterr().out
    before = bytes_of(tmp_path / "out")
    assert main(words) == 2
    assert "already exist" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == before
    (tmp_path / "a.txt").write_text("text")
    prepare([tmp_path / "a.txt"], tmp_path / "out", overwrite=True, progress=False)
    assert main([*words, "--overwrite"]) == 0
    assert bytes_of(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        "out.bin",
        "out.idx",
    ]  # no tokenizer of what was there
    assert check_indexed(str(tmp_path / "out")).documents == 5


# ---------------------------------------------------------------- inspect


def counted(documents):
    lengths = [sum(document) for document in documents]
    return lengths, (min(lengths), max(lengths), statistics.mean(lengths), statistics.median(lengths))


@pytest.mark.parametrize("rows", [1, 3, 1 << 20])
@pytest.mark.parametrize("limit", [4, 1 << 20])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_lengths_are_counted(tmp_path, monkeypatch, rows, limit, count):
    monkeypatch.setattr(inspection, "_ROWS", rows)
    monkeypatch.setattr(inspection, "_COUNTED", limit)
    generator = np.random.default_rng(count)
    documents = [generator.integers(1, 9, generator.integers(0, 4)).tolist() for _ in range(count)] + [[2]]
    found = inspect(write(tmp_path / "d", documents))
    lengths, expected = counted(documents)
    assert (found.shortest, found.longest, found.mean, found.median) == pytest.approx(expected)
    assert (found.documents, found.sequences) == (len(documents), sum(map(len, documents)))
    assert (found.tokens, found.empty) == (sum(lengths), lengths.count(0))
    assert sum(number for *_, number in found.histogram) == len(documents)
    for low, high, number in found.histogram:
        assert number == sum(low <= length <= high for length in lengths)
    assert found.histogram[0][0] <= min(lengths) <= found.histogram[0][1]
    assert found.histogram[-1][0] <= max(lengths) <= found.histogram[-1][1]


def test_samples_are_the_documents(tmp_path):
    texts = [f"document {n}, " * n for n in range(1, 60)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare([tmp_path / "a.jsonl"], tmp_path / "d", progress=False)
    found = inspect(str(tmp_path / "d"), samples=3)
    assert [sample.document for sample in found.samples] == [0, 19, 39]
    for sample in found.samples:
        whole = f"{texts[sample.document]}<|endoftext|>"
        assert sample.text == whole[:256] or sample.text == whole
        assert sample.tokens == len(texts[sample.document]) + 1
    assert found.has_vocabulary and found.sidecar["tokens"] == found.tokens
    assert len(inspect(str(tmp_path / "d"), samples=1000).samples) == 59


def test_inspect_refuses(tmp_path, three):
    for options, said in [
        ({"samples": 2}, "--samples 2: .*in0.tokenizer is not there, so name the tokenizer with --tokenizer"),
        ({"samples": -1}, "--samples -1.*use 0 to 1000"),
        ({"samples": 1001}, "--samples 1001.*use 0 to 1000"),
        ({"tokenizer": "none"}, "'none' is neither 'byte' nor an existing directory"),
    ]:
        with pytest.raises(UserError, match=said):
            inspect(three[0], **options)
    assert inspect(three[0], samples=1, tokenizer="byte").samples[0].tokens == 3
    with pytest.raises(UserError, match="correct the prefix"):
        inspect(str(tmp_path / "none"))
    np.full(4, 300, np.uint16).tofile(f"{three[2]}.bin")
    with pytest.raises(UserError, match="truncated"):
        inspect(three[2])
    np.full(200, 300, np.uint16).tofile(f"{three[2]}.bin")
    with pytest.raises(UserError, match="token id 300"):
        inspect(three[2], tokenizer="byte")
    assert not inspect(three[2]).has_vocabulary
    (tmp_path / "a.txt").write_text("text")
    prepare([tmp_path / "a.txt"], tmp_path / "d", progress=False)
    meta = tmp_path / "d.meta.json"
    meta.write_text(meta.read_text().replace('"bin_bytes": 10', '"bin_bytes": 12'))
    with pytest.raises(UserError, match=r"d\.meta\.json notes .* they are not of one prepare"):
        inspect(str(tmp_path / "d"))


def test_what_inspect_prints(tmp_path, capsys):
    lines = [json.dumps({"text": text}) for text in ["a" * 6] * 3 + ["b\u001b[2J"] + ["c" * 100]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare([tmp_path / "a.jsonl"], tmp_path / "d", progress=False)
    assert main(["prepare", "inspect", str(tmp_path / "d"), "--samples", "5"]) == 0
    out = capsys.readouterr().out
    for words in (
        "the index and ids (all of a small file, else 8 MiB) checked; tokens are uint16",
        "with tokenizer class=byte eod=256 spec=byte vocab_size=257",
        "documents  5 (0 without tokens)",
        "sequences  5",
        "tokens     128",
        "shortest 6, mean 25.6, median 7.0, longest 101",
        f"   4 to    7  {'#' * 40}  4 (80.0%)",
        f"  16 to   31  {' ' * 40}  0 (0.0%)",
        f"  64 to  127  {'#' * 10}{' ' * 30}  1 (20.0%)",
        "document 4, 101 tokens:\ncccc",
        "b\\x1b[2J<|endoftext|>",
    ):
        assert words in out, words
    assert main(["prepare", "inspect", write(tmp_path / "m", [[3]])]) == 0
    assert "the index checked; tokens are uint16\ndocuments  1" in capsys.readouterr().out


# ---------------------------------------------------------------- several keys


def test_several_keys_are_several_data_sets(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "t", "meta": {"note": "nn"}}\n')
    words = ["prepare", "--input", str(tmp_path / "a.jsonl"), "--workers", "1", "--no-progress"]
    words += ["--output-prefix", str(tmp_path / "P"), "--json-keys", "text", "meta.note"]
    assert main(words) == 0
    assert [inspect(str(tmp_path / f"P_{key}_document")).tokens for key in ("text", "meta.note")] == [2, 3]
    assert capsys.readouterr().out.count("1 documents") == 2
    for path in tmp_path.glob("P_text*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(words) == 2  # before the first is written again
    assert "P_meta.note_document.bin" in capsys.readouterr().err
    assert not [*tmp_path.glob("P_text*.bin")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--json-keys", "a", "a"], "--json-keys 'a' is there twice"),
        (["--json-keys", "a/b", "c"], "'a/b' can be no part of a file's name"),
        (["--json-keys", "a", "b", "--tokenizer", "bpe:300"], "would get a tokenizer of its own"),
        (["--json-keys", "a", "--json-key", "b"], "both name the keys of the text; give one of them"),
    ],
)
def test_keys_that_cannot_be_several(tmp_path, capsys, more, said):
    (tmp_path / "a.jsonl").write_text('{"a": "t", "b": "t"}\n')
    words = ["prepare", "--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "P"), *more]
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_first_error_of_several_keys_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "t", "b": 3}\n')
    found = preprocess.prepare_keys([tmp_path / "a.jsonl"], tmp_path / "P", "byte", ["a", "b"], progress=False)
    assert next(found).tokens == 2
    with pytest.raises(UserError, match="'b' is number, not a string"):
        next(found)
