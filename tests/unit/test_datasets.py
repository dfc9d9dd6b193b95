"""Datasets of a run: contents, blends, the horizon of the order, the index cache, refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import SplitPlan, check_split, parse_blend, parse_split
from phd_megatron.data.datasets import build_datasets, check_data, resolve_tokenizer
from phd_megatron.data.indexed import check_indexed
from phd_megatron.data.loader import SampleStream
from phd_megatron.data.preprocess import prepare
from phd_megatron.data.tokenizers import ByteTokenizer
from phd_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SEQ = 16
WANTED = (20, 4, 2)


def make_data(directory, name, letter, documents=120):
    source = directory / f"{name}.jsonl"
    source.write_text("\n".join(f'{{"text": "{letter * (5 + i % 9)}{i:03}"}}' for i in range(documents)))
    prepare([source], directory / name, progress=False)
    return str(directory / name)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine")
    make_data(directory, "a", "a")
    make_data(directory, "b", "b", 60)
    return directory


@pytest.fixture
def data(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path


def make_run(*path, **fields):
    run = RunConfig()
    run.model.seq_length = SEQ
    run.data.data_path = [str(word) for word in path]
    run.data.split = "80,10,10"
    for name, value in fields.items():
        setattr(run.data, name, value)
    return run


def rows(dataset, count=None):
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset) if count is None else count)]


def test_training_samples_are_megatrons(data):
    import torch

    run = make_run(data / "a")
    train, _, _ = build_datasets(run, resolve_tokenizer(run), WANTED)
    assert len(train) == 20
    sample = train[3]
    assert set(sample) >= {"tokens", "labels", "loss_mask", "position_ids"}
    for key in ("tokens", "labels", "position_ids"):
        assert (sample[key].dtype, tuple(sample[key].shape)) == (torch.int64, (SEQ,))
    assert sample["loss_mask"].dtype == torch.float32
    assert sample["loss_mask"].tolist() == [1.0] * SEQ  # end-of-document counts, although pad is the same id
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
    assert any(256 in row for row in rows(train))

    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=run.training.seed,
        sequence_length=SEQ,
        blend=([str(data / "a")], None),
        split="80,10,10",
        tokenizer=ByteTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(data / "cache"),
    )
    stock = BlendedMegatronDatasetBuilder(GPTDataset, list(WANTED), lambda: True, config).build()
    assert rows(train) == rows(stock[0], 20)


def test_eod_mask_loss(data):
    run = make_run(data / "a", eod_mask_loss=True)
    train, _, _ = build_datasets(run, ByteTokenizer(), (20, 0, 0))
    for i in range(20):
        expected = [0.0 if token == 256 else 1.0 for token in train[i]["tokens"].tolist()]
        assert train[i]["loss_mask"].tolist() == expected


@pytest.mark.parametrize("restart", [False, True])
def test_documents_of_a_sample(data, restart):
    """Each token's document begins after the last end of a document before it, and positions count from there."""
    run = make_run(data / "a", reset_attention_mask=True, reset_position_ids=restart)
    train, valid, _ = build_datasets(run, ByteTokenizer(), (20, 4, 0))
    borders = 0
    for dataset in (train, valid):
        for sample in (dataset[i] for i in range(len(dataset))):
            start, expected = 0, []
            for place, token in enumerate(sample["tokens"].tolist()):
                expected.append(start)
                start = place + 1 if token == 256 else start
            assert sample["document_starts"].tolist() == expected
            places = [place - start * restart for place, start in enumerate(expected)]
            assert sample["position_ids"].tolist() == places
            borders += len(set(expected)) - 1
    assert borders > 10
    stream = SampleStream(train, 2)
    assert next(stream.microbatches(0, 1))["document_starts"].shape == (2, SEQ)


def test_splits_do_not_overlap_and_unwanted_ones_are_absent(data):
    run = make_run(data / "a", split="50,50")
    train, valid, test = build_datasets(run, ByteTokenizer(), (30, 30, 0))
    assert test is None

    def documents(dataset):
        text = b"".join(bytes(t for t in row if t < 256) + b"|" for row in rows(dataset))
        return {int(word[-3:]) for word in text.replace(b"a", b" ").replace(b"|", b" ").split() if len(word) == 3}

    assert documents(train) and max(documents(train)) < 60 <= min(documents(valid))


