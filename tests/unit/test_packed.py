"""Packed training samples: what is in them, in which order, for every number of ranks and workers, and their index."""

from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.datasets import build_datasets
from phd_megatron.data.indexed import IndexedWriter
from phd_megatron.data.loader import SampleStream
from phd_megatron.data.packed import PackingStatistics, packing_statistics
from phd_megatron.data.packing import best_fit
from phd_megatron.data.samples import Samples
from phd_megatron.data.tokenizers import ByteTokenizer
from phd_megatron.errors import UserError

SEQ, END, SEED = 16, 256, 1234
DOCUMENTS = 90


def write(directory: Path, name: str, documents: list[list[list[int]]]) -> str:
    """An indexed data set of documents that are lists of sequences."""
    place = directory / f"{name}.writing"
    place.mkdir(parents=True)
    with IndexedWriter(place, np.dtype(np.uint16).type) as writer:
        for document in documents:
            tokens = np.array([token for sequence in document for token in sequence], np.int64)
            writer.add(tokens, np.array([len(sequence) for sequence in document]), np.array([len(document)]))
        writer.finish()
    for kind in ("bin", "idx"):
        os.replace(place / f"data.{kind}", directory / f"{name}.{kind}")
    return str(directory / name)


def made_up(seed: int, number: int = DOCUMENTS) -> list[list[list[int]]]:
    """Short and long ones, of one or several sequences, some of them empty, or of none; most end with END."""
    random = np.random.RandomState(seed)
    documents = []
    for index in range(number):
        tokens = [*random.randint(0, 256, random.geometric(0.1)).tolist(), *([END] if index % 11 else [])]
        if index % 7 == 0:
            tokens = [*random.randint(0, 256, 3 * SEQ + index).tolist(), END]
        borders = sorted(random.randint(0, len(tokens) + 1, index % 4).tolist())
        if index % 13 == 5:
            documents.append([])
        documents.append([tokens[a:b] for a, b in zip([0, *borders], [*borders, len(tokens)], strict=True)])
    return documents


def joined(documents: list[list[list[int]]]) -> list[list[int]]:
    return [[token for sequence in document for token in sequence] for document in documents]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path, "a", made_up(0))
    write(tmp_path, "b", made_up(1, 40))
    return tmp_path


def make_run(*path: object, **fields: object) -> RunConfig:
    run = RunConfig()
    run.model.seq_length, run.training.seed = SEQ, SEED
    run.data.data_path, run.data.split, run.data.packing = [str(word) for word in path], "1", "best_fit"
    for name, value in fields.items():
        setattr(run.data, name, value)
    return run


def training(run: RunConfig, count: int) -> Samples:
    train = build_datasets(run, ByteTokenizer(), (count, 0, 0))[0]
    assert train is not None and len(train) == count
    return train


def rows(dataset: Samples, begin: int = 0, end: int | None = None) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(begin, len(dataset) if end is None else end)]


def expected_samples(documents: list[list[int]]) -> list[dict[str, list[float]]]:
    """One sample after the other, token by token."""
    packing = best_fit(np.array([*map(len, documents)]), SEQ + 1)
    samples = []
    for begin, end in zip(packing.borders[:-1], packing.borders[1:], strict=True):
        text, counts, starts = [], [], []
        for document, first, length in packing.pieces[begin:end].tolist():
            here = len(text)
            for place in range(length):
                text.append(documents[document][first + place])
                counts.append(float(place > 0))
                starts.append(here)
        filled = len(text)
        while len(text) <= SEQ:
            text.append(END)
            counts.append(0.0)
            starts.append(filled)
        samples.append({"tokens": text[:-1], "labels": text[1:], "loss_mask": counts[1:], "starts": starts[:-1]})
    return samples


