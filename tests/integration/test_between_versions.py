"""A checkpoint of one Megatron-Core loads under another one, optimizer and all, both ways: the run goes on as it was.

``bash tests/run.sh --mcore VERSION`` runs it in that version's environment and names the first environment's Python in
PHD_OTHER_PYTHON. Each version trains every case whole and half, and finishes the other's half.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(1200)

STEPS, INTERRUPTED = 5, 2
MOE: dict[str, object] = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-router-dtype": "fp32"},
    **{"moe-router-score-function": "sigmoid", "moe-router-enable-expert-bias": True, "moe-layer-freq": [0, 1, 1, 1]},
    **{"moe-router-bias-update-rate": 0.05, "moe-shared-expert-intermediate-size": 16},
}
#: case -> (ranks, options)
CASES: dict[str, tuple[int, dict[str, object]]] = {
    "fp32": (1, {}),
    "bf16-dropout": (1, {"bf16": True, "hidden-dropout": 0.1, "phd-copy-embedding": "vector"}),
    "pre": (1, {"norm-scheme": "pre", "phd-repeat": 1}),
    "moe": (1, MOE),
    "tp2+sp-bf16": (2, {"tensor-model-parallel-size": 2, "sequence-parallel": True, "bf16": True}),
    "dp2+overlap": (2, {"overlap-grad-reduce": True, "overlap-param-gather": True, "ddp-bucket-size": 3000}),
    "dp2-plain-optimizer": (2, {"use-distributed-optimizer": "false"}),
    "pp2+vpp2": (2, {"pipeline-model-parallel-size": 2, "num-virtual-stages-per-pipeline-rank": 2}),
    "ep2": (2, {**MOE, "expert-model-parallel-size": 2, "moe-token-dispatcher-type": "alltoall"}),
}
PYTHONS = {"this": sys.executable, "other": os.environ["PHD_OTHER_PYTHON"]}
DIRECTIONS = [("this", "other"), ("other", "this")]
COMPARED = ("iteration", "consumed_samples", "lm_loss", "grad_norm", "learning_rate", "validation_loss")


def mcore_of(python: str) -> str:
    code = "from importlib.metadata import version; print(version('megatron-core'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def run(case: str, data: Path, root: Path, name: str, **places: object) -> list[str]:
    common: dict[str, object] = {
        **TINY_MODEL,
        **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 8, "train-iters": STEPS},
        **{"data-path": data, "micro-batch-size": 2, "global-batch-size": 8, "lr": 1e-2, "eval-interval": 2},
        **{"eval-iters": 1, "log-interval": 1, "device": "cpu", "metrics-file": root / f"{name}.jsonl"},
    }
    return ["pretrain", *flags({**common, **CASES[case][1], **places})]


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<case>-<python>.jsonl`` of whole runs, ``<case>-<python>-<other>.jsonl`` of what other makes of its half."""
    root = tmp_path_factory.mktemp("versions")
    for ranks in (1, 2):
        names = [case for case, (wanted, _) in CASES.items() if wanted == ranks]
        for python, path in PYTHONS.items():
            whole = [run(case, documents, root, f"{case}-{python}") for case in names]
            half = [
                run(
                    case,
                    documents,
                    root,
                    f"{case}-{python}-half",
                    **{"save": root / f"{case}-{python}", "exit-interval": INTERRUPTED},
                )
                for case in names
            ]
            run_cases(ranks, whole + half, python=path)
        for first, second in DIRECTIONS:
            rest = [
                run(case, documents, root, f"{case}-{first}-{second}", load=root / f"{case}-{first}") for case in names
            ]
            run_cases(ranks, rest, python=PYTHONS[second])
    return root


def test_the_versions_differ() -> None:
    assert mcore_of(PYTHONS["this"]) != mcore_of(PYTHONS["other"])


def lines(path: Path) -> list[list[float]]:
    return [[line[name] for name in COMPARED] for line in read_metrics(path)]


@pytest.mark.parametrize("case", CASES)
def test_both_versions_train_the_same(root: Path, case: str) -> None:
    found = [lines(root / f"{case}-{python}.jsonl") for python in PYTHONS]
    assert len(found[0]) == STEPS and found[0] == found[1]


@pytest.mark.parametrize(("first", "second"), DIRECTIONS, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_under_the_other_version(root: Path, case: str, first: str, second: str) -> None:
    whole, rest = lines(root / f"{case}-{first}.jsonl"), lines(root / f"{case}-{first}-{second}.jsonl")
    assert rest == whole[INTERRUPTED:] and len({line[2] for line in whole}) == STEPS