def test_order_does_not_depend_on_length_with_a_horizon(data):
    def order(count, horizon):
        run = make_run(data / "a", data_horizon_samples=horizon)
        return rows(build_datasets(run, ByteTokenizer(), (count, 0, 0))[0])

    epoch = 1100 // SEQ
    long = order(5 * epoch, 2 * epoch)  # beyond the horizon, several epochs
    assert len(long) == 5 * epoch
    for count in (1, epoch, 2 * epoch, 3 * epoch):
        assert order(count, 2 * epoch) == long[:count]
    assert long[: 2 * epoch] != long[2 * epoch : 4 * epoch]
    assert order(epoch, None) != order(3 * epoch, None)[:epoch]  # what the horizon is for


def test_blends(data):
    def share_of_b(*path, count=400, **fields):
        train = build_datasets(make_run(*path, **fields), ByteTokenizer(), (count, 0, 0))[0]
        return np.mean([ord("b") in row for row in rows(train)])

    assert share_of_b("0.25", data / "a", "0.75", data / "b") == pytest.approx(0.75, abs=0.02)
    assert share_of_b("1", data / "a", "3", data / "b", data_cache_path=str(data / "c")) == pytest.approx(
        0.75, abs=0.02
    )
    assert share_of_b(data / "a", data / "b") == pytest.approx(1 / 3, abs=0.04)  # by tokens, over several epochs
    run = make_run(train_data_path=[str(data / "a")], valid_data_path=["1", str(data / "b")])
    train, valid, test = build_datasets(run, ByteTokenizer(), (10, 5, 0))
    assert test is None
    assert all(ord("b") not in row for row in rows(train))
    assert all(ord("b") in row for row in rows(valid, 5))


def cache_files(directory):
    return sorted(directory.glob("a.cache/*.npy"))


def test_cache_is_used_and_rebuilt_when_damaged(data, caplog):
    run = make_run(data / "a")
    first = rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0])
    files = cache_files(data)
    assert len(files) == 3
    times = [path.stat().st_mtime_ns for path in files]
    assert rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0]) == first
    assert [path.stat().st_mtime_ns for path in files] == times
    whole = files[0].read_bytes()
    for path, damage in zip(files, (whole[:-5], b"", b"\x80\x04 not an array"), strict=True):
        path.write_bytes(damage)
        assert rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0]) == first
        assert "are damaged" in caplog.text and str(path).removesuffix("-document.npy")[:-20] in caplog.text
        caplog.clear()
    np.save(files[0], np.array([{"a": 1}], dtype=object), allow_pickle=True)  # a pickle is never opened
    assert rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0]) == first


def flipped(path, place, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def test_other_numbers_in_the_cache_are_not_trained_on(data, caplog):
    """An index of the right size with wrong numbers, such as one sample for every step, passed for the true one."""
    run = make_run(data / "a")
    first = rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0])
    assert len({*map(tuple, first)}) > 10
    whole = {path: path.read_bytes() for path in (data / "a.cache").iterdir()}
    document, sample, shuffle = cache_files(data)
    (sums,) = data.glob("a.cache/*-sums.json")
    for damage, said in (
        (lambda: np.save(shuffle, np.zeros_like(np.load(shuffle))), f"{shuffle} is damaged (its checksum)"),
        (lambda: np.save(shuffle, np.sort(np.load(shuffle))), f"{shuffle} is damaged (its checksum)"),
        (lambda: flipped(shuffle, 130), f"{shuffle} is damaged (its checksum)"),
        (lambda: flipped(document, -4), f"{document} is damaged (its checksum)"),
        (lambda: flipped(sample, 140, 2), f"{sample} is damaged (its checksum)"),
        (lambda: np.save(document, np.load(document).astype(np.uint32)), "do not belong together"),
        (lambda: flipped(sums, 0), "do not belong together"),
        (lambda: flipped(sums, -6), "damaged (its checksum)"),  # the last digit of the last sum
        (lambda: sums.write_bytes(b"\xff"), "are damaged"),
        (sums.unlink, None),  # as of a release before
    ):
        caplog.clear()
        damage()
        assert {path: path.read_bytes() for path in whole if path.exists()} != whole
        assert rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0]) == first
        assert said in caplog.text if said else not caplog.text
        assert {path: path.read_bytes() for path in (data / "a.cache").iterdir()} == whole, "built again"


