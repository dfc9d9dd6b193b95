"""prepare: exact contents, independence of workers, atomic output, refusals, the command line."""

import errno
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from phd_megatron.cli import prepare as command
from phd_megatron.data import encode, indexed, preprocess, readers
from phd_megatron.data.bpe import train_bpe
from phd_megatron.data.indexed import check_indexed
from phd_megatron.data.output import Output, read_sidecar
from phd_megatron.data.preprocess import prepare
from phd_megatron.data.readers import Piece
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def make_corpus(directory, documents=60):
    """Text, source and JSON lines, with empty documents and one longer than a piece."""
    directory.mkdir()
    for i in range(documents):
        (directory / f"{i:03}.txt").write_text(f"document {i}: " + "lorem ipsum ü\n" * (i % 17))
    (directory / "empty.md").write_text("")
    (directory / "long.py").write_text("".join(f"value_{i} = {i} * {i}\n" for i in range(9000)))
    lines = [{"text": f"line {i} " * (i % 5)} for i in range(50)]
    (directory / "z.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return directory


def expected_documents(corpus, tokenizer):
    texts = [path.read_bytes().decode() for path in sorted(corpus.iterdir()) if path.suffix != ".jsonl"]
    texts += [json.loads(line)["text"] for line in (corpus / "z.jsonl").read_text().splitlines()]
    return [[*tokenizer.tokenize(text), tokenizer.eod] for text in texts if text]


def read_documents(prefix):
    """Documents through Megatron's own reader."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    marks = dataset.document_indices.tolist()
    return [
        np.concatenate([dataset[i] for i in range(begin, end)]).tolist() for begin, end in itertools.pairwise(marks)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.mark.parametrize("spec", ["byte", "bpe:400"])
def test_megatron_reads_exactly_what_was_written(corpus, tmp_path, spec):
    result = prepare([corpus], tmp_path / "d", spec, progress=False)
    tokenizer = load_tokenizer(tmp_path / "d.tokenizer")
    expected = expected_documents(corpus, tokenizer)
    assert read_documents(tmp_path / "d") == expected
    assert result.documents == len(expected)
    assert result.tokens == sum(map(len, expected))
    assert result.sequences > result.documents  # long.py comes in pieces
    assert result.empty_documents == 1 + 10
    sidecar = read_sidecar(str(tmp_path / "d"))
    assert sidecar["tokens"] == result.tokens
    assert sidecar["max_token_id"] == max(max(document) for document in expected)
    assert sidecar["tokenizer"]["spec"] == spec
    assert sidecar["bin_bytes"] == (tmp_path / "d.bin").stat().st_size
    assert not (tmp_path / "d.partial").exists()


@pytest.mark.parametrize(("name", "stride"), [("text.txt", 3), ("text.txt.gz", 9)])
def test_a_tokenizer_is_trained_on_a_part_by_the_size_that_is_estimated(tmp_path, monkeypatch, name, stride):
    """300 characters of which 100 may be read; of a compressed file four times its size is expected."""
    seen = []
    monkeypatch.setattr(preprocess, "SAMPLE_CHARACTERS", 100)
    monkeypatch.setattr(preprocess, "train_bpe", lambda texts, size, step, directory: seen.append(step))
    monkeypatch.setattr(preprocess, "load_tokenizer", lambda spec: None)
    path = tmp_path / name
    path.write_bytes(b"x" * (300 if name == "text.txt" else 225))
    source = SimpleNamespace(files=[path], texts=lambda: iter(()))
    with pytest.raises(AttributeError):  # nothing was trained
        preprocess._make_tokenizer("bpe:300", source, tmp_path, [])
    assert seen == [stride]


def test_workers_do_not_change_a_byte(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("phd_megatron.data.encode.BATCH_CHARACTERS", 5000)
    monkeypatch.setattr("phd_megatron.data.encode.batches_of.__defaults__", (5000,))
    prepare([corpus], tmp_path / "one", "bpe:300", workers=1, progress=False)
    prepare([corpus], tmp_path / "three", "bpe:300", workers=3, progress=False)
    for suffix in ("bin", "idx", "tokenizer/tokenizer.json"):
        one, three = (tmp_path / f"{name}.{suffix}" for name in ("one", "three"))
        assert one.read_bytes() == three.read_bytes()
    monkeypatch.setattr("phd_megatron.data.encode.batches_of.__defaults__", (100,))
    prepare([corpus], tmp_path / "small", "bpe:300", workers=1, progress=False)
    assert (tmp_path / "small.bin").read_bytes() == (tmp_path / "one.bin").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_index_is_megatrons_byte_for_byte(tmp_path, monkeypatch, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "_CHUNK", 3)
    assert [indexed.dtype_for(n) for n in (257, 65499, 65500)] == [DType.optimal_dtype(n) for n in (257, 65499, 65500)]
    ours = indexed.IndexedWriter(tmp_path, dtype)
    theirs = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype)
    generator = np.random.default_rng(0)
    for _ in range(4):  # four batches of documents with one to three sequences
        lengths, marks, parts = [], [], []
        for _ in range(generator.integers(1, 6)):
            for _ in range(generator.integers(1, 4)):
                ids = generator.integers(0, 30000, generator.integers(1, 9))
                theirs.add_item(torch.from_numpy(ids))
                parts.append(ids)
                lengths.append(len(ids))
            theirs.end_document()
            marks.append(len(lengths))
        ours.add(np.concatenate(parts), np.array(lengths), np.array(marks))
    ours.finish()
    theirs.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"data.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes()


def test_existing_output_needs_overwrite(corpus, tmp_path):
    prepare([corpus / "000.txt"], tmp_path / "d", progress=False)
    before = (tmp_path / "d.bin").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        prepare([corpus], tmp_path / "d", progress=False)
    assert (tmp_path / "d.bin").read_bytes() == before
    prepare([corpus], tmp_path / "d", overwrite=True, progress=False)
    assert (tmp_path / "d.bin").read_bytes() != before


def test_refused_input_leaves_nothing(corpus, tmp_path):
    (tmp_path / "in").mkdir()
    bad = tmp_path / "in" / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        prepare([corpus, bad], tmp_path / "d", workers=2, progress=False)
    bad.write_text('{"text": ""}\n\n{"text": null}')
    with pytest.raises(UserError, match=r"empty corpus.*2 empty documents"):
        prepare([bad], tmp_path / "d", progress=False)
    with pytest.raises(UserError, match="no text to train"):
        prepare([bad], tmp_path / "d", "bpe:300", progress=False)
    with pytest.raises(UserError, match="--workers 0"):
        prepare([corpus], tmp_path / "d", workers=0, progress=False)
    with pytest.raises(UserError, match="output-prefix"):
        prepare([corpus], tmp_path / "d.bin", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_full_disk_is_explained(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexed.IndexedWriter, "add", full)
    with pytest.raises(UserError, match="no space left"):
        prepare([corpus], tmp_path / "d", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_two_prepares_at_once_are_refused(corpus, tmp_path):
    with Output(str(tmp_path / "d"), False), pytest.raises(UserError, match="another prepare"):
        prepare([corpus], tmp_path / "d", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("characters", "sent", "said"),
    [
        (100, signal.SIGKILL, r"SIGKILL, which somebody sent or, when memory is short, .* fewer --workers if"),
        (300_000, signal.SIGKILL, "SIGKILL"),
        (100, signal.SIGSEGV, r"\(signal SIGSEGV\); start prepare again$"),
    ],
)
def test_dead_worker_is_an_error_not_a_hang(corpus, tmp_path, monkeypatch, characters, sent, said):
    def killing(pieces):
        for number in range(20):
            yield [Piece("x" * characters, True, True)]
            if number == 5:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, sent)

    monkeypatch.setattr("phd_megatron.data.preprocess.batches_of", killing)
    with pytest.raises(UserError, match=f"ended abruptly.*{said}"):
        prepare([corpus], tmp_path / "d", workers=2, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_error_in_a_worker_arrives(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("phd_megatron.data.preprocess.batches_of", lambda pieces: [[Piece("\ud800", True, True)]])
    with pytest.raises(UnicodeEncodeError):
        prepare([corpus], tmp_path / "d", workers=2, progress=False)


@pytest.fixture(scope="module")
def slow_input(tmp_path_factory):
    """A few seconds of work: 8 MB of text and a BPE tokenizer directory."""
    directory = tmp_path_factory.mktemp("slow")
    train_bpe([["some words to be cut into tokens, and more of them\n"]], 300, 1, directory / "tokenizer")
    (directory / "big.txt").write_text("some words to be cut into tokens, and more of them\n" * 160_000)
    return directory


def start_prepare(source, output, workers):
    arguments = [sys.executable, "-m", "phd_megatron", "prepare", "--input", str(source / "big.txt")]
    arguments += ["--output-prefix", str(output), "--tokenizer", str(source / "tokenizer"), "--workers", str(workers)]
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    partial = Path(f"{output}.partial") / "data.bin"
    deadline = time.monotonic() + 300
    while not (partial.exists() and partial.stat().st_size > 0):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return process


def test_kill_in_the_middle_leaves_no_data_and_no_processes(slow_input, tmp_path):
    process = start_prepare(slow_input, tmp_path / "d", 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.read()  # ends only when the workers, which share the pipe, are gone
    assert not (tmp_path / "d.idx").exists()
    with pytest.raises(UserError, match="not found"):
        check_indexed(str(tmp_path / "d"))
    (tmp_path / "short.txt").write_text("now short\n")
    prepare([tmp_path / "short.txt"], tmp_path / "d", progress=False)
    assert check_indexed(str(tmp_path / "d")).documents == 1
    assert not (tmp_path / "d.partial").exists()


@pytest.mark.parametrize("step", range(4))
def test_kill_while_publishing_leaves_no_data(tmp_path, step):
    (tmp_path / "in.txt").write_text("new text")
    (tmp_path / "old.txt").write_text("old")
    prepare([tmp_path / "old.txt"], tmp_path / "d", progress=False)
    script = f"""
import os
from phd_megatron.data import preprocess
calls, replace = [], os.replace
def dying(*arguments):
    if len(calls) == {step}:
        os._exit(9)
    calls.append(arguments)
    replace(*arguments)
os.replace = dying
preprocess.prepare(["in.txt"], "d", overwrite=True, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 9
    with pytest.raises(UserError, match=r"d\.idx"):
        check_indexed(str(tmp_path / "d"))
    prepare([tmp_path / "in.txt"], tmp_path / "d", progress=False)
    assert read_documents(tmp_path / "d") == [[*b"new text", 256]]


@pytest.mark.parametrize("parts", [[], ["data.bin"], ["data.bin", "data.idx"], ["data.idx"], ["data.idx", "meta.json"]])
def test_what_a_killed_prepare_left_opens_no_foreign_bin(tmp_path, parts):
    (tmp_path / "in.txt").write_text("new text")
    (tmp_path / "d.partial").mkdir()
    for name in parts:
        (tmp_path / "d.partial" / name).write_text('{"format": 1, "bin_bytes": 3}')
    (tmp_path / "d.bin").write_text("of somebody")
    with pytest.raises(UserError, match=r"d\.bin has no \.idx beside it.*move it away"):
        prepare([tmp_path / "in.txt"], tmp_path / "d", progress=False)
    assert (tmp_path / "d.bin").read_text() == "of somebody"


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_of_the_whole_group_cleans_up(slow_input, tmp_path, workers):
    process = start_prepare(slow_input, tmp_path / "d", workers)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_worker_leaves_the_signals_of_its_group_to_the_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    handlers = {}
    monkeypatch.setattr(encode.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(encode, "load_tokenizer", lambda directory: None)
    mine, other = multiprocessing.Pipe()
    other.close()
    encode._work(mine, str(tmp_path), True, np.uint16)
    assert handlers == {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    base = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "d"), "--workers", "1"]
    with pytest.raises(UserError, match=r"b\.txt"):
        command.run(base)
    assert command.run([*base, "--on-decode-error", "skip"]) == 0
    out, err = capsys.readouterr()
    assert f"skipped {tmp_path / 'b.txt'}: not utf-8" in err
    assert "1 documents, 5 tokens" in out
    with pytest.raises(UserError, match="unknown flag --tokeniser; did you mean --tokenizer"):
        command.run([*base, "--tokeniser", "byte"])


def test_preprocess_data_takes_megatrons_flags(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "ab", "note": "c"}\n')
    load_tokenizer("byte").save(tmp_path / "tokenizer")
    arguments = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", "x.jsonl"]
    arguments += ["--output-prefix", "P", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer"]
    subprocess.run([*arguments, "--workers", "2", "--append-eod"], cwd=tmp_path, check=True, env=ENVIRONMENT)
    assert read_documents(tmp_path / "P_text_document") == [[97, 98, 256]]
    subprocess.run([*arguments, "--json-keys", "note"], cwd=tmp_path, check=True, env=ENVIRONMENT)
    assert read_documents(tmp_path / "P_note_document") == [[99]]
    done = subprocess.run([*arguments, "--append-eos"], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "did you mean --append-eod" in done.stderr


def test_prepare_imports_neither_torch_nor_megatron(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    script = (
        "import sys; from phd_megatron.data.preprocess import prepare; prepare(['a.txt'], 'd', progress=False);"
        "print(sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == "['numpy']\n"


def test_bpe_blocks_equal_the_whole_text(tmp_path, monkeypatch):
    text = "".join(f"def function_{i}(x):\n    return x + {i}\n\n\nclass C{i}: pass\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 500)
    result = prepare([tmp_path / "a.txt"], tmp_path / "d", "bpe:400", progress=False)
    assert result.sequences > 20
    tokenizer = load_tokenizer(tmp_path / "d.tokenizer")
    assert read_documents(tmp_path / "d") == [[*tokenizer.tokenize(text), tokenizer.eod]]
