"""A checkpoint saved under any layout goes on under any other as if nothing had happened.

Each layout of ``saved`` trains two steps and saves; layouts of ``loaded`` take those checkpoints, optimizer state
included, and train two more. Their losses, gradient norms and learning rates are those of one run of four steps on one
rank: so the order of the samples goes on too, whatever the number of data-parallel ranks was and is. A model without
experts, one with them and one with norms that are cut with the heads, whose layouts are others. A checkpoint does not
know layouts, so not every pair is tried: every layout saves for two or three others, and takes from as many.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(1200)

STEPS, INTERRUPTED = 4, 2
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-5
TP2: dict[str, object] = {"tensor-model-parallel-size": 2}
TP4: dict[str, object] = {"tensor-model-parallel-size": 4}
PP2: dict[str, object] = {"pipeline-model-parallel-size": 2}
VPP2: dict[str, object] = {"virtual-pipeline-model-parallel-size": 2}
CP2: dict[str, object] = {"context-parallel-size": 2}
EP2: dict[str, object] = {"expert-model-parallel-size": 2}
SP: dict[str, object] = {"sequence-parallel": True}
OVERLAP: dict[str, object] = {"overlap-grad-reduce": True, "overlap-param-gather": True, "ddp-bucket-size": 3000}
PLAIN_OPTIMIZER: dict[str, object] = {"use-distributed-optimizer": False}
#: every option of a layout or of saving that a table below may change. A load takes from the checkpoint what is not
#: given, so it is given all.
DEFAULTS: dict[str, object] = {
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "virtual-pipeline-model-parallel-size": "null",
    "context-parallel-size": 1,
    "cp-comm-type": "all_gather",
    "expert-model-parallel-size": 1,
    "expert-tensor-parallel-size": "null",
    "sequence-parallel": False,
    "overlap-grad-reduce": False,
    "overlap-param-gather": False,
    "ddp-bucket-size": "null",
    "use-distributed-optimizer": True,
    "save": "null",
    "save-interval": "null",
    "async-save": False,
}
Layouts = dict[str, tuple[int, dict[str, object]]]
#: layout -> ranks, options
DENSE_SAVED: Layouts = {
    "single": (1, {}),
    "tp2+sp": (2, {**TP2, **SP}),
    "cp2": (2, CP2),
    "dp2+overlap+async": (2, {**OVERLAP, "save-interval": 2, "async-save": True}),
    "dp2+no-distopt": (2, PLAIN_OPTIMIZER),
    "tp2+pp2": (4, {**TP2, **PP2}),
    "pp2+vpp2+dp2": (4, {**PP2, **VPP2}),
}
DENSE_LOADED: Layouts = {
    "single+no-distopt": (1, PLAIN_OPTIMIZER),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2+vpp2": (2, {**PP2, **VPP2}),
    "dp2": (2, {}),
    "dp4+overlap": (4, OVERLAP),
    "tp2+sp+dp2": (4, {**TP2, **SP}),
    "cp2+p2p+dp2": (4, {**CP2, "cp-comm-type": "p2p"}),
}
EXPERTS_SAVED: Layouts = {
    "single": (1, {}),
    "ep2": (2, EP2),
    "tp2+sp+ep2+etp1": (2, {**TP2, **SP, **EP2, "expert-tensor-parallel-size": 1}),
    "pp2+vpp2+ep2": (4, {**PP2, **VPP2, **EP2}),
}
EXPERTS_LOADED: Layouts = {
    "single": (1, {}),
    "tp2+sp": (2, {**TP2, **SP}),
    "ep2+cp2": (2, {**EP2, **CP2}),
    "ep4+overlap": (4, {"expert-model-parallel-size": 4, **OVERLAP}),
}
#: norms that are cut with the heads; with four ranks each holds the whole key norm, for there are two KV heads
FULL_WIDTH_SAVED: Layouts = {"tp2+sp": (2, {**TP2, **SP}), "tp4+sp": (4, {**TP4, **SP})}
FULL_WIDTH_LOADED: Layouts = {"pp2": (2, PP2), "tp4": (4, TP4)}


@dataclass(frozen=True)
class Family:
    """One model, and the layouts that save and load it."""

    model: dict[str, object]
    saved: Layouts
    loaded: Layouts
    every: int  #: n-th pair along each row and column is tried, beginning with the first

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [
            (source, to)
            for row, source in enumerate(self.saved)
            for column, to in enumerate(self.loaded)
            if (row + column) % self.every == 0
        ]


MODEL: dict[str, object] = {
    **TINY_MODEL,
    "norm-scheme": "hybrid_star",
    "phd-repeat": 2,
    "phd-window": 5,
    "phd-chunk": 8,
    "phd-copy-positions": "repeated",
    "phd-copy-embedding": "vector",
}
EXPERTS: dict[str, object] = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-layer-freq": [0, 1, 1, 1]},
    **{"moe-token-dispatcher-type": "alltoall", "moe-aux-loss-coeff": 0.05, "moe-router-dtype": "fp32"},
}
FAMILIES = {
    "dense": Family(MODEL, DENSE_SAVED, DENSE_LOADED, 3),
    "experts": Family({**MODEL, **EXPERTS}, EXPERTS_SAVED, EXPERTS_LOADED, 2),
    "full-width norms": Family({**MODEL, "norm-scheme": "olmo2"}, FULL_WIDTH_SAVED, FULL_WIDTH_LOADED, 1),
}
WORLDS = (1, 2, 4)
CASES = [(name, *pair) for name, family in FAMILIES.items() for pair in family.pairs]
NAMES = ("iteration", "consumed_samples", "learning_rate", "global_batch_size")


def start(directory: Path, data: Path, family: str, case: str, **changes: object) -> list[str]:
    options: dict[str, object] = {
        **FAMILIES[family].model,
        "data-path": data,
        "micro-batch-size": 2,
        "global-batch-size": 8,
        "train-iters": STEPS,
        "lr": 1e-2,
        "eval-iters": 0,
        "log-interval": 1,
        "device": "cpu",
        "metrics-file": directory / f"{case}.jsonl",
        **DEFAULTS,
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    switched_off = {f"no-{name}": True for name, value in options.items() if value is False}
    return ["pretrain", *flags({name: value for name, value in options.items() if value is not False} | switched_off)]


@pytest.fixture(scope="module")
def root(documents: Path, run_cases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a family's metrics in a directory each; two launches of each world size."""
    root = tmp_path_factory.mktemp("reshard")
    for world in WORLDS:
        cases = []
        for family, its in FAMILIES.items():
            place = root / family
            if world == 1:
                cases.append(start(place, documents, family, "whole"))
            for name, (ranks, options) in its.saved.items():
                if ranks == world:
                    stop = {"save": place / name, "exit-interval": INTERRUPTED}
                    cases.append(start(place, documents, family, name, **{**stop, **options}))
        run_cases(world, cases)
    for world in WORLDS:
        cases = [
            start(root / family, documents, family, f"{source}-to-{name}", load=root / family / source, **options)
            for family, its in FAMILIES.items()
            for source, name in its.pairs
            for ranks, options in [its.loaded[name]]
            if ranks == world
        ]
        run_cases(world, cases)
    return root


