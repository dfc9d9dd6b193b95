"""Checkpoints of Megatron-Core's own GPT model: runs of ours go on from them, and theirs from ours.

``stock_program.py`` trains stock models and saves them as Megatron-LM, Bridge and bare Megatron-Core do, all with
Megatron-Core's public functions. Ours then trains under torchrun what is left, and must meet the stock run's losses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, program_environment, read_metrics
from .stock_program import BATCH, LR, STEPS, VOCAB

pytestmark = pytest.mark.timeout(900)

PROGRAM = Path(__file__).parent / "stock_program.py"
SAVED = 3
#: losses of a step; the stock run adds in another order
SAME, SAME_IN_BF16 = 2e-5, 1e-3
JOBS: dict[str, dict[str, object]] = {
    "llama": {"writer": "megatron-lm"},
    "llama-plain": {"model": "llama", "writer": "megatron-lm", "plain": True},
    "llama-dp": {"model": "llama", "writer": "megatron-lm", "kind": "dp_reshardable"},
    "llama-bf16": {"model": "llama", "writer": "megatron-lm", "bf16": True},
    "llama-bf16-plain": {"model": "llama", "writer": "bridge", "bf16": True, "plain": True},
    "qwen3": {"writer": "bridge"},
    "experts": {"writer": "megatron-lm"},
    "some-experts": {"writer": "core"},
}
EXPERTS: dict[str, object] = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"},
    **{"moe-token-dispatcher-type": "alltoall", "moe-router-load-balancing-type": "none"},
}
UNTIED = {"untie-embeddings-and-output-weights": True}
MODELS: dict[str, dict[str, object]] = {
    "llama": {**UNTIED, "rotary-base": 500000},
    "qwen3": {"norm-scheme": "pre_qk", "kv-channels": 12, "rotary-base": 1000000},
    "experts": {**UNTIED, **EXPERTS},
    "some-experts": {
        **{**UNTIED, **EXPERTS, "moe-layer-freq": [0, 1, 1, 1], "moe-shared-expert-intermediate-size": 16},
        **{"moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True},
    },
}
PLAIN = {"use-distributed-optimizer": "false"}
#: what goes on from a stock checkpoint, optimizer and all: (stock job, ranks, options)
RESUMES: dict[str, tuple[str, int, dict[str, object]]] = {
    "llama": ("llama", 1, {}),
    "llama-plain-to-plain": ("llama-plain", 1, PLAIN),
    "llama-plain-to-distributed": ("llama-plain", 1, {}),
    "llama-distributed-to-plain": ("llama", 1, PLAIN),
    "llama-tp2+sp": ("llama", 2, {"tensor-model-parallel-size": 2, "sequence-parallel": True}),
    "llama-pp2": ("llama", 2, {"pipeline-model-parallel-size": 2}),
    "llama-bf16": ("llama-bf16", 1, {"bf16": True}),
    "llama-bf16-plain-to-plain": ("llama-bf16-plain", 1, {"bf16": True, **PLAIN}),
    "llama-bf16-plain-to-distributed": ("llama-bf16-plain", 1, {"bf16": True}),
    "llama-bf16-tp2": ("llama-bf16", 2, {"bf16": True, "tensor-model-parallel-size": 2}),
    "qwen3": ("qwen3", 1, {}),
    "qwen3-dp2": ("qwen3", 2, {}),
    "experts": ("experts", 1, {}),
    "experts-ep2": ("experts", 2, {"expert-model-parallel-size": 2}),
}
#: and what takes the parameters alone
FINETUNES: dict[str, tuple[str, int, dict[str, object]]] = {
    "llama-dp": ("llama-dp", 1, {}),
    "some-experts": ("some-experts", 1, {}),
    "some-experts-pp2": ("some-experts", 2, {"pipeline-model-parallel-size": 2}),
}
EXPORTED = ("llama", "qwen3", "experts", "some-experts")


def model_of(job: str) -> str:
    return str(JOBS[job].get("model", job))


def options(job: str, data: Path, **more: object) -> dict[str, object]:
    return {
        **{**TINY_MODEL, **MODELS[model_of(job)], "vocab-size": VOCAB, "layernorm-epsilon": 1e-6, "data-path": data},
        **{"micro-batch-size": 2, "global-batch-size": BATCH, "train-iters": STEPS, "lr": LR, "min-lr": 0},
        **{"lr-warmup-iters": 2, "lr-decay-style": "linear", "weight-decay": 0, "adam-beta2": 0.95, "device": "cpu"},
        **{"eval-iters": 0, "log-interval": 1, **{name.replace("_", "-"): value for name, value in more.items()}},
    }


def stock(jobs: list[dict[str, object]], where: Path) -> list[dict[str, list[float]]]:
    path = where / "jobs.json"
    path.write_text(json.dumps(jobs, default=str), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), str(path)],
        env=program_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: list[dict[str, list[float]]] = json.loads(done.stdout.rsplit("RESULT ", 1)[1])
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def theirs(documents: Path, root: Path) -> dict[str, dict[str, list[float]]]:
    """Losses of each stock job, whose checkpoints are in ``root / job``."""
    jobs = [
        {"model": name, "data": documents, "steps": SAVED, "save": root / name, **job} for name, job in JOBS.items()
    ]
    return dict(zip(JOBS, stock(jobs, root), strict=True))


@pytest.fixture(scope="module")
def ours(documents: Path, root: Path, theirs: Any, run_cases: Any) -> None:
    """``<case>.jsonl`` of RESUMES and FINETUNES, and what :func:`there_and_back` makes."""

    def case(name: str, job: str, **more: object) -> list[str]:
        places = {"load": root / job, "metrics-file": root / f"{name}.jsonl"}
        return ["pretrain", *flags({**options(job, documents), **places, **more})]

    for ranks in (1, 2):
        cases = [case(name, job, **more) for name, (job, wanted, more) in RESUMES.items() if wanted == ranks]
        for name, (job, wanted, more) in FINETUNES.items():
            if wanted == ranks:
                cases.append(case(f"tune-{name}", job, finetune=True, **more))
        if ranks == 1:
            cases += [step for name in EXPORTED for step in there_and_back(name, root, case)]
        run_cases(ranks, cases)


def there_and_back(name: str, root: Path, case: Callable[..., list[str]]) -> Iterator[list[str]]:
    """A step of ours (``own-``), exported (``to-``); then two steps from either, K = 1 and 2."""
    own, to = root / f"own-{name}", root / f"to-{name}"
    yield case(f"first-{name}", name, save=own, **{"finetune": True, "exit-interval": 1})
    yield ["export", "--to", "megatron", "--checkpoint", str(own), "--output", str(to)]
    for source in (own, to):
        for repeat in (1, 2):
            more = {"load": source, "finetune": True, "exit-interval": 2, "phd-repeat": repeat}
            yield case(f"{source.name}-{repeat}", name, **more)


@pytest.mark.parametrize("name", RESUMES)
def test_a_run_goes_on_from_a_stock_checkpoint(
    theirs: dict[str, dict[str, list[float]]], ours: None, root: Path, name: str
) -> None:
    steps = read_metrics(root / f"{name}.jsonl")
    assert [step["iteration"] for step in steps] == [4, 5, 6]
    assert [step["consumed_samples"] for step in steps] == [32, 40, 48]
    expected = theirs[RESUMES[name][0]]["losses"]
    same = SAME_IN_BF16 if "bf16" in name else SAME
    assert [step["lm_loss"] for step in steps] == pytest.approx(expected[SAVED:], abs=same)
    assert expected[SAVED] - expected[-1] > 0.2  # what the optimizer holds matters


@pytest.mark.parametrize("name", FINETUNES)
def test_parameters_are_those_of_the_stock_model(
    theirs: dict[str, dict[str, list[float]]], ours: None, root: Path, name: str
) -> None:
    first = read_metrics(root / f"tune-{name}.jsonl")[0]
    assert first["iteration"] == 1
    assert first["lm_loss"] == pytest.approx(theirs[FINETUNES[name][0]]["evaluated"][0], abs=SAME)


@pytest.fixture(scope="module")
def evaluated(documents: Path, root: Path, ours: None) -> dict[str, list[float]]:
    """What Megatron-Core's own model makes of each step's samples with the parameters of our exports."""
    jobs: list[dict[str, object]] = [
        {"model": name, "data": documents, "load": root / f"to-{name}" / "iter_0000001"} for name in EXPORTED
    ]
    return {name: done["evaluated"] for name, done in zip(EXPORTED, stock(jobs, root), strict=True)}


@pytest.mark.parametrize("name", EXPORTED)
def test_the_stock_model_loads_an_export(evaluated: dict[str, list[float]], root: Path, name: str) -> None:
    first = read_metrics(root / f"own-{name}-1.jsonl")[0]
    assert evaluated[name][0] == pytest.approx(first["lm_loss"], abs=SAME)
    assert (root / f"to-{name}" / "latest_checkpointed_iteration.txt").read_text() == "1\n"


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_comes_back(ours: None, root: Path, name: str, repeat: int) -> None:
    own, back = ([step["lm_loss"] for step in read_metrics(root / f"{w}-{name}-{repeat}.jsonl")] for w in ("own", "to"))
    assert own == back and len(own) == 2 and own[0] != own[1]
