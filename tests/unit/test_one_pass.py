"""Validation and evaluation data against a plain loop over the tokens of the .bin file."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import documents_of, parse_split
from phd_megatron.data.datasets import build_datasets
from phd_megatron.data.evaluation import evaluation_dataset, select_samples
from phd_megatron.data.one_pass import interleave
from phd_megatron.data.preprocess import prepare
from phd_megatron.data.tokenizers import ByteTokenizer
from phd_megatron.errors import UserError

SEQ, SPLIT = 16, "70,20,10"
SHARES = {"train": (0.0, 0.7), "valid": (0.7, 0.9), "test": (0.9, 1.0)}
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one_pass")
    for name, documents in (("a", 150), ("b", 60), ("c", 40)):
        words = [f"{name}{i:03}" * (1 + i * i % 7) for i in range(documents)]
        (directory / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in words))
        prepare([directory / f"{name}.jsonl"], directory / name, progress=False)
    return directory


@pytest.fixture
def data(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path


def make_run(*path, seq_length=SEQ, seed=1234, **fields):
    run = RunConfig()
    run.model.seq_length, run.training.seed = seq_length, seed
    run.data.data_path, run.data.split = [str(word) for word in path], SPLIT
    for name, value in fields.items():
        setattr(run.data, name, value)
    return run


def looped(prefix, share=(0.0, 1.0), seq_length=SEQ):
    """Samples as the definition says: documents one after the other, cut every ``seq_length`` tokens."""
    lengths = np.frombuffer(Path(f"{prefix}.idx").read_bytes()[34:], np.int32)
    count = int.from_bytes(Path(f"{prefix}.idx").read_bytes()[18:26], "little")
    lengths, tokens = lengths[:count], np.fromfile(f"{prefix}.bin", np.uint16).tolist()
    begin, end = (round(border * count) for border in share)
    part = tokens[sum(lengths[:begin]) : sum(lengths[:end])]
    return [part[i : i + seq_length + 1] for i in range(0, len(part) - seq_length, seq_length)]


def read(dataset, count=None):
    samples = [dataset[i] for i in range(len(dataset) if count is None else count)]
    return [[*sample["tokens"].tolist(), int(sample["labels"][-1])] for sample in samples]


def whole(run, subset):
    selection = select_samples(run, BYTES, subset, None)
    return evaluation_dataset(run, BYTES, subset, selection.samples, 1)


@pytest.mark.parametrize("subset", SHARES)
@pytest.mark.parametrize("seq_length", [5, 16])
def test_samples_are_those_of_a_plain_loop_in_one_fixed_order(data, subset, seq_length):
    expected = looped(data / "a", SHARES[subset], seq_length)
    found = read(whole(make_run(data / "a", seq_length=seq_length), subset))
    order = np.random.RandomState(20250421).permutation(len(expected))
    assert found == [expected[i] for i in order]
    assert len(found) > 8 and found != expected


@pytest.mark.parametrize(
    ("documents", "split", "borders"),
    [
        (40, "69,14,17", [(0, 28), (28, 33), (33, 40)]),  # 27.6 and 33.2
        (7, "1,1", [(0, 4), (4, 7)]),  # 3.5: to the even number, as Megatron does
        (9, "1,1", [(0, 4), (4, 9)]),  # 4.5
        (10, "0.5,0.25,0.25", [(0, 5), (5, 8), (8, 10)]),  # 7.5
        (3, "97,2,1", [(0, 3), (3, 3), (3, 3)]),
    ],
)
def test_borders_are_rounded_to_documents(documents, split, borders):
    info = SimpleNamespace(lengths=range(documents))
    shares = parse_split(split)[: len(borders)]
    assert [documents_of(info, share) for share in shares] == [range(*border) for border in borders]


def test_the_order_is_pinned():
    from phd_megatron.data.gpt_index import permutation

    assert permutation(12).tolist() == [2, 4, 5, 9, 11, 10, 8, 0, 7, 6, 1, 3]
    assert sorted(permutation(1000)) == list(range(1000))
    assert permutation(1000)[:5].tolist() == [435, 71, 521, 293, 546]


def test_neither_seed_nor_count_nor_batch_move_a_sample(data):
    expected = read(whole(make_run(data / "a"), "valid"))
    for seed, count, multiple in ((1, 3, 1), (2, 7, 4), (3, len(expected), 8)):
        run = make_run(data / "a", seed=seed)
        batches = evaluation_dataset(run, BYTES, "valid", count, multiple)
        assert read(batches, count) == expected[:count]
        assert len(batches) % multiple == 0 and len(batches) - count < multiple
        assert all(float(batches[i]["loss_mask"].sum()) == 0 for i in range(count, len(batches)))
        _, valid, test = build_datasets(run, BYTES, (4, count, 1))
        assert read(valid) == expected and len(test) == len(looped(data / "a", SHARES["test"]))


def test_loss_mask(data):
    samples = whole(make_run(data / "a", eod_mask_loss=True), "valid")
    for i in range(len(samples)):
        assert samples[i]["loss_mask"].tolist() == [float(token != 256) for token in samples[i]["tokens"].tolist()]


def test_training_keeps_its_order_and_no_cache_is_shared(data):
    """The index of a pass over the training split and that of training itself have names of their own."""
    before = read(build_datasets(make_run(data / "a"), BYTES, (30, 0, 0))[0])
    of_training = set((data / "a.cache").iterdir())
    passed = read(whole(make_run(data / "a"), "train"))
    assert len(set((data / "a.cache").iterdir())) == len(of_training) + 4
    assert read(build_datasets(make_run(data / "a"), BYTES, (30, 0, 0))[0]) == before != passed[:30]
    assert read(whole(make_run(data / "a", seed=5), "train")) == passed
    assert len(set((data / "a.cache").iterdir())) == len(of_training) + 4, "a pass has no seed"


def test_an_index_of_the_shuffled_order_is_not_met(data):
    """What releases before wrote for one epoch of the validation split, under any of their keys."""
    from megatron.core.datasets.utils import Split

    from phd_megatron.data.blend import plan_splits
    from phd_megatron.data.gpt_index import IndexedGPTDataset, index_config
    from phd_megatron.data.indexed import check_indexed

    run, info = make_run(data / "a"), check_indexed(str(data / "a"))
    plan = plan_splits(run.data)[1]
    config = index_config(run, BYTES, plan, {str(data / "a"): info}, 1)
    documents = documents_of(info, plan.share)
    indices = np.arange(documents.start, documents.stop, dtype=np.int32)
    low_level = IndexedGPTDataset.build_low_level_dataset(str(data / "a"), config)
    shuffled = IndexedGPTDataset(low_level, str(data / "a"), indices, None, Split.valid, config)
    assert read(whole(run, "valid")) != read(shuffled)
    assert sorted(read(whole(run, "valid"))) == sorted(looped(data / "a", SHARES["valid"]))


def test_data_sets_without_weights_are_read_once_each(data):
    run = make_run(data / "a", data / "b", data / "c")
    found = read(whole(run, "valid"))
    parts = {name: looped(data / name, SHARES["valid"]) for name in "abc"}
    assert sorted(found) == sorted(sample for part in parts.values() for sample in part)
    for name, part in parts.items():  # each is spread over the pass, and in its own order
        own = [sample for sample in found if sample in part]
        assert own == read(whole(make_run(data / name), "valid"))
        share = len(part) / len(found)
        for end in range(1, len(found)):
            assert abs(sum(sample in part for sample in found[:end]) - share * end) <= 1.5


def greedy(sizes, weights):
    """Megatron's rule: the data set that lacks most of its share comes next; until one is used up."""
    taken, order = [0] * len(sizes), []
    while True:
        place = max(len(order), 1)
        lacking = [weight / sum(weights) * place - count for weight, count in zip(weights, taken, strict=True)]
        part = lacking.index(max(lacking))
        if taken[part] == sizes[part]:
            return order
        order.append((part, taken[part]))
        taken[part] += 1


