"""Training samples made of whole documents where they fit: ``--packing best_fit``.

Which pieces of documents are together in a sample depends on the documents of the split and the sequence length alone
(`packing.py`). An epoch has every sample once, in an order drawn from the seed and the epoch's number. In the index
cache three arrays say it:

========  =====  ==================================================================================================
document  int32  ``[R, 4]``, grouped by sample: sequence, its first token, number of tokens, and what begins there
                 (:data:`GOES_ON`, :data:`PIECE`, :data:`CUT`). A piece has a row for each of its sequences, since a
                 long document is several.
sample    int64  ``[B + 1]``: sample b is made of rows ``sample[b]`` to ``sample[b + 1]``
shuffle   int64  ``[N]``: the N samples in their order, epoch after epoch
========  =====  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from phd_megatron.data.gpt_index import IndexedGPTDataset
from phd_megatron.data.indexed import IndexedInfo
from phd_megatron.data.open_file import FileArray
from phd_megatron.data.packing import Packing, best_fit
from phd_megatron.data.samples import Sample, Samples
from phd_megatron.errors import UserError
from phd_megatron.phd.documents import positions_in_documents, starts_of_first

GOES_ON, PIECE, CUT = range(3)
"""The row goes on with the one before, begins a piece, or begins the first piece of a document that has several."""


class PackedGPTDataset(IndexedGPTDataset):
    """``GPTDataset`` of packed samples. The class's name is part of the cache's key."""

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, idx: int | None) -> Sample:
        """A sample; the first one without loss where ``idx`` is None, as in Megatron."""
        text, first = self._text(int(self.shuffle_index[idx or 0]))
        filled = len(text)
        whole = torch.full((self.config.sequence_length + 1,), self.config.tokenizer.eod)
        whole[:filled] = torch.from_numpy(text)
        begins = torch.zeros(len(whole), dtype=torch.bool)
        begins[first] = True
        if filled < len(whole):
            begins[filled] = True  # what fills the rest is a document of its own
        tokens = whole[:-1].contiguous()
        loss_mask = (~begins[1:]).float()  # nothing says how the next document begins
        loss_mask[filled:] = 0.0
        if self.config.eod_mask_loss:
            loss_mask[tokens == self.config.tokenizer.eod] = 0.0
        if idx is None:
            loss_mask.zero_()
        sample = {
            "tokens": tokens,
            "labels": whole[1:].contiguous(),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(len(tokens)),
        }
        if self.config.separate_documents:
            starts = starts_of_first(begins[:-1])
            sample["document_starts"] = starts
            if self.config.restart_positions:
                sample["position_ids"] = positions_in_documents(starts)
        return sample

    def _text(self, number: int) -> tuple[np.ndarray, list[int]]:
        """Token ids of sample ``number`` without filling, and where its pieces begin.

        Raises:
            UserError: when the index does not fit the data, which a damaged cache does not.
        """
        texts, first, filled = [], [], 0
        try:
            if not 0 <= number < len(self.sample_index) - 1:
                raise IndexError(f"packed sample {number} of {len(self.sample_index) - 1}")
            begin, end = _rows(self.sample_index, number, number + 2).tolist()
            for sequence, start, length, kind in _rows(self.document_index, begin, end).tolist():
                if not 0 <= sequence < len(self.dataset):
                    raise IndexError(f"sequence {sequence} of {len(self.dataset)}")
                if kind != GOES_ON:
                    first.append(filled)
                texts.append(self.dataset.get(sequence, start, length))
                filled += length
            if not 0 < filled <= self.config.sequence_length + 1 or first[:1] != [0]:
                raise ValueError(f"{filled} tokens of documents that begin at {first[:9]}")
        except (IndexError, ValueError) as error:
            raise self._damaged(number, str(error)) from error
        return np.concatenate(texts).astype(np.int64), first

    def _build_in_memory(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert self.dataset_path is not None
        info = self.config.infos[self.dataset_path]
        sequences = range(int(self.indices[0]), int(self.indices[-1]) + 1)
        borders = document_borders(info, sequences)
        tokens = np.zeros(len(sequences) + 1, np.int64)
        np.cumsum(self.dataset.sequence_lengths[sequences.start : sequences.stop], out=tokens[1:])
        packing = best_fit(np.diff(tokens[borders]), self.config.sequence_length + 1)
        if not packing.samples:
            raise UserError(
                f"packing=best_fit: no document of {self.dataset_path!r} in the training split has two tokens, a first "
                "one and one to predict; give other data, or use packing none"
            )
        document, sample = _by_sequence(packing, tokens, borders)
        document[:, 0] += sequences.start
        wanted = packing.samples if self.num_samples is None else self.num_samples
        return document, sample, epochs(packing.samples, wanted, self.config.random_seed)


def document_borders(info: IndexedInfo, sequences: range) -> np.ndarray:
    """``[D + 1]``: which of ``sequences`` are the first of a document, counted from the first of all, and their number.

    A document whose sequences lie in two splits is one in each.
    """
    marks = info.marks.read()
    inside = marks[(marks > sequences.start) & (marks < sequences.stop)]
    borders = np.concatenate([[0], inside - sequences.start, [len(sequences)]])
    return borders[np.diff(borders, prepend=-1) > 0]  # documents without sequences are none


def _by_sequence(packing: Packing, tokens: np.ndarray, borders: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and samples of the index from pieces of documents.

    Args:
        tokens: ``[S + 1]``, how many come before each sequence.
        borders: ``[D + 1]``, the first sequence of each document.
    """
    documents, first, lengths = packing.pieces.T
    begin = tokens[borders[documents]] + first
    end = begin + lengths
    # A token lies in the last sequence that begins at or before it; sequences without tokens have none.
    one = np.searchsorted(tokens, begin, "right") - 1
    counts = np.searchsorted(tokens, end, "left") - one
    piece = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
    sequence = one[piece] + number
    start = np.maximum(begin[piece], tokens[sequence])
    length = np.minimum(end[piece], tokens[sequence + 1]) - start
    is_cut = (first == 0) & (end < tokens[borders[documents + 1]])
    kind = np.where(number > 0, GOES_ON, np.where(is_cut, CUT, PIECE)[piece])
    rows = np.stack([sequence, start - tokens[sequence], length, kind], 1)[length > 0].astype(np.int32)
    filled = np.bincount(piece[length > 0], minlength=len(counts))
    return rows, np.concatenate([[0], np.cumsum(filled)])[packing.borders]