@pytest.mark.parametrize(("family", "source", "name"), CASES)
def test_run_goes_on_under_another_layout(root: Path, family: str, source: str, name: str) -> None:
    whole = read_metrics(root / family / "whole.jsonl")[INTERRUPTED:]
    continued = read_metrics(root / family / f"{source}-to-{name}.jsonl")
    assert [line["iteration"] for line in continued] == [*range(INTERRUPTED + 1, STEPS + 1)]
    for expected, found in zip(whole, continued, strict=True):
        assert {key: found[key] for key in NAMES} == {key: expected[key] for key in NAMES}
        assert found["lm_loss"] == pytest.approx(expected["lm_loss"], rel=LOSS_TOLERANCE)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tolerance_would_show_lost_moments_or_another_order(root: Path, family: str) -> None:
    """Losses of two steps differ by far more than the tolerance, and so do two orders of the samples."""
    losses = [line["lm_loss"] for line in read_metrics(root / family / "whole.jsonl")]
    assert all(abs(one / two - 1) > 1e3 * LOSS_TOLERANCE for one, two in itertools.pairwise(losses))


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_are_what_their_names_say(root: Path, family: str) -> None:
    """No two checkpoints come from the same layout, so an option that is ignored would show."""
    facts = []
    for name, (ranks, _) in FAMILIES[family].saved.items():
        (path,) = (root / family / name).glob("iter_*/training_state.json")
        layout = json.loads(path.read_text("utf-8"))["layout"]
        assert layout["world_size"] == ranks
        facts.append(tuple(layout.values()))
    assert len(set(facts)) == len(facts)
