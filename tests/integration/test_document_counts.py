"""Operations of a step are those of its documents, whichever ranks hold them, and who has most of them is said."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from phd_megatron.config.architecture import kv_policy
from phd_megatron.config.load import load_run_config
from phd_megatron.config.resolve import resolve
from phd_megatron.data.datasets import build_datasets
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.planning.flops import forward_flops

from .conftest import TINY_MODEL, flags, read_metrics, run_program

STEPS, BATCH, LENGTH = 2, 4, 24
OPTIONS: dict[str, object] = {
    **TINY_MODEL,
    **{"phd-repeat": 3, "phd-window": 4, "phd-chunk": 8, "seq-length": LENGTH, "eval-iters": 0, "device": "cpu"},
    **{"micro-batch-size": 1, "global-batch-size": BATCH, "train-iters": STEPS, "log-interval": STEPS, "split": "1"},
}
SEVERAL = {"dp2": (2, {}), "cp2": (2, {"context-parallel-size": 2}), "pp2": (2, {"pipeline-model-parallel-size": 2})}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentences")
    lines = [json.dumps({"text": f"{i} and {i * i}" if i % 3 else "lorem ipsum dolor sit " * 3}) for i in range(99)]
    (directory / "text.jsonl").write_text("\n".join(lines))
    done = run_program("prepare", "--input", directory / "text.jsonl", "--output-prefix", directory / "data")
    assert done.returncode == 0, done.stdout
    return directory / "data"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layout", "restart"), [("one", False), *((layout, True) for layout in ("one", *SEVERAL))])
def test_operations_of_a_step(
    sentences: Path,
    tmp_path: Path,
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
    layout: str,
    restart: bool,
) -> None:
    options = {**OPTIONS, "data-path": str(sentences), "reset-attention-mask": True, "reset-position-ids": restart}
    words = flags({**options, "metrics-file": tmp_path / "metrics.jsonl"})
    ranks, more = SEVERAL.get(layout, (1, {}))
    if ranks == 1:
        assert run_program("pretrain", *words).returncode == 0
    else:
        torchrun(ranks, "-m", "phd_megatron", "pretrain", *words, *flags(more))
    expected, most = counted(options)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    found = row["tflops_per_gpu"] * row["iteration_seconds"] * STEPS * ranks * 1e12
    assert found == pytest.approx(expected) and found < most
    assert row["consumed_flops"] == most
    assert (row["attention_max_over_mean"] > 1.001) == (layout in ("dp2", "cp2"))


def counted(options: dict[str, object]) -> tuple[float, float]:
    """Of all steps, sample by sample; and as if every sample were one document."""
    from phd_megatron.model.transformer_config import transformer_field_types

    run = load_run_config(flags(options), transformer_fields=transformer_field_types()).config
    resolve(run)
    run.model.vocab_size = 257
    tokenizer = load_tokenizer("byte")
    samples = build_datasets(run, tokenizer, (STEPS * BATCH, 0, 0))[0]
    assert samples is not None
    whole, model, policy = forward_flops(run.model, 272), run.model, kv_policy(run.model)
    total = 0
    for index in range(STEPS * BATCH):
        ends = (samples[index]["tokens"][:-1] == tokenizer.eod).nonzero().flatten() + 1
        lengths = [two - one for one, two in itertools.pairwise([0, *ends.tolist(), LENGTH])]
        layers = (model.num_layers or 0) - 1
        pairs = layers * sum(policy.document_pairs(lengths)) + sum(policy.document_pairs(lengths, 1))
        total += whole.linear + whole.head + 4 * (model.hidden_size or 0) * pairs
    return 3 * total, STEPS * BATCH * whole.training
