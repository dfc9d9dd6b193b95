"""What a run is said to need, against what a model keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from phd_megatron.config.load import merge_layers
from phd_megatron.config.presets import preset_values
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.planning.peak import device_hours, peak_tflops
from phd_megatron.planning.run_plan import RunPlan, plan_run
from phd_megatron.runtime.context import Runtime

SIZES = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 256,
    "vocab_size": 257,
}
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 128}


def make_run(**model) -> RunConfig:
    run = RunConfig(model=ModelConfig(**{**SIZES, **model}))
    run.training.micro_batch_size = 4
    resolve(run)
    return run


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def saved_for_backward(run: RunConfig) -> int:
    """Bytes that one forward pass keeps, parameters left out."""
    from phd_megatron.model.build import build_model

    (model,) = build_model(run, 257, torch.device("cpu"))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so no address is used twice
        return tensor

    tokens = torch.randint(0, 257, (4, 257), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(256).expand(4, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens[:, :-1], position_ids=positions, attention_mask=None, labels=tokens[:, 1:])
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "model",
    [{}, {"norm_scheme": "hybrid_star", "phd_repeat": 3}, {"transformer": dict(EXPERTS), "phd_repeat": 2}],
    ids=["pre", "hybrid_star-K3", "experts-K2"],
)
def test_activations_are_about_what_is_saved_for_backward(model: dict, runtime: Runtime) -> None:
    run = make_run(**model)
    assert plan_run(run, 1, 1).memory.activations == pytest.approx(saved_for_backward(run), rel=0.2)


def test_memory_is_what_a_gpu_was_seen_to_need() -> None:
    """Peaks of ``bench train --preset dense-1.2b`` in bfloat16, K = 1, on an H100 (docs/benchmarks.md)."""
    for samples, measured in ((2, 31.9), (4, 43.4)):
        run = from_preset("dense-1.2b", norm_scheme="pre", micro_batch_size=samples, global_batch_size=16)
        assert plan_run(run, 1, 1).memory.total / 2**30 == pytest.approx(measured, rel=0.03)
    asked = from_preset("dense-1.2b", norm_scheme="pre", micro_batch_size=4, global_batch_size=16)
    asked.model.transformer["cross_entropy_loss_fusion"] = True
    assert plan_run(asked, 1, 1).memory.total / 2**30 > 50  # float32 logits


def from_preset(name: str, **changes: Any) -> RunConfig:
    run = merge_layers([(preset_values(name) | changes, name)]).config
    resolve(run)
    return run


def planned(run: RunConfig, ranks: int, **parallel) -> RunPlan:
    return plan_run(replace(run, parallel=replace(run.parallel, **parallel)), 100, ranks)


def test_states_by_hand() -> None:
    run = make_run()
    alone = planned(run, 1)
    assert alone.memory.weights == alone.memory.gradients == 4 * alone.parameters
    assert alone.memory.optimizer == 8 * alone.parameters
    half = replace(run, training=replace(run.training, bf16=True))
    memory = planned(half, 4).memory
    assert (memory.weights, memory.gradients) == (2 * alone.parameters, 4 * alone.parameters)
    assert memory.optimizer == 12 * alone.parameters / 4


def test_layouts_divide() -> None:
    run = make_run(transformer=dict(EXPERTS))
    alone, two = planned(run, 1).memory, planned(run, 2, expert_model_parallel_size=2).memory
    experts = 4 * 8 * 3 * 128 * 128
    assert alone.weights - two.weights == 4 * experts / 2
    dense = make_run()
    whole, stages = planned(dense, 1), planned(dense, 2, pipeline_model_parallel_size=2)
    embedding = 384 * 128
    assert stages.memory.weights == pytest.approx(4 * ((whole.parameters - embedding) / 2 + embedding), abs=4 * 128)
    cut = planned(dense, 2, tensor_model_parallel_size=2, sequence_parallel=True)
    assert cut.memory.activations == whole.memory.activations / 2
    assert planned(dense, 2, context_parallel_size=2).memory.activations == whole.memory.activations / 2


def test_vectors_of_copies_lie_on_the_first_stage() -> None:
    run, more = make_run(phd_repeat=3), make_run(phd_repeat=3, phd_copy_embedding="vector")
    assert planned(more, 1).memory.weights - planned(run, 1).memory.weights == 4 * 2 * 128
    assert planned(more, 1).flops == planned(run, 1).flops
    stages = [planned(r, 2, pipeline_model_parallel_size=2).memory.weights for r in (run, more)]
    assert stages[1] - stages[0] == 4 * 2 * 128  # the first stage, which has the activations, needs most


def test_costs_by_hand() -> None:
    plan = planned(make_run(phd_repeat=2), 1)
    assert (plan.tokens, plan.processed_tokens) == (100 * 256, 100 * 512)
    assert plan.flops == plan.flops_per_token * plan.tokens
    assert device_hours(3.6e15 * 989, 989, 0.5) == 2.0
    assert peak_tflops(None, "NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops(None, "cpu") is None
    assert peak_tflops(5.0, "cpu") == 5.0


def test_a_plan_needs_the_vocabulary() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        plan_run(make_run(vocab_size=None), 1, 1)


def test_fp8_is_planned_without_a_gpu_and_its_sizes_are_checked() -> None:
    fp8 = {"transformer": {"fp8": "hybrid", "fp8_recipe": "delayed"}}
    run = RunConfig(model=ModelConfig(**SIZES, **fp8))
    run.training.bf16 = True
    resolve(run)
    assert plan_run(run, 1, 1).tokens == 256
    run.model.seq_length = 250
    with pytest.raises(UserError, match=r"250 is not a multiple of 16.*use seq_length=256"):
        plan_run(run, 1, 1)
