"""A run that was interrupted and resumed gives the numbers of one that was not, bit for bit.

The first launch of each world size makes the whole runs and the first halves; the second one, in fresh processes, the
second halves. Losses, gradient norms, learning rates and validation losses are compared as they stand in the metrics
file: JSON writes a float so that reading gives the same one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(900)

STEPS, INTERRUPTED = 6, 3
BIT_EQUAL = (
    *("iteration", "consumed_samples", "lm_loss", "grad_norm", "learning_rate", "global_batch_size"),
    *("skipped_iterations", "validation_loss"),
)
ITERS = {"train-iters": STEPS}
DROPOUT = {"hidden-dropout": 0.1}
RAMP = {"rampup-batch-size": [2, 2, 12], "train-samples": 40, "lr-warmup-samples": 6}
OVERLAP = {"overlap-grad-reduce": True, "overlap-param-gather": True, "ddp-bucket-size": 3000}
TP2 = {"tensor-model-parallel-size": 2}
TOLD_APART = {"phd-copy-positions": "fraction", "phd-copy-embedding": "vector"}
#: world size -> case -> options
CASES: dict[int, dict[str, dict[str, object]]] = {
    1: {
        "fp32": ITERS,
        "bf16": {**ITERS, "bf16": True},
        "dropout": {**ITERS, **DROPOUT},
        "told-apart": {**ITERS, **TOLD_APART, "bf16": True},
        "ramp-up": RAMP,
    },
    2: {
        "tp2": {**ITERS, **TP2},
        "tp2+sp-bf16-dropout": {**ITERS, **TP2, **DROPOUT, **TOLD_APART, "sequence-parallel": True, "bf16": True},
        "dp2+overlap": {**ITERS, **OVERLAP},
        "dp2+overlap-bf16-dropout": {**ITERS, **OVERLAP, **DROPOUT, "bf16": True},
        "pp2": {**ITERS, "pipeline-model-parallel-size": 2},
    },
}


class Runs:
    """Where the cases of this module lie, and their command lines."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data
        self.log = ""

    def save(self, case: str) -> Path:
        return self.root / case / "save"

    def metrics(self, case: str) -> Path:
        return self.root / case / "metrics.jsonl"

    def start(self, case: str, options: dict[str, object]) -> list[str]:
        """A fresh run."""
        common: dict[str, object] = {
            **TINY_MODEL,
            "norm-scheme": "hybrid_star",
            "phd-repeat": 2,
            "phd-window": 5,
            "phd-chunk": 8,
            "data-path": self.data,
            "micro-batch-size": 2,
            "global-batch-size": 8,
            "lr": 1e-2,
            "eval-interval": 2,
            "eval-iters": 1,
            "log-interval": 1,
            "device": "cpu",
            "metrics-file": self.metrics(case),
        }
        return ["pretrain", *flags({**common, **options})]

    def interrupted(self, case: str, options: dict[str, object]) -> list[str]:
        return self.start(case, {**options, "save": self.save(case), "exit-interval": INTERRUPTED})

    def resume(self, case: str, source: str, options: dict[str, object]) -> list[str]:
        """A run that starts from the checkpoint of ``source``."""
        places = {"load": self.save(source), "save": self.save(case), "metrics-file": self.metrics(case)}
        return ["pretrain", *flags({**places, **options})]

    def lines(self, case: str) -> list[dict[str, Any]]:
        return read_metrics(self.metrics(case))

    def state(self, case: str) -> dict[str, Any]:
        (path,) = self.save(case).glob("iter_*/training_state.json")
        state: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return state


def numbers(lines: list[dict[str, Any]], names: tuple[str, ...] = BIT_EQUAL) -> list[dict[str, Any]]:
    return [{name: line[name] for name in names} for line in lines]


