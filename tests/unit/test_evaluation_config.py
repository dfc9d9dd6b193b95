"""What an evaluation takes of a training's configuration: the model, and none of what only concerns training."""

from __future__ import annotations

import pytest

from phd_megatron.config.layouts import parse_layout
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.errors import UserError

SAVED = {
    **{"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 50},
    **{"phd_repeat": 2, "micro_batch_size": 3, "global_batch_size": 24, "rampup_batch_size": [12, 12, 48]},
    **{"train_samples": 96, "save": "runs/mine", "context_parallel_size": 2, "device": "cuda"},
}


def saved(**transformer: object) -> RunConfig:
    run = RunConfig()
    for name, value in SAVED.items():
        assign(run, name, value)
    run.model.transformer |= transformer
    resolve(run)
    return run


def test_another_layout_and_nothing_of_the_training() -> None:
    from phd_megatron.training.evaluation import for_evaluation

    training = saved(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    run, notes = for_evaluation(training, parse_layout("tp2+pp2+sp"), "cpu", 8)
    parallel = run.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 2)
    assert (parallel.context_parallel_size, parallel.sequence_parallel, parallel.device) == (1, True, "cpu")
    assert run.training.global_batch_size == 3 * 2 * 2, "micro-batch, two data-parallel ranks, a batch for each stage"
    assert run.training.rampup_batch_size is None and run.checkpoint.save is None and notes == []
    assert not [name for name in run.model.transformer if name.startswith("recompute")]
    assert (run.model.phd_repeat, run.model.num_layers) == (2, 4)
    assert training.training.rampup_batch_size == [12, 12, 48], "what was saved is left alone"
    assert training.model.transformer["recompute_granularity"] == "full"


def test_a_capacity_is_left_out_with_a_note() -> None:
    from phd_megatron.training.evaluation import for_evaluation

    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall"}
    training = saved(**experts, moe_expert_capacity_factor=1.25, moe_router_load_balancing_type="none")
    run, notes = for_evaluation(training, parse_layout("tp1"), "cpu", 1)
    assert "moe_expert_capacity_factor" not in run.model.transformer and run.model.transformer["num_moe_experts"] == 4
    assert notes == ["moe_expert_capacity_factor is left out: outside of training no token is dropped"]
    assert run.training.global_batch_size == 3


@pytest.mark.parametrize("layout", ["tp3", "pp8"])
def test_a_layout_that_does_not_fit_is_refused(layout: str) -> None:
    from phd_megatron.training.evaluation import for_evaluation

    chosen = parse_layout(layout)
    with pytest.raises(UserError):
        for_evaluation(saved(), chosen, "cpu", chosen.ranks)
