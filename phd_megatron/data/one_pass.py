"""One pass over a split, for validation and evaluation: every sample once, for everybody in the same order.

What is a sample, and which come first, depends on the data, the split and the sequence length alone: a run's seed, its
batch size and the number of samples that are asked for have no part in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import SplitPlan, documents_of
from phd_megatron.data.indexed import IndexedInfo
from phd_megatron.data.samples import Sample, Samples
from phd_megatron.data.tokenizers import Tokenizer


def interleave(sizes: list[int], weights: list[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """In which order a pass takes the samples of several data sets, by Megatron's deterministic blending.

    Args:
        sizes: samples of each data set.
        weights: their shares; None takes every sample of every data set, spread evenly.

    Returns:
        Two arrays of the pass's length: the data set, and the sample in it. With weights the pass ends where a data set
        would have to repeat a sample.
    """
    if len(sizes) == 1:
        return np.zeros(sizes[0], np.int16), np.arange(sizes[0])
    from megatron.core.datasets import helpers

    part, sample = np.zeros(sum(sizes), np.int16), np.zeros(sum(sizes), np.int64)
    if weights is None:
        helpers.build_exhaustive_blending_indices(part, sample, np.array(sizes, np.int64), len(sizes))
        return part, sample
    shares = np.array(weights) / sum(weights)
    helpers.build_blending_indices(part, sample, shares, len(sizes), len(part), False)
    repeats = sample >= np.array(sizes)[part]
    end = int(repeats.argmax()) if repeats.any() else len(part)
    return part[:end], sample[:end]


class OnePass(Dataset[Sample]):
    """The samples of a pass, as :func:`interleave` orders them."""

    def __init__(self, parts: Sequence[Samples], weights: list[float] | None) -> None:
        self.parts = parts
        self.part_of, self.sample_of = interleave([len(part) for part in parts], weights)

    def __len__(self) -> int:
        return len(self.part_of)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.parts[self.part_of[index]][int(self.sample_of[index])]


def build_pass(
    run: RunConfig, tokenizer: Tokenizer, plan: SplitPlan, infos: dict[str, IndexedInfo], index: int
) -> OnePass:
    """A pass over split ``index`` (0 training, 1 validation, 2 test), whose data was checked.

    Every process that calls it builds, or reads from the cache, the index for itself.
    """
    from megatron.core.datasets.utils import Split

    from phd_megatron.data.gpt_index import OrderedGPTDataset, index_config

    config = index_config(run, tokenizer, plan, infos, index)
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's notes on read-only arrays
        for prefix in plan.prefixes:
            documents = documents_of(infos[prefix], plan.share)
            low_level = OrderedGPTDataset.build_low_level_dataset(prefix, config)
            parts.append(
                OrderedGPTDataset(
                    low_level,
                    prefix,
                    np.arange(documents.start, documents.stop, dtype=np.int32),
                    None,
                    Split(index),
                    config,
                )
            )
    return OnePass(parts, plan.weights)