@pytest.mark.parametrize(
    ("part", "value"), [("shuffle", 10**6), ("sample", 10**6), ("sample", -(10**6)), ("sample", 0)]
)
def test_numbers_that_are_damaged_under_a_run_are_no_samples(data, part, value):
    run = make_run(data / "a")
    train = build_datasets(run, ByteTokenizer(), (20, 0, 0))[0]
    (path,) = data.glob(f"a.cache/*{part}.npy")
    array = np.load(path)
    array[...] = value
    np.save(path, array)
    with pytest.raises(UserError, match=r"a\.cache.*damaged; delete"):
        rows(train)


def test_replaced_data_does_not_meet_the_old_cache(data):
    run = make_run(data / "a")
    before = rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0])
    (data / "a.jsonl").write_text("\n".join('{"text": "%s"}' % ("z" * (4 + i % 7)) for i in range(100)))
    prepare([data / "a.jsonl"], data / "a", overwrite=True, progress=False)
    after = rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0])
    assert after != before
    assert all({*row} == {ord("z"), 256} for row in after)


def test_data_of_the_same_size_does_not_meet_the_old_cache(data):
    """Its documents in the other order: as many bytes of both files, and documents begin elsewhere."""
    run = make_run(data / "a")
    build_datasets(run, ByteTokenizer(), (20, 0, 0))
    sizes = [(data / f"a.{kind}").stat().st_size for kind in ("bin", "idx")]
    lines = (data / "a.jsonl").read_text().splitlines()
    (data / "a.jsonl").write_text("\n".join(reversed(lines)))
    prepare([data / "a.jsonl"], data / "a", overwrite=True, progress=False)
    assert [(data / f"a.{kind}").stat().st_size for kind in ("bin", "idx")] == sizes
    found = rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0])
    assert len(cache_files(data)) == 6, "an index of its own"
    shutil.rmtree(data / "a.cache")
    assert found == rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0])


def test_cached_arrays_of_other_lengths_do_not_belong_together(data, caplog):
    run = make_run(data / "a")
    first = rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0])
    for part, cut in (("shuffle", 1), ("sample", 1), ("document", 100)):
        (path,) = data.glob(f"a.cache/*{part}.npy")
        whole = np.load(path)
        np.save(path, whole[:-cut])
        caplog.clear()
        assert rows(build_datasets(run, ByteTokenizer(), (20, 0, 0))[0]) == first
        assert "do not belong together" in caplog.text and np.array_equal(np.load(path), whole)


def test_unwritable_cache(data, caplog):
    expected = rows(build_datasets(make_run(data / "a"), ByteTokenizer(), (20, 0, 0))[0])
    shutil.rmtree(data / "a.cache")
    (data / "a.cache").write_text("a file where the directory would be")
    assert rows(build_datasets(make_run(data / "a"), ByteTokenizer(), (20, 0, 0))[0]) == expected
    assert "cannot be written" in caplog.text
    run = make_run(data / "a", data_cache_path=str(data / "a.cache"))
    with pytest.raises(UserError, match="--data-cache-path"):
        build_datasets(run, ByteTokenizer(), (20, 0, 0))


def truncate(path, size):
    os.truncate(path, path.stat().st_size + size if size < 0 else size)


def patch(path, offset, data):
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


