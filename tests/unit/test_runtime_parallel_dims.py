"""Layouts that fit, and the refusal of those that do not, with the numbers in the message."""

import re

import pytest

from phd_megatron.config.schema import ModelConfig, ParallelConfig, TrainingConfig
from phd_megatron.errors import UserError
from phd_megatron.runtime.parallel_dims import ParallelDims


def dims(world_size=4, **parallel):
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
        "sp": "sequence_parallel",
    }
    return ParallelDims.from_config(
        ParallelConfig(**{names.get(key, key): value for key, value in parallel.items()}), world_size
    )


def model(**changes):
    base = {"num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4}
    return ModelConfig(**{**base, "seq_length": 64, "vocab_size": 250, **changes})


def test_data_parallel_size_is_what_remains():
    found = dims(8, tp=2, pp=2)
    assert (found.dp, found.model_parallel, found.split.chunks) == (2, 4, 2)
    assert found.describe() == "TP 2, PP 2, DP 2"
    assert dims(4, tp=2, sp=True, ep=2, etp=1).describe() == "TP 2, EP 2, ETP 1, SP, DP 2"
    many = dims(24, tp=2, pp=2, cp=3)
    assert (many.dp, many.model_parallel, many.etp) == (2, 12, 2)
    assert dims(12, pp=2, cp=3, ep=6).dp == 2, "experts are spread over context and data ranks together"


def fits(layout, model_config, training):
    try:
        layout.validate(model_config, training)
    except UserError:
        return False
    return True


def test_a_valid_layout_passes_and_its_neighbours_do_not():
    layout, training = dims(8, tp=2, pp=2, sp=True), TrainingConfig(micro_batch_size=2, global_batch_size=8)
    assert fits(layout, model(), training)
    assert not fits(layout, model(num_layers=7), training)
    assert not fits(layout, model(), TrainingConfig(micro_batch_size=2, global_batch_size=6))


def test_groups_may_be_fewer_than_tensor_ranks():
    """Then ranks share a group, so the ranks are a multiple of the groups."""
    assert fits(dims(8, tp=8), model(num_query_groups=2), TrainingConfig())
    assert not fits(dims(8, tp=4), model(num_attention_heads=12, num_query_groups=3), TrainingConfig())


def test_sequence_parallel_without_tensor_parallel_is_a_note():
    found = dims(2, sp=True)
    assert not found.sp
    assert "sequence_parallel" in found.notes[0]


@pytest.mark.parametrize(
    ("world_size", "parallel", "message"),
    [
        (6, {"tp": 2, "pp": 2}, "tensor 2 x pipeline 2 x context 1 = 4 does not divide world size 6"),
        (2, {"tp": 4}, "tensor 4 x pipeline 1 x context 1 = 4 does not divide world size 2"),
        (4, {"tp": 0}, "tensor_model_parallel_size is 0"),
        (4, {"vpp": 2}, "no pipeline to interleave"),
        (4, {"pp": 2, "vpp": 0}, "virtual_pipeline_model_parallel_size is 0"),
        (4, {"pp": 2, "overlap_p2p_comm": True}, "overlap_p2p_comm is True without virtual pipeline stages"),
        (4, {"pp": 2, "microbatch_group_size_per_vp_stage": 2}, "microbatch_group_size_per_vp_stage is 2 without"),
        (4, {"pp": 2, "vpp": 2, "overlap_p2p_comm": False}, "one and the same neighbour"),
        (4, {"ep": 3}, "expert tensor 1 x expert 3 x pipeline 1 = 3 does not divide world size 4"),
        # 4 stages of 3 ranks: 2 ranks of experts fit the world of 12, and not the 3 that share a stage
        (12, {"pp": 4, "ep": 2}, "expert tensor 1 x expert 2 x pipeline 4 = 8 does not divide world size 12"),
        (12, {"tp": 2, "etp": 4, "pp": 2}, "expert tensor 4 x expert 1 x pipeline 2 = 8 does not divide world size 12"),
        (12, {"tp": 2, "ep": 4}, "expert tensor 2 x expert 4 x pipeline 1 = 8 does not divide world size 12"),
        (4, {"cp": 3}, "tensor 1 x pipeline 1 x context 3 = 3 does not divide world size 4"),
        (4, {"cp": 0}, "context_parallel_size is 0"),
        (4, {"pp": 0}, "pipeline_model_parallel_size is 0"),
        (4, {"ep": 0}, "expert_model_parallel_size is 0"),
        (4, {"etp": 0}, "expert_tensor_parallel_size is 0"),
    ],
)
def test_sizes_that_do_not_fit(world_size, parallel, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dims(world_size, **parallel)


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        ({"tp": 4}, {"num_attention_heads": 6, "num_query_groups": 6}, "num_attention_heads 6 is not divisible"),
        ({"tp": 4}, {"num_attention_heads": 12, "num_query_groups": 6}, "num_query_groups 6 and"),
        ({"tp": 4}, {"ffn_hidden_size": 130}, "use 132"),
        ({"tp": 4}, {"hidden_size": 66}, "hidden_size 66"),
        ({"tp": 4}, {"vocab_size": 250, "make_vocab_size_divisible_by": 1}, "the padded vocabulary 250"),
        ({"tp": 4, "sp": True}, {"seq_length": 66}, "seq_length 66 is not divisible by 4"),
        ({"cp": 2}, {"seq_length": 66}, "seq_length 66 is not divisible by 4"),
        ({"cp": 2, "tp": 2, "sp": True}, {"seq_length": 68}, "seq_length 68 is not divisible by 8"),
        (
            {"cp": 4},
            {"phd_repeat": 2, "phd_window": 10},
            "phd_window=10 reaches 9 positions back, further than one context-parallel slice of 8 tokens",
        ),
        ({"pp": 2}, {"num_layers": 7}, "num_layers 7 is not divisible by pipeline 2 = 2"),
        ({"pp": 2, "vpp": 2}, {"num_layers": 6}, "pipeline 2 x virtual pipeline 2 = 4"),
        ({"ep": 2}, {}, "the model has no experts"),
        ({"ep": 4}, {"transformer": {"num_moe_experts": 6}}, "num_moe_experts 6"),
        ({"tp": 2}, {"transformer": {"num_moe_experts": 4}}, "need sequence_parallel"),
        (
            {"tp": 2, "sp": True},
            {"transformer": {"num_moe_experts": 4, "moe_ffn_hidden_size": 25}},
            "moe_ffn_hidden_size 25 is not divisible by expert_tensor_parallel_size 2; use 26",
        ),
        (
            {"tp": 4, "sp": True, "etp": 1},
            {"transformer": {"num_moe_experts": 4, "moe_shared_expert_intermediate_size": 6}},
            "moe_shared_expert_intermediate_size 6 is not divisible by tensor_model_parallel_size 4; use 8",
        ),
    ],
)
def test_models_that_do_not_fit(parallel, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dims(4, **parallel).validate(model(**changes), TrainingConfig())


@pytest.mark.parametrize(
    ("parallel", "training", "message"),
    [
        ({}, {"micro_batch_size": 2, "global_batch_size": 12}, "data-parallel size 4 = 8"),
        ({"pp": 2, "vpp": 2}, {"global_batch_size": 6}, "3 micro-batches per step"),
        (
            {"pp": 2, "vpp": 2},
            {"global_batch_size": 12, "rampup_batch_size": [4, 2, 100]},
            "3 micro-batches per step (global_batch_size 6",
        ),
        (
            {"pp": 2, "vpp": 2, "microbatch_group_size_per_vp_stage": 3},
            {"global_batch_size": 8},
            "microbatch_group_size_per_vp_stage 3 does not fit 4 micro-batches",
        ),
        ({}, {"global_batch_size": 8, "rampup_batch_size": [2, 4, 100]}, "rampup_batch_size start 2"),
    ],
)
def test_batches_that_do_not_fit(parallel, training, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dims(4, **parallel).validate(model(), TrainingConfig(**training))
