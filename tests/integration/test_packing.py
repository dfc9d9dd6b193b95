"""``--packing best_fit`` end to end: the same losses on one rank and two, and over an interruption bit for bit."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics, run_program

pytestmark = pytest.mark.timeout(900)

STEPS, INTERRUPTED = 8, 5
BIT_EQUAL = ("iteration", "consumed_samples", "lm_loss", "grad_norm", "learning_rate", "validation_loss")
OPTIONS: dict[str, object] = {
    **TINY_MODEL,
    **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "phd-window": 5, "phd-chunk": 8, "seq-length": 96},
    **{"packing": "best_fit", "reset-attention-mask": True, "reset-position-ids": True},
    **{"micro-batch-size": 1, "global-batch-size": 8, "train-iters": STEPS, "lr": 1e-2, "device": "cpu"},
    # 64 samples, which are several epochs of a tenth of the data
    **{"split": "10,90,0", "eval-iters": 1, "eval-interval": 4, "log-interval": 1},
}
SAID = re.compile(
    r"packing best_fit of \S+: (\d+) samples an epoch, ([\d.]+) documents or parts of one in a sample, (\d+) documents "
    r"cut, ([\d.]+) % padding"
)


class Runs:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.output: dict[str, str] = {}

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return read_metrics(self.root / f"{name}.jsonl")


@pytest.fixture(scope="module")
def runs(
    documents: Path,
    tmp_path_factory: pytest.TempPathFactory,
    torchrun: Callable[..., subprocess.CompletedProcess[str]],
) -> Runs:
    found = Runs(tmp_path_factory.mktemp("packing"))

    def start(name: str, ranks: int, options: dict[str, object]) -> None:
        options = {**options, "metrics-file": found.root / f"{name}.jsonl"}
        if ranks == 1:
            done = run_program("pretrain", *flags(options))
            assert done.returncode == 0, done.stdout
        else:
            done = torchrun(ranks, "-m", "phd_megatron", "pretrain", *flags(options))
        found.output[name] = done.stdout

    whole = {**OPTIONS, "data-path": documents}
    places: dict[str, object] = {"save": found.root / "save"}
    start("one", 1, whole)
    start("two", 2, {**whole, "num-workers": 1})
    start("parts", 2, {**whole, **places, "exit-interval": INTERRUPTED})
    start("parts", 2, {**places, "load": found.root / "save"})  # the checkpoint says the rest
    start("plain", 1, {"load": found.root / "save", "packing": "none", "finetune": True})
    return found


def test_two_ranks_train_as_one(runs: Runs) -> None:
    one, two = runs.metrics("one"), runs.metrics("two")
    assert [line["iteration"] for line in one] == [*range(1, STEPS + 1)]
    for name in ("lm_loss", "grad_norm"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-5)
    validated = [[line["validation_loss"] for line in lines if line["validation_loss"]] for lines in (one, two)]
    assert len(validated[0]) == 2 and validated[1] == pytest.approx(validated[0], rel=1e-5)
    assert one[-1]["lm_loss"] < one[0]["lm_loss"]


def test_a_resumed_run_equals_the_whole_one_bit_for_bit(runs: Runs) -> None:
    whole, parts = runs.metrics("two"), runs.metrics("parts")
    assert [[line[name] for name in BIT_EQUAL] for line in parts] == [
        [line[name] for name in BIT_EQUAL] for line in whole
    ]


def test_statistics_are_said_once(runs: Runs) -> None:
    found = {name: SAID.findall(text) for name, text in runs.output.items()}
    assert len(found["one"]) == 1 and found["one"] == found["two"] == found["parts"] and not found["plain"]
    samples, pieces, cut, padding = map(float, found["one"][0])
    assert samples < STEPS * 8 / 2, "several epochs"
    assert pieces > 1 and cut == 0 and 0 < padding < 10


def test_another_packing_on_resume_is_told(runs: Runs) -> None:
    assert "changed since the checkpoint: packing: 'best_fit' -> 'none'" in runs.output["plain"]