@pytest.mark.parametrize(
    ("sizes", "weights"), [((30, 30), (1, 1)), ((30, 7, 4), (0.5, 0.3, 0.2)), ((3, 100), (9, 1)), ((5, 5), (1, 1000))]
)
def test_with_weights_the_pass_ends_where_a_data_set_would_repeat(sizes, weights):
    part, sample = interleave(list(sizes), list(weights))
    assert list(zip(part.tolist(), sample.tolist(), strict=True)) == greedy(sizes, weights)
    assert len(set(zip(part.tolist(), sample.tolist(), strict=True))) == len(part)


def test_more_than_one_pass_is_refused(data):
    run = make_run("3", data / "a", "1", data / "b")
    selection = select_samples(run, BYTES, "valid", None)
    sizes = [len(looped(data / name, SHARES["valid"])) for name in "ab"]
    assert selection.samples == selection.available == len(greedy(sizes, (3, 1))) < sum(sizes)
    with pytest.raises(UserError, match=f"--num-samples {sum(sizes)}: one pass .* has {selection.available} samples"):
        select_samples(run, BYTES, "valid", sum(sizes))
    assert select_samples(run, BYTES, "valid", 5).samples == 5
    assert "3 " in str(selection) and "70 to 90 % of its documents" in str(selection)


def test_data_of_its_own_for_each_split(data):
    run = make_run(train_data_path=[str(data / "a")], valid_data_path=[str(data / "b"), str(data / "c")])
    train, valid, test = build_datasets(run, BYTES, (10, 5, 0))
    assert test is None and len(train) == 10
    assert sorted(read(valid)) == sorted(looped(data / "b") + looped(data / "c"))
    assert str(select_samples(run, BYTES, "valid", None)).startswith(f"the validation split of {data / 'b'} ")
    with pytest.raises(UserError, match="gives the test split nothing"):
        select_samples(run, BYTES, "test", None)


@pytest.mark.parametrize("tokens", [2 * SEQ, 2 * SEQ + 1, 3 * SEQ])
def test_a_sample_needs_the_token_after_it(tmp_path, tokens):
    (tmp_path / "text.txt").write_text("x" * (tokens - 1))  # and the end of the document
    prepare([tmp_path / "text.txt"], tmp_path / "d", progress=False)
    run = make_run(tmp_path / "d")
    run.data.split = "0,100,0"
    assert select_samples(run, BYTES, "valid", None).available == (tokens - 1) // SEQ
