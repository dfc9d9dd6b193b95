"""Loss of an exported directory, or of any causal model of transformers, on a prepared data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.evaluation import Evaluation, EvaluationProgress, evaluation_dataset
from phd_megatron.data.loader import SampleStream
from phd_megatron.data.tokenizers import Tokenizer
from phd_megatron.phd.documents import positions_in_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel, run: RunConfig, tokenizer: Tokenizer, split: str, samples: int, say: Callable[[str], None]
) -> Evaluation:
    """One pass of a model in eval mode over ``samples`` samples of a split of the data that ``run`` describes."""
    size = run.training.micro_batch_size
    dataset = evaluation_dataset(run, tokenizer, split, samples, size)
    total = torch.zeros(2, dtype=torch.float64)
    progress = EvaluationProgress(samples, say)
    stream = SampleStream(dataset, size, num_workers=run.data.num_workers)
    try:
        for number, batch in enumerate(stream.microbatches(0, len(dataset) // size), 1):
            tokens, labels, mask = (batch[name].to(model.device) for name in ("tokens", "labels", "loss_mask"))
            documents = {}
            if (starts := batch.get("document_starts")) is not None:  # kept apart, as transformers' own models do
                documents["position_ids"] = positions_in_documents(starts).to(model.device)
            logits = model(tokens, use_cache=False, **documents).logits.float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total += torch.stack([(losses * mask.flatten()).sum(), mask.sum()]).double().cpu()
            progress.advance(number * size, total)
    finally:
        stream.close()
    return progress.finish(total)
