"""Micro-batches in an order that depends on the number of consumed samples only.

Micro-batch m of a step that starts at sample c is, for data-parallel rank r of d, the samples
c + (m * d + r) * b + [0, b). A step of M micro-batches therefore covers [c, c + M * d * b) for any d, and over steps
the stream of one rank is contiguous, whatever the batch-size ramp-up makes of M.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from phd_megatron.data.samples import Sample, Samples
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import usable_cores

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "document_starts")  # the last one where it is there
_MOST_WORKERS = 64


def check_workers(number: int) -> None:
    """Refuse more reading processes than this machine can start in reasonable time.

    Raises:
        UserError: with what would do.
    """
    cores = usable_cores()
    if number > (most := max(_MOST_WORKERS, 4 * cores)):
        raise UserError(
            f"num_workers={number}: each rank starts that many processes to read ahead, and {cores} cores can be "
            f"used here; a few are enough, and at most {most} are taken"
        )


class _Answers(Dataset[Sample | UserError]):
    """The samples of a dataset; a refusal is an answer too, since torch would hand it on with a worker's traceback."""

    def __init__(self, dataset: Samples) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Sample | UserError:
        try:
            return self._dataset[index]
        except UserError as error:
            return error


def _collate(samples: list[Sample | UserError], slices: Sequence[range] | None = None) -> Sample | UserError:
    refusal = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if refusal is not None:
        return refusal
    whole = [sample for sample in samples if not isinstance(sample, UserError)]
    keys = [key for key in KEYS if key in whole[0]]
    batch = {key: torch.stack([sample[key] for sample in whole]) for key in keys}
    if slices is None:
        return batch
    return {key: torch.cat([x[:, part.start : part.stop] for part in slices], 1) for key, x in batch.items()}


def _quiet_worker(worker: int) -> None:
    """Signals that ask a run to stop reach the whole process group; the trainer decides when, or a save breaks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


class _Positions(Sampler[list[int]]):
    """Sample indices of one rank's micro-batches from ``start`` on until ``length``."""

    def __init__(self, start: int, length: int, size: int, rank: int, ranks: int) -> None:
        self.start, self.length, self.size, self.rank, self.ranks = start, length, size, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.start + self.rank * self.size
        while begin + self.size <= self.length:
            yield [*range(begin, begin + self.size)]
            begin += self.ranks * self.size


class SampleStream:
    """Micro-batches of a map-style dataset for one data-parallel rank.

    Asking beyond the end of the dataset is an error. With ``num_workers`` > 0 that many processes read ahead; the order
    and contents are the same. ``slices`` are the token positions of a context-parallel rank; all ranks of a
    context-parallel group read the same samples.
    """

    def __init__(
        self,
        dataset: Samples,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        slices: Sequence[range] | None = None,
    ) -> None:
        if micro_batch_size < 1 or not 0 <= dp_rank < dp_size or num_workers < 0:
            raise ValueError(
                f"micro_batch_size {micro_batch_size} must be positive, dp_rank {dp_rank} below dp_size {dp_size} and "
                f"num_workers {num_workers} not negative"
            )
        self._dataset, self._length = dataset, len(dataset)
        self._size, self._rank, self._ranks = micro_batch_size, dp_rank, dp_size
        self._workers, self._pin, self._slices = num_workers, pin_memory, slices
        self._iterator: Iterator[dict[str, torch.Tensor] | UserError] | None = None
        self._next = -1  # consumed samples at which the iterator's next micro-batch lies

    def __len__(self) -> int:
        """Samples of the dataset."""
        return self._length

    def microbatches(self, consumed_samples: int, num_microbatches: int) -> Iterator[dict[str, torch.Tensor]]:
        """The ``num_microbatches`` of the step that starts at ``consumed_samples``.

        Each is a dict of tokens, labels, position_ids int64 and loss_mask float32, all [micro_batch_size, seq_length],
        or with as many columns as ``slices`` have positions.
        Steps that follow each other continue one read-ahead; another ``consumed_samples`` starts a new one. An
        iterator is to be drawn before the next is asked for. Raises ValueError beyond the end.
        """
        end = consumed_samples + num_microbatches * self._ranks * self._size
        if consumed_samples < 0 or end > self._length:
            raise ValueError(
                f"samples {consumed_samples} to {end} are asked for but the dataset has {self._length}; build it for "
                f"more samples"
            )
        return self._draw(consumed_samples, num_microbatches)

    def _draw(self, consumed_samples: int, num_microbatches: int) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(num_microbatches):
            if self._iterator is None or self._next != consumed_samples:
                self._restart(consumed_samples)
            assert self._iterator is not None
            consumed_samples += self._ranks * self._size
            self._next = consumed_samples
            batch = next(self._iterator)
            if isinstance(batch, UserError):
                self.close()  # workers ignore signals, so the interpreter's end would wait for them
                raise batch
            yield batch

    def _restart(self, consumed_samples: int) -> None:
        self.close()
        positions = _Positions(consumed_samples, self._length, self._size, self._rank, self._ranks)
        loader: DataLoader[Sample | UserError] = DataLoader(
            _Answers(self._dataset),
            batch_sampler=positions,
            num_workers=self._workers,
            collate_fn=partial(_collate, slices=self._slices),
            worker_init_fn=_quiet_worker,
            pin_memory=self._pin,
            # The base seed of workers is drawn from here, not from the global generator, whose state is the model's.
            generator=torch.Generator().manual_seed(0),
        )
        self._iterator = iter(loader)

    def close(self) -> None:
        """Stop the workers. The stream can be used again."""
        self._iterator = None
        self._next = -1