@pytest.fixture(scope="module")
def runs(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"), documents)


@pytest.fixture(scope="module")
def alone(runs: Runs, run_cases: Any) -> Runs:
    """World of one: the cases, a run that is extended, and other ways to start from a checkpoint."""
    first: list[list[str]] = []
    second: list[list[str]] = []
    for case, options in CASES[1].items():
        first += [runs.start(f"{case}-whole", options), runs.interrupted(case, options)]
        # The checkpoint says everything but where to write: model, data and schedule.
        second.append(runs.resume(case, case, {}))
    # 2 % of the data are fewer samples than the run takes, so that the order is drawn over several epochs. The rate is
    # constant, because a longer run has another decay.
    short: dict[str, object] = {"split": "2,98,0", "lr-decay-style": "constant", "eval-iters": 0}
    first.append(runs.start("short-then-long", {**short, "train-iters": 8, "save": runs.save("short-then-long")}))
    first.append(runs.start("long", {**short, "train-iters": 16, "data-horizon-samples": 64}))
    first.append(runs.start("long-own-order", {**short, "train-iters": 16}))
    second.append(runs.resume("short-then-long", "short-then-long", {"train-iters": 16}))

    no_update = {"lr": 1e-30, "eval-interval": 1}  # smaller than any parameter's rounding
    second.append(runs.resume("finetune", "fp32", {"finetune": True, **no_update}))
    vectors = {"finetune": True, "phd-copy-embedding": "vector"}
    second.append(runs.resume("finetune-with-vectors", "fp32", {**vectors, **no_update}))
    second.append(runs.resume("no-optimizer", "fp32", {"no-load-optim": True}))
    second.append(runs.resume("no-rng", "dropout", {"no-load-rng": True}))
    # These start from what `first` leaves, so they must come before the resumed runs save their end.
    runs.log += run_cases(1, first)
    runs.log += run_cases(1, sorted(second, key=is_of_the_same_run))
    return runs


def is_of_the_same_run(argv: list[str]) -> bool:
    return argv[argv.index("--load") + 1] == argv[argv.index("--save") + 1]


@pytest.fixture(scope="module")
def two_ranks(runs: Runs, run_cases: Any) -> Runs:
    first: list[list[str]] = []
    # first, since the others save over what it starts from
    source = "dp2+overlap-bf16-dropout"
    second = [runs.resume("finetune-dp2-bf16", source, {"finetune": True, "lr": 1e-30, "eval-interval": 1})]
    for case, options in CASES[2].items():
        first += [runs.start(f"{case}-whole", options), runs.interrupted(case, options)]
        # As a job script does that is submitted again as it is.
        again = {**options, "save": runs.save(case), "load": runs.save(case)}
        second.append(runs.start(case, again))
    runs.log += run_cases(2, first)
    runs.log += run_cases(2, second)
    return runs


def assert_equal_to_the_whole_run(runs: Runs, case: str) -> None:
    whole, parts = runs.lines(f"{case}-whole"), runs.lines(case)
    assert len(whole) > INTERRUPTED + 2
    assert [line["iteration"] for line in parts] == [*range(1, len(whole) + 1)], "every step once, over both starts"
    assert numbers(parts) == numbers(whole)
    validated = [line["iteration"] for line in parts if line["validation_loss"] is not None]
    assert validated == sorted({*range(2, len(whole) + 1, 2), len(whole)})
    assert len({line["lm_loss"] for line in whole}) == len(whole), "it trains"


@pytest.mark.parametrize("case", CASES[1])
def test_resumed_run_equals_the_whole_one(alone: Runs, case: str) -> None:
    assert_equal_to_the_whole_run(alone, case)


@pytest.mark.parametrize("case", CASES[2])
def test_resumed_run_of_two_ranks_equals_the_whole_one(two_ranks: Runs, case: str) -> None:
    assert_equal_to_the_whole_run(two_ranks, case)


def test_ramp_up_continues_where_it_was(alone: Runs) -> None:
    sizes = [line["global_batch_size"] for line in alone.lines("ramp-up")]
    assert sizes[:INTERRUPTED] < sizes[INTERRUPTED:] and sizes == sorted(sizes), "interrupted while the batch grows"
    assert sizes[0] == 2 and sizes[-1] == 8
    assert sizes[INTERRUPTED] < 8


def test_dropout_depends_on_the_restored_random_state(alone: Runs) -> None:
    """Otherwise the dropout cases above would not show that it is restored."""
    whole, other = alone.lines("dropout-whole"), alone.lines("no-rng")
    assert other[0]["iteration"] == INTERRUPTED + 1
    assert other[0]["lm_loss"] != whole[INTERRUPTED]["lm_loss"]
    assert other[0]["lm_loss"] == pytest.approx(whole[INTERRUPTED]["lm_loss"], rel=0.1)


def test_precisions_and_layouts_are_different_runs(alone: Runs, two_ranks: Runs) -> None:
    """No option of the cases is ignored."""
    losses = [alone.lines(f"{case}-whole")[3]["lm_loss"] for case in ("fp32", "bf16", "dropout")]
    losses += [two_ranks.lines(f"{case}-whole")[3]["lm_loss"] for case in ("tp2+sp-bf16-dropout",)]
    losses += [two_ranks.lines(f"{case}-whole")[3]["lm_loss"] for case in ("dp2+overlap-bf16-dropout",)]
    assert len(set(losses)) == len(losses)
    for case in ("tp2", "dp2+overlap", "pp2"):
        expected = alone.lines("fp32-whole")
        for one, two in zip(expected, two_ranks.lines(f"{case}-whole"), strict=True):
            assert two["lm_loss"] == pytest.approx(one["lm_loss"], rel=1e-4)


def test_extended_run_keeps_the_order_of_its_samples(alone: Runs) -> None:
    """8 steps, then 8 more: what a run of 16 with the same horizon does, and not what a run of 16 would draw."""
    extended, long, own = (alone.lines(case) for case in ("short-then-long", "long", "long-own-order"))
    assert [line["iteration"] for line in extended] == [*range(1, 17)]
    assert numbers(extended) == numbers(long)
    assert own[0]["lm_loss"] != long[0]["lm_loss"], "the order depends on the horizon, or this shows nothing"


def test_finetune_takes_the_parameters_and_starts_over(alone: Runs) -> None:
    lines, source = alone.lines("finetune"), alone.lines("fp32-whole")
    assert [line["iteration"] for line in lines] == [*range(1, STEPS + 1)]
    assert [line["consumed_samples"] for line in lines] == [line["consumed_samples"] for line in source]
    assert alone.state("finetune")["consumed_samples"] == 8 * STEPS
    # With a rate that changes nothing every validation loss is that of the loaded parameters.
    assert len({line["validation_loss"] for line in lines}) == 1
    assert lines[0]["validation_loss"] < source[1]["validation_loss"], "three steps are better than two"
    # The first batch, seen by parameters that have learnt from it.
    assert lines[0]["lm_loss"] < source[0]["lm_loss"]


def test_finetune_takes_the_parameters_into_the_shards_of_the_optimizer(two_ranks: Runs) -> None:
    """In bf16 each rank has float32 copies of a part, which a step brings back into the model."""
    lines, source = two_ranks.lines("finetune-dp2-bf16"), two_ranks.lines("dp2+overlap-bf16-dropout-whole")
    (loss,) = {line["validation_loss"] for line in lines}
    assert len(lines) == STEPS and loss < source[1]["validation_loss"], "three steps are better than two"


def test_finetune_may_add_vectors_which_start_at_zero(alone: Runs) -> None:
    lines = alone.lines("finetune-with-vectors")
    assert {line["validation_loss"] for line in lines} == {line["validation_loss"] for line in alone.lines("finetune")}
    assert lines[0]["grad_norm"] > alone.lines("finetune")[0]["grad_norm"], "theirs is added"
    assert "has no copy_embedding.weight, which starts at zero" in alone.log


def test_no_load_optim_keeps_the_place_and_forgets_the_moments(alone: Runs) -> None:
    lines, whole = alone.lines("no-optimizer"), alone.lines("fp32-whole")[INTERRUPTED:]
    names = ("iteration", "consumed_samples", "learning_rate")
    assert numbers(lines, names) == numbers(whole, names)
    assert lines[0]["lm_loss"] == whole[0]["lm_loss"] and lines[0]["grad_norm"] == whole[0]["grad_norm"]
    assert lines[1]["lm_loss"] != whole[1]["lm_loss"]


def test_nothing_is_printed_that_nobody_can_act_on(alone: Runs, two_ranks: Runs) -> None:
    """No warnings of torch, Megatron-Core or TensorBoard, in any of these runs and layouts."""
    noise = re.compile(r"warn|deprecat|traceback|\[rank|destroy_process_group|^[WE]\d{4} ", re.IGNORECASE)
    assert alone is two_ranks and "saved checkpoint" in alone.log
    assert [line for line in alone.log.splitlines() if noise.search(line)] == []
