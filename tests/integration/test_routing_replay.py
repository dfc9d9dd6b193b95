"""Models with experts in half precision: layouts are compared on the experts that one rank chose.

In float32 every layout chooses those experts itself. So a replay there changes nothing, as long as each rank takes the
choices of its own rows: of its samples, positions, copies and layers.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from phd_megatron.config.layouts import microbatches, parse_layout
from phd_megatron.parity.compare import FLOAT32, HALF, STEPS
from phd_megatron.parity.runs import Row, run_parity

from .test_layout_parity import configuration

pytestmark = pytest.mark.timeout(900)

EXPERTS: dict[str, object] = {
    **{"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-token-dispatcher-type": "alltoall"},
    **{"norm-scheme": "hybrid_star", "phd-repeat": 2, "moe-layer-freq": [0, 1, 1, 1], "moe-aux-loss-coeff": 0.01},
}
LAYOUTS = ("tp2+sp", "cp2", "pp2+vpp2", "dp2+recompute", "tp2+sp+cp2", "ep2+dp4+overlap")
HALVES = ("tp2+sp", "cp2", "ep2")
COUNTS = re.compile(r"took the experts that one rank chose; (\d+) of (\d+) rows would have gone to others")


@pytest.fixture(scope="module")
def rows(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Row]]:
    """The same model in float32, held to its own tolerance with a replay all the same, and in bfloat16."""
    single = configuration(corpus, EXPERTS)
    half = configuration(corpus, {**EXPERTS, "bf16": True})
    models = {
        "float32": (single, [parse_layout(name) for name in LAYOUTS]),
        "bfloat16": (half, [parse_layout(name) for name in HALVES]),
    }
    tolerances = {"float32": dataclasses.replace(FLOAT32, name="float32 with replay"), "bfloat16": HALF}
    found = run_parity(models, tmp_path_factory.mktemp("replay"), tolerances, timeout=600)
    return {model: {row.layout: row for row in results} for model, results in found.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_takes_the_choices_of_its_own_rows(rows: dict[str, dict[str, Row]], layout: str) -> None:
    row = rows["float32"][layout]
    assert row.status == "equal", row
    changed, total = map(int, COUNTS.match(row.note).groups())  # type: ignore[union-attr]
    samples = STEPS * microbatches(map(parse_layout, LAYOUTS)) * 2
    assert total == samples * 24 * (2 + 2 + 1), "K = 2 rows a position, but one in the last layer, which is pruned"
    assert changed == 0


@pytest.mark.parametrize("layout", HALVES)
def test_half_precision_is_compared_on_the_same_experts(rows: dict[str, dict[str, Row]], layout: str) -> None:
    row = rows["bfloat16"][layout]
    assert row.status == "equal", row
    assert COUNTS.match(row.note)
