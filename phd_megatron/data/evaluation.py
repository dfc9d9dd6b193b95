"""One pass over a split, for evaluation: every sample once, in batches that all ranks share out evenly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import SPLIT_NAMES, SPLITS, check_split, plan_splits
from phd_megatron.data.datasets import build_datasets, check_data
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
        """``exp(loss)``, infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.6f} | perplexity {self.perplexity:.4f} | {self.tokens} tokens of {self.samples} samples "
            f"| {self.seconds:.1f} s"
        )


class Progress:
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


class EvenBatches(Dataset[dict[str, Any]]):
    """``dataset`` cut or filled up to ``length`` items; a filler is the first item without loss on any token."""

    def __init__(self, dataset: Any, samples: int, length: int) -> None:
        self.dataset, self.samples, self.length = dataset, samples, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        if index < self.samples:
            return dict(self.dataset[index])
        item = dict(self.dataset[0])
        return {**item, "loss_mask": torch.zeros_like(item["loss_mask"])}


def samples_to_evaluate(run: RunConfig, tokenizer: Tokenizer, split: str, asked: int | None) -> int:
    """Samples of one pass over ``split`` (``train``, ``valid``, ``test``), or as many as asked for; checks the data.

    A sample is ``seq_length`` tokens and the next one; what is left of a data set at its end is not read.

    Raises:
        UserError: when the split is empty or too small, or one pass over weighted data sets is asked for.
    """
    if asked is not None and asked < 1:
        raise UserError(f"--num-samples {asked}: give at least 1, or leave it out for all")
    index = SPLITS.index(split)
    plan = plan_splits(run.data)[index]
    if plan is None:
        raise UserError(
            f"the data gives the {SPLIT_NAMES[index]} split nothing; choose another --subset or --split, or name data "
            "with --data-path"
        )
    wanted = tuple(1 if number == index else 0 for number in range(3))
    tokens = check_split(plan, check_data(run, tokenizer, wanted), run.model.seq_length, index)  # type: ignore[arg-type]
    if asked is not None:
        return asked
    if plan.weights is not None:
        raise UserError(
            f"the data sets of the {SPLIT_NAMES[index]} split have weights, so one pass over them is not defined; give "
            "--num-samples, or evaluate one data set at a time with --data-path"
        )
    return sum((count - 1) // run.model.seq_length for count in tokens)


def evaluation_dataset(run: RunConfig, tokenizer: Tokenizer, split: str, samples: int, multiple: int) -> EvenBatches:
    """The first ``samples`` samples of a split, as in training, filled up to a multiple of ``multiple``."""
    index = SPLITS.index(split)
    counts = tuple(samples if number == index else 0 for number in range(3))
    dataset = build_datasets(run, tokenizer, counts)[index]  # type: ignore[arg-type]
    return EvenBatches(dataset, samples, -(-samples // multiple) * multiple)
