"""Names of layouts, the ranks they take, the batch that serves them all, and the comparison of two runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phd_megatron.config.layouts import (
    COVERING,
    SIZES,
    SWITCHES,
    Layout,
    covering,
    microbatches,
    parse_layout,
    parse_layouts,
)
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.parity.compare import (
    FLOAT32,
    GRADIENTS,
    HALF,
    METRICS,
    TF32,
    Comparison,
    compare,
    relative,
    tolerance_of,
)
from phd_megatron.parity.runs import layout_dependent
from phd_megatron.training.observers.gradient_dump import check_places, load_gradients


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *[("tp1", 1), ("tp2", 2), ("tp2+sp", 2), ("pp2+vpp2", 2), ("dp4", 4), ("tp2+pp2+dp2", 8), ("cp2+p2p", 2)],
        *[("ep2", 2), ("ep4+pp2", 8), ("tp2+sp+ep2", 4), ("tp2+sp+etp1+ep2", 2), ("dp2+ep2", 2), ("cp2+ep2", 2)],
        *[("tp2+nodist", 2), ("overlap", 1), ("recompute+pp3+first1+last1", 3)],
    ],
)
def test_fewest_ranks_that_hold_a_layout(name: str, ranks: int) -> None:
    assert parse_layout(name).ranks == ranks


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("moe_router_load_balancing_type", ["aux_loss", "global_aux_loss"], "global auxiliary loss"),
        ("moe_router_load_balancing_type", "global_aux_loss", "global auxiliary loss"),
        ("moe_expert_capacity_factor", 1.25, "moe_expert_capacity_factor drops tokens"),
        ("moe_router_load_balancing_type", "seq_aux_loss", ""),
        ("moe_expert_capacity_factor", None, ""),
    ],
)
def test_what_may_depend_on_the_layout(field: str, value: object, words: str) -> None:
    config = RunConfig()
    config.model.transformer |= {"num_moe_experts": 4, field: value}
    reason = layout_dependent(config)
    assert words in reason and bool(reason) == bool(words)


def test_layout_replaces_the_runs_own() -> None:
    base = RunConfig(parallel=ParallelConfig(context_parallel_size=2, overlap_grad_reduce=True, device="cpu"))
    base.model.transformer["cp_comm_type"] = "p2p"
    config = parse_layout("TP2+sp+pp2+vpp2+recompute").apply(base)
    assert config.parallel == ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        sequence_parallel=True,
        device="cpu",
    )
    assert config.model.transformer["recompute_granularity"] == "full"
    assert "cp_comm_type" not in config.model.transformer
    assert base.parallel.context_parallel_size == 2 and "recompute_granularity" not in base.model.transformer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp2,ppp2", "'ppp2' is no layout word; did you mean pp2?"),
        ("tp2+tp4", "says tp twice"),
        ("cp2+ag+p2p", "both ag and p2p"),
        ("tp0", "'tp0' is no layout word"),
        ("tp", "'tp' is no layout word; did you mean"),
        ("overlapp", "did you mean overlap?"),
        ("q", "the words are tpN"),
        (" , ", "names no layout"),
    ],
)
def test_unknown_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_layouts(text)


def test_list_takes_every_layout_once() -> None:
    assert [layout.name for layout in parse_layouts("tp2, pp2,tp2")] == ["tp2", "pp2"]


def test_covering_set_has_every_word_and_every_number_of_ranks() -> None:
    words = {re.sub(r"\d+$", "", word) for name in COVERING for word in name.split("+")}
    assert words == {*SIZES, *SWITCHES} - {"first", "last", "ag"}, "ag is the default"
    assert {layout.ranks for layout in covering(8)} == {2, 4, 8}
    assert {layout.ranks for layout in covering(4)} == {2, 4}
    assert len(COVERING) == len(set(COVERING)) >= 24


def test_one_batch_serves_all_layouts() -> None:
    assert microbatches([Layout("single")]) == 4
    assert microbatches([parse_layout("dp2"), parse_layout("pp2+vpp2")]) == 4
    assert microbatches([parse_layout("dp3"), parse_layout("pp2+dp2")]) == 12
    assert microbatches([parse_layout("pp4+dp2")]) == 8


def write_run(directory: Path, losses: list[float], gradients: dict[str, torch.Tensor]) -> Path:
    (directory / GRADIENTS / "iter_0000001").mkdir(parents=True)
    steps = [{"lm_loss": loss, "grad_norm": 2.0} for loss in losses]
    (directory / METRICS).write_text("".join(json.dumps(step) + "\n" for step in steps))
    places = {f"{k}|0": {"key": k, "shape": list(g.shape), "offset": [0]} for k, g in gradients.items()}
    save_file(
        {f"{key}|0": gradient for key, gradient in gradients.items()},
        directory / GRADIENTS / "iter_0000001" / "rank_00000.safetensors",
        metadata={"places": json.dumps(places)},
    )
    return directory


def test_comparison_takes_the_largest_error_of_each_kind(tmp_path: Path) -> None:
    large, small = torch.tensor([3.0, 4.0]), torch.tensor([3e-8, 0.0])
    one = write_run(tmp_path / "one", [1.0, 2.0, 4.0], {"large": large, "small": small})
    two = write_run(tmp_path / "two", [1.0, 2.002, 4.0], {"large": large + 1e-3, "small": small + 1e-10})
    found = compare(one, two, FLOAT32)
    assert found.loss == pytest.approx(1e-3) and found.grad_norm == 0
    assert (found.parameter, found.gradient) == ("large", pytest.approx(2**0.5 * 1e-3 / 5, rel=1e-3))
    assert not found.within(FLOAT32) and compare(one, one, FLOAT32).within(FLOAT32)

    # What is below 1e-6 of the global norm (5) is compared with that.
    three = write_run(tmp_path / "three", [1.0, 2.0, 4.0], {"large": large, "small": small + 1e-8})
    assert compare(one, three, FLOAT32).gradient == pytest.approx(2**0.5 * 1e-8 / 5e-6, rel=1e-3)

    not_a_number = write_run(
        tmp_path / "nan", [1.0, float("nan"), 4.0], {"large": large * float("nan"), "small": small}
    )
    found = compare(one, not_a_number, FLOAT32)
    assert found.loss == found.gradient == float("inf")

    other = write_run(tmp_path / "other", [1.0, 2.0, 4.0], {"large": large})
    with pytest.raises(ValueError, match="do not have the same parameters: small"):
        compare(one, other, FLOAT32)
    short = write_run(tmp_path / "short", [1.0, 2.0], {"large": large, "small": small})
    with pytest.raises(ValueError, match="has 2 steps"):
        compare(one, short, FLOAT32)


@pytest.mark.parametrize("which", [None, "loss", "grad_norm", "gradient"])
def test_every_kind_of_error_counts(which: str | None) -> None:
    errors = {"loss": 1e-6, "grad_norm": 2e-6, "gradient": 1e-5, **({which: 1.1e-5} if which else {})}
    assert Comparison(**errors, parameter="x").within(FLOAT32) is (which is None)


def test_an_error_is_relative_and_never_hidden_by_infinity() -> None:
    inf = float("inf")
    assert relative(-4.0, -5.0) == 0.25 and relative(0.0, 0.0) == 0.0 == relative(inf, inf)
    assert relative(inf, 1.0) == relative(1.0, inf) == relative(float("nan"), 1.0) == inf


def test_the_tolerance_is_that_of_the_types() -> None:
    run = RunConfig()
    assert (tolerance_of(run, False), tolerance_of(run, True)) == (FLOAT32, TF32)
    for name in ("bf16", "fp16"):
        half = RunConfig()
        setattr(half.training, name, True)
        assert tolerance_of(half, False) == tolerance_of(half, True) == HALF


def test_gradients_of_which_a_part_is_missing_are_refused(tmp_path: Path) -> None:
    """Two ranks have a half each; their files together are the whole."""
    for rank in range(2):
        place = {"key": "k", "shape": [4], "offset": [2 * rank]}
        part = {f"k|{2 * rank}": torch.tensor([1.0, 2.0]) + 2 * rank}
        if rank == 1:
            with pytest.raises(ValueError, match="2 elements of k are missing"):
                load_gradients(tmp_path)
        save_file(
            part, tmp_path / f"rank_{rank:05d}.safetensors", metadata={"places": json.dumps(dict.fromkeys(part, place))}
        )
    assert load_gradients(tmp_path)["k"].tolist() == [1.0, 2.0, 3.0, 4.0]
    check_places(tmp_path / "none", [1], 2)
    (tmp_path / "d" / "iter_0000001").mkdir(parents=True)
    (tmp_path / "rank_00001.safetensors").rename(tmp_path / "d/iter_0000001/rank_00001.safetensors")
    check_places(tmp_path / "d", [1], 2)
    with pytest.raises(UserError, match=r"is not of a dump of 1 rank"):
        check_places(tmp_path / "d", [2, 1], 1)
    (tmp_path / "d/iter_0000001/rank_00001.safetensors").write_text("notes")
    with pytest.raises(UserError, match=r"is not of a dump of 2 rank"):
        check_places(tmp_path / "d", [1], 2)