DAMAGE = {
    "no bin": (lambda d: (d / "a.bin").unlink(), r"a\.bin not found"),
    "no idx": (lambda d: (d / "a.idx").unlink(), r"a\.idx not found"),
    "empty idx": (lambda d: truncate(d / "a.idx", 0), "truncated"),
    "short idx": (lambda d: truncate(d / "a.idx", -5), "truncated"),
    "short bin": (lambda d: truncate(d / "a.bin", -2), r"a\.bin is truncated"),
    "long bin": (lambda d: patch(d / "a.bin", (d / "a.bin").stat().st_size, b"xx"), "longer than its index"),
    "magic": (lambda d: patch(d / "a.idx", 0, b"X"), "not an index"),
    "dtype": (lambda d: patch(d / "a.idx", 17, b"\x63"), "not an index"),
    "count": (lambda d: patch(d / "a.idx", 18, b"\xff\xff\xff\xff\xff\xff\xff\x7f"), "truncated"),
    "marks": (lambda d: patch(d / "a.idx", (d / "a.idx").stat().st_size - 8, b"\x01"), "damaged"),
    "length": (lambda d: patch(d / "a.idx", 34, b"\xff\xff\xff\xff"), "damaged"),
    "sidecar": (lambda d: shutil.copy(d / "b.meta.json", d / "a.meta.json"), "not of one prepare"),
    "sidecar text": (lambda d: (d / "a.meta.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_is_refused(data, name):
    damage, message = DAMAGE[name]
    damage(data)
    with pytest.raises(UserError, match=message):
        build_datasets(make_run(data / "a"), ByteTokenizer(), WANTED)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("max_token_id", "x"), ("max_token_id", True), ("max_token_id", -5), ("max_token_id", None)),
        *(("tokenizer", [1]), ("tokenizer", None), ("tokenizer", "byte"), ("bin_bytes", "x"), ("idx_bytes", [1])),
        *(("format", True), ("format", -1), ("format", 0), ("format", 2), ("format", 1.0), ("format", "1")),
    ],
)
def test_a_sidecar_of_other_types_is_refused(data, key, value):
    path = data / "a.meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    said = "not a sidecar this version reads" if key == "format" else f"is damaged: {key}="
    with pytest.raises(UserError, match=rf"a\.meta\.json.*{said}.*prepare the data again"):
        check_data(make_run(data / "a"), ByteTokenizer(), WANTED)


def test_a_sidecar_that_is_no_readable_file_is_refused(data):
    path = data / "a.meta.json"
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"a\.meta\.json cannot be read .*prepare the data again"):
        check_data(make_run(data / "a"), ByteTokenizer(), WANTED)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"a\.meta\.json: it is a pipe.*prepare the data again"):
        check_data(make_run(data / "a"), ByteTokenizer(), WANTED)


def test_prefix_with_suffix_is_explained(data):
    with pytest.raises(UserError, match=r"without \.bin or \.idx"):
        check_data(make_run(data / "a.bin"), ByteTokenizer(), WANTED)


def test_tokenizer_must_fit_model_and_data(data):
    run = make_run(data / "a")
    run.model.vocab_size = 256
    with pytest.raises(UserError, match="257 tokens but vocab_size is 256"):
        check_data(run, ByteTokenizer(), WANTED)
    run.model.vocab_size = None
    small = ByteTokenizer()
    small.vocab_size = 200
    with pytest.raises(UserError, match=r"token id 256.*prepared with byte"):
        check_data(run, small, WANTED)
    (data / "a.meta.json").unlink()  # data from Megatron has no sidecar
    with pytest.raises(UserError, match="token id 256"):
        check_data(run, small, WANTED)
    shutil.rmtree(data / "a.tokenizer")
    with pytest.raises(UserError, match="no --tokenizer"):
        resolve_tokenizer(run)
    prepare([data / "a.jsonl"], data / "c", "bpe:300", progress=False)
    with pytest.raises(UserError, match=r"token id|another tokenizer"):
        check_data(make_run(data / "c"), ByteTokenizer(), WANTED)


def test_borders_of_lengths_and_vocabularies(data):
    """A sample needs one token more than its length, ids are below the vocabulary, samples below the number of them."""
    info = check_indexed(str(data / "b"))
    plan, tokens = SplitPlan([str(data / "b")], None, (0.0, 1.0)), sum(9 + i % 9 for i in range(60))
    assert info.tokens == tokens, "5 to 13 letters, three digits and an end each"
    assert check_split(plan, {info.prefix: info}, tokens - 1, 0) == [tokens]
    with pytest.raises(UserError, match=f"holds {tokens} tokens of its {tokens} .* one sample needs {tokens + 1}"):
        check_split(plan, {info.prefix: info}, tokens, 0)
    exact = ByteTokenizer()
    exact.vocab_size = 256  # and the end of a document is 256
    for sidecar in (True, False):
        if not sidecar:
            (data / "a.meta.json").unlink()
        with pytest.raises(UserError, match=r"token id 256.*only 256 tokens"):
            check_data(make_run(data / "a"), exact, WANTED)
    train = build_datasets(make_run(data / "a"), ByteTokenizer(), (20, 0, 0))[0]
    assert train[19]["tokens"].shape == (SEQ,)
    for outside in (20, -1):
        with pytest.raises(IndexError, match=f"sample {outside} of 20"):
            train[outside]


