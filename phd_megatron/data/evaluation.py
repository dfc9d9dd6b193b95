"""One pass over a split, for evaluation: every sample once, in batches that all ranks share out evenly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from phd_megatron.config.schema import DataConfig, RunConfig
from phd_megatron.data.blend import SPLIT_NAMES, SPLITS, SplitPlan, check_split, plan_splits
from phd_megatron.data.datasets import check_data
from phd_megatron.data.indexed import check_indexed
from phd_megatron.data.one_pass import build_pass, interleave
from phd_megatron.data.samples import Sample, Samples
from phd_megatron.data.tokenizers import Tokenizer
from phd_megatron.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass: mean ``loss`` in nats a token over the ``tokens`` that carry loss.

    ``copy_losses`` is the same mean of every copy's output, where it was asked for: a diagnostic, whose last value is
    the loss.
    """

    loss: float
    tokens: int
    samples: int
    seconds: float
    copy_losses: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where that is too large for a number, and no number where the loss is none."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.6f} | perplexity {self.perplexity:.4f} | {self.tokens} tokens of {self.samples} samples "
            f"| {self.seconds:.1f} s"
        )


class EvaluationProgress:
    """Says every ``seconds`` how far an evaluation is.

    Args:
        samples: of the whole pass.
        say: where a line goes.
    """

    def __init__(self, samples: int, say: Callable[[str], None], seconds: float = 30.0) -> None:
        self.samples, self._say, self._seconds = samples, say, seconds
        self.began = self._said = time.perf_counter()

    def advance(self, done: int, total: torch.Tensor) -> None:
        """``done`` samples, filling included, gave ``total`` [2]: summed loss and token count."""
        now = time.perf_counter()
        if now - self._said >= self._seconds:
            self._said = now
            loss, tokens = total.tolist()
            self._say(f"{min(done, self.samples)} of {self.samples} samples | loss so far {loss / max(tokens, 1):.4f}")

    def finish(self, total: torch.Tensor) -> Evaluation:
        """The result.

        Raises:
            UserError: when no token carries loss.
        """
        loss, tokens = total.tolist()
        if not tokens:
            raise UserError(f"none of the {self.samples} samples has a token that carries loss; evaluate other data")
        return Evaluation(loss / tokens, int(tokens), self.samples, time.perf_counter() - self.began)


class EvenBatches(Dataset[Sample]):
    """The first ``samples`` items of ``dataset``, filled up to a multiple of ``multiple``.

    A filler is the first item without loss on any token.
    """

    def __init__(self, dataset: Samples, samples: int, multiple: int) -> None:
        self.dataset, self.samples, self.length = dataset, samples, -(-samples // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        if index < self.samples:
            return dict(self.dataset[index])
        item = self.dataset[0]
        return {**item, "loss_mask": torch.zeros_like(item["loss_mask"])}


@dataclass(frozen=True)
class Selection:
    """What is evaluated: ``samples`` of the ``available`` ones in a pass over a split of some data."""

    split: str  #: training, validation or test; all where the data is not split
    data: tuple[str, ...]  #: as a blend is written: PREFIX ..., or WEIGHT PREFIX pairs
    share: tuple[float, float]  #: the part of each prefix's documents, from and to, of 1
    samples: int
    available: int
    seq_length: int

    def __str__(self) -> str:
        begin, end = (f"{100 * border:.10g}" for border in self.share)
        words = " ".join(self.data)
        which = f"the {self.split} split of {words} ({begin} to {end} % of its documents)"
        return (
            f"{f'all of {words}' if self.split == 'all' else which}: {self.samples} of {self.available} samples of "
            f"{self.seq_length} tokens"
        )


def check_selection(data: DataConfig, split: str, asked: int | None) -> SplitPlan:
    """The part of :func:`select_samples` that needs neither a model nor a tokenizer, for before either is loaded.

    Raises:
        UserError: when the split is empty, a file of it is missing or no data, or no sample is asked for.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--num-samples {asked}: give at least 1, or leave it out for all")
    index = SPLITS.index(split)
    plan = plan_splits(data)[index]
    if plan is None:
        raise UserError(
            f"the data gives the {SPLIT_NAMES[index]} split nothing; choose another --subset or --split, or name data "
            "with --data-path"
        )
    for prefix in plan.prefixes:
        check_indexed(prefix)
    return plan


def _one_sample_of(index: int) -> tuple[int, int, int]:
    """Of training, validation and test split: a sample of one, none of the others."""
    return int(index == 0), int(index == 1), int(index == 2)


def select_samples(run: RunConfig, tokenizer: Tokenizer, split: str, asked: int | None) -> Selection:
    """One pass over ``split`` (``train``, ``valid``, ``test``), or as many samples as asked for; checks the data.

    A sample is ``seq_length`` tokens and the next one; what is left of a data set at its end is not read.

    Raises:
        UserError: when the split is empty or too small, or more samples are asked for than a pass has.
    """
    index, length = SPLITS.index(split), run.model.seq_length
    plan = check_selection(run.data, split, asked)
    wanted = _one_sample_of(index)
    tokens = check_split(plan, check_data(run, tokenizer, wanted), length, index)
    available = len(interleave([(count - 1) // length for count in tokens], plan.weights)[0])
    if asked is not None and asked > available:
        why = ": with weights it ends where a data set would have to repeat" if plan.weights else ""
        raise UserError(
            f"--num-samples {asked}: one pass over the {SPLIT_NAMES[index]} split has {available} samples of {length} "
            f"tokens{why}; ask for at most that, or leave it out for all"
        )
    name = "all" if run.data.data_path and plan.share == (0.0, 1.0) else SPLIT_NAMES[index]
    return Selection(name, plan.words, plan.share, asked or available, available, length)


def evaluation_dataset(run: RunConfig, tokenizer: Tokenizer, split: str, samples: int, multiple: int) -> EvenBatches:
    """The first ``samples`` samples of a pass over a split, filled up to a multiple of ``multiple``."""
    index = SPLITS.index(split)
    plan = plan_splits(run.data)[index]
    assert plan is not None  # checked by select_samples
    wanted = _one_sample_of(index)
    dataset = build_pass(run, tokenizer, plan, check_data(run, tokenizer, wanted), index)
    return EvenBatches(dataset, samples, multiple)
