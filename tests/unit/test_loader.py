"""The sample stream: same samples for any DP size, from any position, with and without workers."""

import multiprocessing
import os
import signal

import pytest
import torch

from phd_megatron.data.loader import SampleStream


class Numbered(torch.utils.data.Dataset):
    """Sample i holds i everywhere, with one key that is not for the model."""

    def __init__(self, length=200):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        ids = torch.full((4,), index)
        return {
            "tokens": ids,
            "labels": ids + 1,
            "loss_mask": torch.ones(4),
            "position_ids": torch.arange(4),
            "dataset_id": 0,
        }


class Naming(Numbered):
    """Sample i holds the process that made it."""

    def __getitem__(self, index):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        return {**super().__getitem__(index), "labels": torch.full((4,), os.getpid())}


def indices(batches):
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def test_a_batch_is_what_the_model_takes():
    (batch,) = SampleStream(Numbered(), 3).microbatches(6, 1)
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (3, 4)),
        "labels": (torch.int64, (3, 4)),
        "loss_mask": (torch.float32, (3, 4)),
        "position_ids": (torch.int64, (3, 4)),
    }
    assert batch["tokens"][:, 0].tolist() == [6, 7, 8]


@pytest.mark.parametrize(("dp", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2)])
def test_steps_hold_the_same_samples_for_any_dp(dp, workers):
    streams = [SampleStream(Numbered(), 2, rank, dp, num_workers=workers) for rank in range(dp)]
    consumed = 0
    for global_batch in (8, 8, 16, 24, 8):  # with a ramp-up
        step = [indices(stream.microbatches(consumed, global_batch // (2 * dp))) for stream in streams]
        in_order = [i for m in range(global_batch // (2 * dp)) for rank in range(dp) for i in step[rank][m]]
        assert in_order == list(range(consumed, consumed + global_batch))
        consumed += global_batch
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 4, 6, 37])
def test_resume_anywhere(start, workers):
    stream = SampleStream(Numbered(), 2, 1, 2, num_workers=workers)
    expected = [[start + 2, start + 3], [start + 6, start + 7]]
    assert indices(stream.microbatches(start, 2)) == expected
    assert indices(stream.microbatches(start, 2)) == expected  # going back is going back
    assert indices(stream.microbatches(start + 8, 1)) == [[start + 10, start + 11]]
    stream.close()
    assert indices(stream.microbatches(start, 2)) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_the_last_sample_is_read(workers):
    stream = SampleStream(Numbered(12), 2, 1, 2, num_workers=workers)
    assert indices(stream.microbatches(0, 3)) == [[2, 3], [6, 7], [10, 11]]
    stream.close()


def test_the_end_is_an_error_before_the_step():
    stream = SampleStream(Numbered(10), 2, 0, 2)
    assert indices(stream.microbatches(4, 1)) == [[4, 5]]
    with pytest.raises(ValueError, match="8 to 12 are asked for but the dataset has 10"):
        stream.microbatches(8, 1)
    with pytest.raises(ValueError):
        stream.microbatches(-1, 1)


@pytest.mark.parametrize("arguments", [(0, 0, 1), (1, 1, 1), (1, -1, 2)])
def test_impossible_layouts_are_refused(arguments):
    with pytest.raises(ValueError):
        SampleStream(Numbered(), *arguments)


def test_workers_ignore_signals_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    stream = SampleStream(Naming(), 2, num_workers=2)
    pids = {int(batch["labels"][0, 0]) for batch in stream.microbatches(0, 6)}
    assert len(pids) == 2 and os.getpid() not in pids
    stream.close()
    assert not pids & {process.pid for process in multiprocessing.active_children()}, "close ends them"
    assert torch.equal(torch.get_rng_state(), before)


def test_context_parallel_ranks_share_samples_and_split_their_tokens():
    slices = [(range(0, 1), range(3, 4)), (range(1, 2), range(2, 3))]
    whole = next(SampleStream(Numbered(), 2, 1, 2).microbatches(8, 1))
    for workers in (0, 1):
        streams = [SampleStream(Numbered(), 2, 1, 2, slices=part, num_workers=workers) for part in slices]
        parts = [next(stream.microbatches(8, 1)) for stream in streams]
        assert [part["position_ids"].tolist() for part in parts] == [[[0, 3]] * 2, [[1, 2]] * 2]
        for key, tensor in whole.items():
            columns = torch.cat([part[key] for part in parts], 1)
            assert torch.equal(columns, tensor[:, [0, 3, 1, 2]])
        for stream in streams:
            stream.close()