def test_tokenizer_files_of_other_content_are_noted(data, caplog):
    prepare([data / "a.jsonl"], data / "c", "bpe:270", progress=False)
    prepare([data / "b.jsonl"], data / "d", "bpe:270", progress=False)
    run = make_run(data / "c")
    run.model.seq_length = 4
    check_data(run, resolve_tokenizer(run), WANTED)
    assert "other content" not in caplog.text
    run.data.tokenizer = str(data / "d.tokenizer")
    check_data(run, resolve_tokenizer(run), WANTED)
    assert "other content" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "100,0,0"}, "4 validation samples.*--eval-iters 0"),
        ({"split": "99.9,0.05,0.05"}, "validation split of .* holds 0 tokens"),
        ({"split": "1,2,3,4"}, "--split"),
        ({"split": "a,b"}, "--split"),
        ({"split": "0,0,0"}, "--split"),
        ({"split": "1,-1,1"}, "--split"),
        ({"data_path": []}, "--data-path is empty"),
        ({"data_path": ["0.5"]}, "no WEIGHT PREFIX pairs"),
        ({"data_path": ["0", "x"]}, "no positive number"),
        ({"data_path": ["x", "0.5", "y"]}, "WEIGHT PREFIX"),
        ({"train_data_path": ["x"]}, "both given"),
        ({"data_horizon_samples": 0}, "--data-horizon-samples 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(data, fields, message):
    with pytest.raises(UserError, match=message):
        build_datasets(make_run(data / "a", **fields), ByteTokenizer(), WANTED)


def test_parse_split_and_blend():
    assert parse_split("969,30,1")[2][1] == 1.0
    assert parse_split("90,10") == [(0.0, 0.9), (0.9, 1.0), (1.0, 1.0)]
    assert parse_split("1") == [(0.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    assert parse_blend(["0.3", "a", "1e2", "b"], "data-path") == (["a", "b"], [0.3, 100.0])
    assert parse_blend(["a", "b"], "data-path") == (["a", "b"], None)


SCRIPT = """
import os, sys, torch
import torch.distributed as dist
os.environ["WORLD_SIZE"] = "2"
sys.path.insert(0, {root!r})
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.datasets import build_datasets
from phd_megatron.data.tokenizers import ByteTokenizer
from phd_megatron.training.streams import with_whole_indices
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
run = RunConfig()
run.model.seq_length = 16
run.data.data_path = ["1", {a!r}, "1", {b!r}]
run.data.split = "80,10,10"
train, valid, _ = with_whole_indices(lambda: build_datasets(run, ByteTokenizer(), (50, 5, 0)), rank)
print([train[i]["tokens"].tolist() for i in range(50)] + [valid[i]["tokens"].tolist() for i in range(5)])
dist.destroy_process_group()
"""


def test_two_ranks_build_the_same(data):
    """One data set has no cache, and one whose order is wrong: one rank sees it, and both build again."""
    train, valid, _ = build_datasets(make_run("1", data / "a", "1", data / "b"), ByteTokenizer(), (50, 5, 0))
    expected = str(rows(train, 50) + rows(valid, 5))
    shutil.rmtree(data / "b.cache")
    for path in data.glob("a.cache/*-shuffle.npy"):
        np.save(path, np.zeros_like(np.load(path)))
    script = SCRIPT.format(root=str(ROOT), store=data / "store", a=str(data / "a"), b=str(data / "b"))
    command = [sys.executable, "-W", "ignore", "-c", script]
    ranks = [subprocess.Popen([*command, str(r)], stdout=subprocess.PIPE, text=True) for r in range(2)]
    outputs = [rank.communicate(timeout=300)[0].splitlines()[-1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0] == expected
    assert all(len({*np.load(path).tolist()}) > 1 for path in data.glob("a.cache/*-shuffle.npy"))
    assert not list(data.glob("*.cache/.building-*"))
