"""``evaluate`` on an export: the loss against a loop over samples, one at a time, by the definition."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.evaluation import Evaluation
from phd_megatron.data.preprocess import prepare
from phd_megatron.data.tokenizers import ByteTokenizer
from phd_megatron.huggingface.evaluation import evaluate_model

SEQ, SAMPLES = 16, 7


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_the_loss_is_the_mean_over_the_tokens_that_carry_loss(make_model, tmp_path, masked):
    """Seven samples in batches of four: the filler of the last batch counts for nothing."""
    words = [f"{i:03}" * (1 + i * i % 4) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in words))
    prepare([tmp_path / "a.jsonl"], tmp_path / "a", progress=False)
    run = RunConfig()
    run.model.seq_length, run.training.micro_batch_size = SEQ, 4
    run.data.data_path, run.data.split, run.data.num_workers = [str(tmp_path / "a")], "0,1", 0
    run.data.eod_mask_loss = masked
    model = make_model(vocab_size=257, norm_scheme="hybrid_star", phd_repeat=2, phd_window=4)
    found = evaluate_model(model, run, ByteTokenizer(), "valid", SAMPLES, print)

    stream = [token for word in words for token in [*word.encode(), 256]]
    samples = [stream[i : i + SEQ + 1] for i in range(0, len(stream) - SEQ, SEQ)]
    order = np.random.RandomState(20250421).permutation(len(samples))[:SAMPLES]
    total = count = 0
    for number in order:
        sample = samples[number]
        scores = model(torch.tensor([sample[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        for place in range(SEQ):
            if not (masked and sample[place] == 256):  # what follows an end cannot be known
                total -= scores[place, sample[place + 1]].item()
                count += 1
    assert (found.tokens, found.samples) == (count, SAMPLES) and (count < SAMPLES * SEQ) == masked
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.e ** (total / count), rel=1e-4)


def test_perplexity_has_an_end():
    assert Evaluation(2.0, 1, 1, 0.0).perplexity == pytest.approx(7.38905609893065)
    assert Evaluation(0.0, 1, 1, 0.0).perplexity == 1.0
    assert Evaluation(800.0, 1, 1, 0.0).perplexity == math.inf
    assert math.isnan(Evaluation(math.nan, 1, 1, 0.0).perplexity)