def per_epoch(directory: Path, name: str = "a") -> int:
    (statistics,) = packing_statistics(training(make_run(directory / name), 1))
    return statistics.samples


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("restart", [False, True])
def test_samples_are_those_of_a_loop_over_documents(data: Path, apart: bool, restart: bool) -> None:
    import torch

    expected = expected_samples(joined(made_up(0)))
    size = len(expected)
    fields = {"reset_attention_mask": apart or restart, "reset_position_ids": restart}
    train = training(make_run(data / "a", **fields), 2 * size + 3)
    for index in range(len(train)):
        order = np.random.RandomState([SEED, index // size]).permutation(size)
        sample, wanted = train[index], expected[order[index % size]]
        for key in ("tokens", "labels", "loss_mask"):
            assert sample[key].tolist() == wanted[key]
            assert sample[key].dtype == (torch.float32 if key == "loss_mask" else torch.int64)
        starts = wanted["starts"]
        assert sample["position_ids"].tolist() == [n - restart * start for n, start in enumerate(starts)]
        assert ("document_starts" in sample) == (apart or restart)
        if apart or restart:
            assert sample["document_starts"].tolist() == starts and sample["document_starts"].dtype == torch.int64
    assert any(0.0 in sample["loss_mask"][:-1] for sample in expected), "documents meet inside of samples"
    assert any(sample["tokens"][-1] == END for sample in expected) and size > 20


def test_every_target_is_one_once_in_an_epoch(data: Path) -> None:
    """Every token of a document but its first, with the token before it."""
    size, documents = per_epoch(data), joined(made_up(0))
    train = training(make_run(data / "a"), 3 * size)
    pairs = Counter(pair for document in documents for pair in pairwise(document))
    orders = []
    for epoch in range(3):
        found: Counter[tuple[int, int]] = Counter()
        for sample in (train[index] for index in range(epoch * size, (epoch + 1) * size)):
            counted = sample["loss_mask"] == 1
            found.update(zip(sample["tokens"][counted].tolist(), sample["labels"][counted].tolist(), strict=True))
        assert found == pairs
        orders.append(rows(train, epoch * size, (epoch + 1) * size))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_nothing_is_predicted_from_an_end_where_it_is_masked(tmp_path: Path) -> None:
    """Ends inside of a document, which only data from elsewhere has; those between documents never count."""
    write(tmp_path, "a", [[[1, END, *range(2, SEQ - 3)]], [[4, END]], [[END]], [[END]]])
    for masked in (False, True):
        sample = training(make_run(tmp_path / "a", eod_mask_loss=masked), 1)[0]
        assert sample["tokens"].tolist() == [1, END, *range(2, SEQ - 3), 4, END, END]
        assert sample["loss_mask"].tolist() == [1.0, 1.0 - masked, *[1.0] * (SEQ - 6), 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_one_for_every_number_of_ranks_and_workers(data: Path, workers: int) -> None:
    train = training(make_run(data / "a", reset_attention_mask=True, reset_position_ids=True), 48)
    keys = ("tokens", "labels", "loss_mask", "position_ids", "document_starts")
    whole = {key: np.array([train[index][key].tolist() for index in range(48)]) for key in keys}
    for ranks in (1, 2, 4):
        streams = [SampleStream(train, 2, rank, ranks, num_workers=workers) for rank in range(ranks)]
        for begin in (16, 0, 32):  # a run may begin anywhere
            count = 16 // (2 * ranks)
            parts = [list(stream.microbatches(begin, count)) for stream in streams]
            for key in keys:
                found = np.concatenate([parts[rank][m][key].numpy() for m in range(count) for rank in range(ranks)])
                assert np.array_equal(found, whole[key][begin : begin + 16])
        for stream in streams:
            stream.close()


def test_the_order_is_fixed_by_seed_and_horizon(data: Path) -> None:
    size = per_epoch(data)
    run = make_run(data / "a")
    long = rows(training(run, 3 * size))
    assert rows(training(run, size + 5)) == long[: size + 5], "a longer run begins as the shorter one"
    blocks = rows(training(make_run(data / "a", data_horizon_samples=size), 2 * size))
    assert blocks[:size] == long[:size] and sorted(blocks[size:]) == sorted(long[:size])
    run.training.seed += 1
    other = rows(training(run, size))
    assert other == blocks[size:], "a block has the next seed"
    assert other != long[:size] and sorted(other) == sorted(long[:size])


def test_a_blend_packs_each_of_its_parts_by_itself(data: Path) -> None:
    alone = {name: {*map(tuple, rows(training(make_run(data / name), per_epoch(data, name))))} for name in "ab"}
    assert not alone["a"] & alone["b"]
    for path, share in ((("0.3", data / "a", "0.7", data / "b"), 0.7), ((data / "a", data / "b"), 0.3)):
        train = training(make_run(*path), 200)
        found = [tuple(row) for row in rows(train)]
        assert {*found} <= alone["a"] | alone["b"]
        assert np.mean([row in alone["b"] for row in found]) == pytest.approx(share, abs=0.05)
        assert [part.prefix for part in packing_statistics(train)] == [str(data / "a"), str(data / "b")]


def test_only_documents_of_the_split_are_packed(data: Path) -> None:
    """A document with sequences on both sides of the border is two; validation is in plain order."""
    documents = made_up(0)
    sequences = [sequence for document in documents for sequence in document]
    border = round(0.6 * len(sequences))
    numbers = [n for n, document in enumerate(documents) for _ in document]
    assert numbers[border - 1] == numbers[border], "the border cuts a document"
    texts: dict[int, list[int]] = {}
    for number, sequence in list(zip(numbers, sequences, strict=True))[:border]:
        texts.setdefault(number, []).extend(sequence)
    expected = expected_samples([*texts.values()])
    run = make_run(data / "a", split="60,40")
    train, valid, _ = build_datasets(run, ByteTokenizer(), (len(expected), 4, 0))
    assert train is not None and valid is not None
    assert sorted(rows(train)) == sorted(sample["tokens"] for sample in expected)
    run.data.packing = "none"
    plain = build_datasets(run, ByteTokenizer(), (len(expected), 4, 0))[1]
    assert plain is not None and rows(valid) == rows(plain)
    assert {len(list(data.glob("a.cache/train-*-sums.json"))), len(list(data.glob("a.cache/valid-*-sums.json")))} == {
        1,
        2,
    }


def test_training_may_be_a_later_part(data: Path) -> None:
    """Of training data that begins behind others' sequences; Megatron's splits begin with training."""
    from megatron.core.datasets.utils import Split

    from phd_megatron.data.blend import SplitPlan
    from phd_megatron.data.gpt_index import index_config
    from phd_megatron.data.indexed import check_indexed
    from phd_megatron.data.packed import PackedGPTDataset

    documents = made_up(0)
    sequences, late = len([sequence for document in documents for sequence in document]), documents[20:]
    begin = sequences - len([sequence for document in late for sequence in document])
    prefix = str(data / "a")
    plan, infos = SplitPlan([prefix], None, (0.0, 1.0)), {prefix: check_indexed(prefix)}
    config = index_config(make_run(prefix), ByteTokenizer(), plan, infos, 0, random_seed=SEED)
    low_level = PackedGPTDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(begin, sequences, dtype=np.int32)
    dataset = PackedGPTDataset(low_level, prefix, indices, None, Split.train, config)
    expected = expected_samples(joined(late))
    assert sorted(rows(dataset)) == sorted(sample["tokens"] for sample in expected), (
        "one epoch, where no number is given"
    )
    assert dataset[None]["loss_mask"].sum() == 0 and dataset[None]["tokens"].tolist() == rows(dataset)[0]


def test_statistics(data: Path) -> None:
    documents = joined(made_up(0))
    packing = best_fit(np.array([*map(len, documents)]), SEQ + 1)
    (found,) = packing_statistics(training(make_run(data / "a"), 30))
    cut = sum(count > 1 for count in Counter(packing.pieces[:, 0].tolist()).values())
    assert (found.samples, found.pieces, found.cut) == (packing.samples, len(packing.pieces), cut) and cut > 10
    assert found.padding == pytest.approx(1 - packing.pieces[:, 2].sum() / (SEQ + 1) / packing.samples)
    said = str(PackingStatistics("mine", 4097, 1000, 8150, 12, 4_096_000))
    assert said == (
        "packing best_fit of mine: 1,000 samples an epoch, 8.15 documents or parts of one in a sample, 12 documents "
        "cut, 0.024 % padding"
    )
    plain = make_run(data / "a", packing="none")
    assert not [*packing_statistics(build_datasets(plain, ByteTokenizer(), (5, 0, 0))[0])]
    assert not [*packing_statistics(None)]


# ---------------------------------------------------------------- the index


def test_the_cache_is_used_and_built_again_when_damaged(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(data / "a")
    first = rows(training(run, 40))
    whole = {path: path.read_bytes() for path in (data / "a.cache").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in whole}
    assert len(whole) == 4 and rows(training(run, 40)) == first
    assert {path: path.stat().st_mtime_ns for path in whole} == times, "nothing is written again"
    assert rows(training(make_run(data / "a", packing="none"), 40)) != first, "its index is another one's"
    for path, content in whole.items():
        for damaged in (content[:-5], b"", content[:-1] + bytes([content[-1] ^ 1])):
            caplog.clear()
            path.write_bytes(damaged)
            assert rows(training(run, 40)) == first and path.read_bytes() == content
            assert "built again" in caplog.text or "checksum" in caplog.text


def test_an_index_that_cannot_be_written_stays_in_memory(data: Path) -> None:
    run = make_run(data / "a")
    expected, statistics = rows(training(run, 40)), [*packing_statistics(training(run, 40))]
    for path in (data / "a.cache").iterdir():
        path.unlink()
    (data / "a.cache").rmdir()
    (data / "a.cache").write_text("a file where the directory would be")
    assert rows(training(run, 40)) == expected
    assert [*packing_statistics(training(run, 40))] == statistics


@pytest.mark.parametrize(
    ("part", "column", "value"),
    [
        *(("shuffle", None, 10**6), ("shuffle", None, -1), ("sample", None, 0), ("sample", None, 10**6)),
        *(("document", 0, -1), ("document", 0, 10**6), ("document", 1, 10**6), ("document", 2, 10**6)),
        *(("document", 2, -1), ("document", 2, 0), ("document", 3, 0)),
    ],
)
def test_numbers_that_are_damaged_under_a_run_are_no_samples(
    data: Path, part: str, column: int | None, value: int
) -> None:
    train = training(make_run(data / "a"), 20)
    (path,) = data.glob(f"a.cache/*{part}.npy")
    array = np.load(path)
    array[..., slice(None) if column is None else column] = value
    np.save(path, array)
    with pytest.raises(UserError, match=r"a\.cache.*damaged; delete"):
        rows(train)


def test_a_negative_sequence_is_not_counted_from_the_end(tmp_path: Path) -> None:
    """Documents of one length, so that every one could stand for another."""
    write(tmp_path, "a", [[[*range(first, first + SEQ), END]] for first in range(20)])
    train = training(make_run(tmp_path / "a"), 20)
    (path,) = tmp_path.glob("a.cache/*document.npy")
    array = np.load(path)
    array[:, 0] -= 20
    np.save(path, array)
    with pytest.raises(UserError, match=r"sequence -\d+ of 20.*damaged; delete"):
        rows(train)


def test_documents_without_anything_to_predict_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", [[[END]]] * 40)
    with pytest.raises(UserError, match=r"packing=best_fit: no document of .*a' .* has two tokens.* use packing none"):
        training(make_run(tmp_path / "a"), 5)