def epochs(samples: int, wanted: int, seed: int) -> np.ndarray:
    """``[wanted]`` of ``samples`` samples, every epoch in an order of its own.

    numpy promises that these numbers stay in later releases.
    """
    orders = (np.random.RandomState([seed, epoch]).permutation(samples) for epoch in range(-(-wanted // samples)))
    return np.concatenate([np.empty(0, np.int64), *orders])[:wanted]


def _rows(array: np.ndarray | FileArray, begin: int, end: int) -> np.ndarray:
    return array.read(begin, end) if isinstance(array, FileArray) else array[begin:end]


@dataclass(frozen=True)
class PackingStatistics:
    """What packing made of the training documents of ``prefix``."""

    prefix: str
    room: int  #: tokens of a sample, the last target included
    samples: int
    pieces: int  #: whole documents and parts of cut ones
    cut: int  #: documents in several pieces
    tokens: int

    @classmethod
    def of(cls, dataset: PackedGPTDataset) -> PackingStatistics:
        """Reads the whole index."""
        rows: np.ndarray | FileArray = dataset.document_index
        pieces = cut = tokens = 0
        for part in rows.chunks() if isinstance(rows, FileArray) else [rows]:
            pieces += int((part[:, 3] != GOES_ON).sum())
            cut += int((part[:, 3] == CUT).sum())
            tokens += int(part[:, 2].sum(dtype=np.int64))
        samples = len(dataset.sample_index) - 1
        return cls(str(dataset.dataset_path), dataset.config.sequence_length + 1, samples, pieces, cut, tokens)

    @property
    def padding(self) -> float:
        """The share of the room that no document fills."""
        return 1 - self.tokens / (self.samples * self.room)

    def __str__(self) -> str:
        return (
            f"packing best_fit of {self.prefix}: {self.samples:,} samples an epoch, {self.pieces / self.samples:.2f} "
            f"documents or parts of one in a sample, {self.cut:,} documents cut, {100 * self.padding:.3f} % padding"
        )


def packing_statistics(dataset: Samples | None) -> Iterator[PackingStatistics]:
    """Of each prefix that a training set packs; all blocks of its order have the same samples."""
    if isinstance(dataset, PackedGPTDataset):
        yield PackingStatistics.of(dataset)
        return
    inner: Iterable[Samples] = [*getattr(dataset, "blocks", ())[:1], *getattr(dataset, "datasets", ())]
    for part in inner:
        yield from packing_statistics(part)
