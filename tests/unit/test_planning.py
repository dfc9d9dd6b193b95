"""What a run is said to need, against what a model keeps, and against sums written out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from phd_megatron.config.load import merge_layers
from phd_megatron.config.presets import preset_values
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.console.tables import gib, short
from phd_megatron.errors import UserError
from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.planning.fit import refuse_what_cannot_fit
from phd_megatron.planning.flops import forward_flops, mean_document_flops
from phd_megatron.planning.parameters import count_parameters
from phd_megatron.planning.peak import device_hours, peak_tflops
from phd_megatron.planning.run_plan import RunPlan, plan_run
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.context import Runtime
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.training.start import _check_machine

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
# of SIZES: query, key and value 128 x (128 + 2 x 64), projection 128 x 128, FFN 3 x 128 x 384, two norms of 128
LAYER = 32768 + 16384 + 147456 + 256
EMBEDDING = 384 * 128  # 257 entries up to a multiple of 128


def make_run(**model: Any) -> RunConfig:
    run = RunConfig(model=ModelConfig(**{**SIZES, **model}))
    run.training.micro_batch_size = 4
    resolve(run)
    return run


@pytest.fixture(scope="module")
def runtime() -> Iterator[Any]:
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


# ---------------------------------------------------------------- parameters and operations, by hand

# 2 layers of width 8, 2 heads of 4 with one KV head, FFN 12, 4 tokens
TINY = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "num_query_groups": 1}
TINY_EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 6, "moe_layer_freq": [0, 1]}
SHARED = {"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_gate": True}


def tiny(**model: Any) -> ModelConfig:
    run = RunConfig(model=ModelConfig(**{**TINY, "seq_length": 4, "vocab_size": 16, **model}))
    resolve(run)
    return run.model


@pytest.mark.parametrize(
    ("model", "total", "inactive"),
    [
        # a layer: attention 8 x 16 + 8 x 8 = 192, FFN 3 x 8 x 12 = 288, norms 16; embedding 16 x 8, last norm 8
        ({}, 2 * 496 + 128 + 8, 0),
        ({"untie_embeddings_and_output_weights": True}, 2 * 496 + 2 * 128 + 8, 0),
        ({"gated_linear_unit": False}, 2 * 400 + 128 + 8, 0),
        ({"add_qkv_bias": True}, 2 * (496 + 16) + 128 + 8, 0),
        # of query, key and value 16, of the projection 8, of the FFN 2 x 12 and 8
        ({"add_bias_linear": True}, 2 * (496 + 16 + 8 + 24 + 8) + 128 + 8, 0),
        ({"normalization": "LayerNorm"}, 2 * (480 + 32) + 128 + 16, 0),
        ({"norm_scheme": "pre_qk"}, 2 * (496 + 8) + 128 + 8, 0),  # one weight of 4 for all query heads, one for keys
        ({"kv_channels": 6}, 2 * (8 * 24 + 12 * 8 + 288 + 16) + 128 + 8, 0),
        ({"phd_repeat": 3, "phd_window": 2}, 2 * 496 + 128 + 8, 0),
        ({"phd_repeat": 3, "phd_window": 2, "phd_copy_embedding": "vector"}, 2 * 496 + 2 * 8 + 128 + 8, 0),
        # the second layer: 4 experts of 3 x 8 x 6 = 144, router 8 x 4; 2 of the 4 compute a token
        ({"transformer": TINY_EXPERTS}, 496 + (192 + 16 + 576 + 32) + 128 + 8, 288),
        # and a shared one of 3 x 8 x 10 with a gate of 8
        ({"transformer": TINY_EXPERTS | SHARED}, 496 + (192 + 16 + 576 + 40 + 240) + 128 + 8, 288),
    ],
)
def test_parameters_by_hand(model: dict[str, Any], total: int, inactive: int) -> None:
    counted = count_parameters(tiny(**model), 16)
    assert (counted.total, counted.active) == (total, total - inactive)
    vocabulary = 2 * 128 if "untie_embeddings_and_output_weights" in model else 128
    assert counted.non_embedding == total - inactive - vocabulary


PHD = {"phd_repeat": 3, "phd_window": 2}
QKV, PROJECTION, FFN = 2 * 8 * 16, 2 * 8 * 8, 3 * 2 * 8 * 12  # of one row


@pytest.mark.parametrize(
    ("model", "linear", "original_pairs", "hidden_pairs"),
    [
        # 4 tokens see 1 + 2 + 3 + 4 = 10 in each of 2 layers
        ({}, 2 * 4 * (QKV + PROJECTION + FFN), 20, 0),
        ({"gated_linear_unit": False}, 2 * 4 * (QKV + PROJECTION + FFN * 2 // 3), 20, 0),
        # Copy 2 sees itself and copy 3 both, at 4 tokens: 12. At 3 tokens both see both of the token before: 12.
        (PHD | {"phd_last_layer_pruning": False}, 2 * 12 * (QKV + PROJECTION + FFN), 2 * 30, 2 * 24),
        # In chunks of 2 only 2 tokens have one before them: 8 instead of 12.
        (PHD | {"phd_chunk": 2, "phd_last_layer_pruning": False}, 2 * 12 * (QKV + PROJECTION + FFN), 2 * 30, 2 * 20),
        # The last layer: copy 3 alone as query, 2 at each token and 2 of each token before: 8 + 6.
        (PHD, 2 * 12 * QKV + (12 + 4) * (PROJECTION + FFN), 30 + 10, 24 + 14),
        # plain PHD: a hidden query sees hidden keys of its own token alone
        ({"phd_repeat": 3, "phd_window": 1}, 2 * 12 * QKV + (12 + 4) * (PROJECTION + FFN), 30 + 10, 12 + 8),
        # router 2 x 8 x 4 and two experts of width 6, in the second layer
        (
            {"transformer": TINY_EXPERTS},
            2 * 4 * (QKV + PROJECTION) + 4 * FFN + 4 * (2 * 8 * 4 + 2 * 3 * 2 * 8 * 6),
            20,
            0,
        ),
    ],
)
def test_operations_by_hand(model: dict[str, Any], linear: int, original_pairs: int, hidden_pairs: int) -> None:
    counted = forward_flops(tiny(**model), 16)
    assert counted.linear == linear
    per_pair = 2 * (2 * 4) + 2 * (2 * 4)  # 2 heads of 4: scores and the weighted sum
    assert (counted.attention_original, counted.attention_hidden) == (
        per_pair * original_pairs,
        per_pair * hidden_pairs,
    )
    assert counted.head == 2 * 4 * 8 * 16  # of the 4 original tokens alone
    forward = linear + per_pair * (original_pairs + hidden_pairs) + 1024
    assert (counted.total, counted.training) == (forward, 3 * forward)


def test_what_is_not_resolved_is_refused() -> None:
    for count in (count_parameters, forward_flops):
        with pytest.raises(UserError, match="sizes are still missing"):
            count(ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2), 16)


# ---------------------------------------------------------------- memory against a model that is there


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


def known_differences(repeat: int, is_gated: bool) -> int:
    """What the estimate takes otherwise than PyTorch's plain functions on a CPU, in bytes, for SIZES unpruned."""
    rows = 4 * 256
    layer = 2  # elements of a row: the scales of two norms
    layer += 384 if is_gated else 0  # silu's output, which a fused SwiGLU does not keep
    layer -= 128 + 64 if repeat == 1 else 0  # query and key before RoPE, which goes on without copies of them
    head = 2 * 128 + 1 - 2 * 384  # the last norm; the loss' float32 softmax and its gradient come in the backward pass
    whole = 2 * 256 * 16 * 4 * repeat  # RoPE's table
    whole += 4 * 257 * 8 + rows * 8 + rows  # tokens, and where the loss looks its targets up
    return 4 * rows * (4 * repeat * layer + head) + whole


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"gated_linear_unit": False},
        {"phd_repeat": 2, "phd_last_layer_pruning": False},
        {"phd_repeat": 3, "phd_last_layer_pruning": False, "gated_linear_unit": False},
    ],
    ids=["pre", "gelu", "K2", "K3-gelu"],
)
def test_activations_are_what_is_saved_for_backward(model: dict[str, Any], runtime: Runtime) -> None:
    run = make_run(**model)
    planned = plan_run(run, 1, 1).memory.activations
    assert planned + known_differences(run.model.phd_repeat, run.model.gated_linear_unit) == saved_for_backward(run)


def test_activations_of_what_is_estimated_as_a_plain_layer(runtime: Runtime) -> None:
    """Four norms, of which two are of heads."""
    run = make_run(norm_scheme="hybrid_star", phd_repeat=3)
    assert plan_run(run, 1, 1).memory.activations == pytest.approx(saved_for_backward(run), rel=0.06)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("topk", [2, 4])
def test_activations_of_experts(width: int, topk: int, runtime: Runtime) -> None:
    experts = {**EXPERTS, "moe_ffn_hidden_size": width, "moe_router_topk": topk}
    run = make_run(transformer=experts, phd_repeat=2, phd_last_layer_pruning=False)
    silu = 4 * 4 * (2 * 4 * 256) * topk * width  # bytes, layers, rows: on a CPU it is kept too
    planned = plan_run(run, 1, 1).memory.activations + silu
    assert planned == pytest.approx(saved_for_backward(run), rel=0.03)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "distributed"])
def test_states_are_those_of_a_real_optimizer(half: bool, sharded: bool, runtime: Runtime) -> None:
    """Bytes of weights, of gradient buffers and of AdamW's states after a step, of the real thing on one rank."""
    from phd_megatron.model.build import build_model
    from phd_megatron.training.optimizer import build_optimizer, wrap_data_parallel

    run = make_run(num_layers=2)
    run.training.bf16, run.parallel.use_distributed_optimizer = half, sharded
    planned = plan_run(run, 1, 1).memory
    wrapped = wrap_data_parallel(build_model(run, 257, torch.device("cpu")), run)
    optimizer = build_optimizer(wrapped, run)
    weights = list(wrapped[0].parameters())
    assert sum(weight.numel() * weight.element_size() for weight in weights) == planned.weights
    buffers = [buffer.grad_data for buffer in wrapped[0].buffers]
    assert sum(each.numel() * each.element_size() for each in buffers) == pytest.approx(planned.gradients, rel=0.001)
    for weight in weights:
        weight.main_grad.fill_(1.0)
    assert optimizer.step()[0]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    held = {}
    for state in optimizer.optimizer.state.items():
        for tensor in (state[0], *state[1].values()):
            if torch.is_tensor(tensor) and tensor.dim() and tensor.untyped_storage().data_ptr() not in own:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert sum(held.values()) == pytest.approx(planned.optimizer, rel=0.001)


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


# ---------------------------------------------------------------- memory by hand


def planned(run: RunConfig, ranks: int, **parallel: Any) -> RunPlan:
    return plan_run(replace(run, parallel=replace(run.parallel, **parallel)), 100, ranks)


def test_states_by_hand() -> None:
    run = make_run()
    parameters = 4 * LAYER + EMBEDDING + 128
    alone = planned(run, 1)
    assert alone.parameters == parameters
    assert alone.memory.weights == alone.memory.gradients == 4 * parameters
    assert alone.memory.optimizer == 8 * parameters
    for half in ("bf16", "fp16"):
        training = replace(run.training, **{half: True})
        memory = planned(replace(run, training=training), 4).memory
        assert (memory.weights, memory.gradients) == (2 * parameters, 4 * parameters)
        assert memory.optimizer == 12 * parameters / 4
        training.accumulate_allreduce_grads_in_fp32 = False
        memory = planned(replace(run, training=training), 4, use_distributed_optimizer=False).memory
        assert (memory.weights, memory.gradients, memory.optimizer) == (
            *(2 * parameters, 2 * parameters),
            12 * parameters,
        )
    assert alone.memory.total == 16 * parameters + alone.memory.activations


def test_activations_by_hand() -> None:
    """Bytes of a row and layer: 4 streams of 128; query 128 and key 64 twice, value 64, context 128, a float a head."""
    rows, layer = 4 * 256, 4 * 128 + 2 * (128 + 64) + 64 + 128 + 4 + 3 * 384
    assert planned(make_run(), 1).memory.activations == rows * (4 * 4 * layer + 384 * 12)
    assert planned(make_run(phd_repeat=2), 1).memory.activations == rows * (2 * 4 * 4 * layer + 384 * 12)
    gelu = make_run(gated_linear_unit=False)
    assert planned(gelu, 1).memory.activations == rows * (4 * 4 * (layer - 384) + 384 * 12)
    half = make_run()
    half.training.bf16 = True
    # two bytes an element, except for the float of a head, and logits that the loss overwrites
    assert planned(half, 1).memory.activations == rows * (2 * 4 * (layer + 4) + 384 * 2)
    half.model.transformer["cross_entropy_loss_fusion"] = True
    assert planned(half, 1).memory.activations == rows * (2 * 4 * (layer + 4) + 384 * 10)
    # whole layers recomputed: the stream of each, and one layer at a time
    again = make_run(transformer={"recompute_granularity": "full", "recompute_method": "uniform"})
    assert planned(again, 1).memory.activations == rows * (4 * 4 * 128 + 4 * layer + 384 * 12)
    # an expert: its input 128, up, gate and activation of 128; 2 of them, and a probability for each of 8
    routed = make_run(transformer=dict(EXPERTS))
    assert planned(routed, 1).memory.activations == rows * (
        4 * 4 * (layer - 3 * 384 + 2 * (128 + 3 * 128) + 8) + 384 * 12
    )


def test_layouts_divide() -> None:
    run = make_run(transformer=dict(EXPERTS))
    alone, two = planned(run, 1).memory, planned(run, 2, expert_model_parallel_size=2).memory
    experts = 4 * 8 * 3 * 128 * 128
    assert alone.weights - two.weights == 4 * experts / 2
    dense = make_run()
    whole = planned(dense, 1)
    # The first stage has the embedding, the last its copy as a head and the last norm.
    stages = planned(dense, 2, pipeline_model_parallel_size=2).memory
    assert stages.weights == 4 * (2 * LAYER + EMBEDDING)
    assert planned(make_run(num_layers=1), 1).memory.weights == 4 * (LAYER + EMBEDDING + 128), "a tied head is no copy"
    cut = planned(dense, 2, tensor_model_parallel_size=2, sequence_parallel=True).memory
    assert cut.activations == whole.memory.activations / 2
    assert cut.weights == 4 * (4 * (LAYER - 256) / 2 + 4 * 256 + EMBEDDING / 2 + 128), "norms are on every rank"
    assert planned(dense, 2, context_parallel_size=2).memory.activations == whole.memory.activations / 2
    # without sequence parallelism the streams stay whole
    plain = planned(dense, 2, tensor_model_parallel_size=2).memory
    assert plain.activations - cut.activations == 4 * 256 * 4 * 4 * (4 * 128) / 2


def test_layouts_divide_states_over_the_ranks_that_hold_the_same() -> None:
    """8 ranks, 2 stages: dense states over DP x CP, those of experts over what is left beside EP and their TP."""
    run = make_run(transformer=dict(EXPERTS), untie_embeddings_and_output_weights=True)
    run.training.bf16 = True
    layout = {"pipeline_model_parallel_size": 2, "context_parallel_size": 2, "expert_model_parallel_size": 2}
    found = planned(run, 8, **layout).memory
    dense, experts = 2 * (32768 + 16384 + 256 + 8 * 128) + EMBEDDING, 2 * 8 * 3 * 128 * 128
    assert found.weights == 2 * (dense + experts / 2)
    assert found.gradients == 4 * (dense + experts / 2)
    assert found.optimizer == 12 * (dense / 4 + experts / 2 / 2)  # 8 / (2 stages x EP 2) = 2 ranks with these experts
    whole = planned(run, 8, **layout, use_distributed_optimizer=False).memory
    assert whole.optimizer == 12 * (dense + experts / 2)
    # experts' own TP cuts them further
    own = planned(run, 8, tensor_model_parallel_size=2, sequence_parallel=True, expert_tensor_parallel_size=2).memory
    inside = 4 * (32768 + 16384) / 2 + 4 * (256 + 8 * 128) + 2 * EMBEDDING / 2 + 128
    assert own.weights == 2 * (inside + 4 * 8 * 3 * 128 * 128 / 2)
    assert own.optimizer == 12 * (inside / 4 + 4 * 8 * 3 * 128 * 128 / 2 / 4)


def test_micro_batches_in_flight() -> None:
    """The first stage needs most here: PP micro-batches, with virtual stages 2 (PP - 1) + 2 + 1 passes of one layer."""
    rows, layer = 4 * 256, 4 * 128 + 2 * (128 + 64) + 64 + 128 + 4 + 3 * 384
    dense = make_run()
    assert planned(dense, 4, pipeline_model_parallel_size=4).memory.activations == rows * 4 * 4 * layer
    virtual = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    found = planned(dense, 2, **virtual).memory
    assert found.activations == rows * 5 * 4 * layer
    assert found.weights == 4 * (2 * LAYER + EMBEDDING)
    dense.training.global_batch_size = 8  # two micro-batches; the last stage has 3 passes, and the logits
    few = planned(dense, 2, **virtual).memory
    assert few.activations == rows * max(4 * 4 * layer, 3 * 4 * layer + 384 * 12)
    dense.training.global_batch_size = 4
    one = planned(dense, 4, pipeline_model_parallel_size=4).memory
    assert one.activations == rows * (4 * layer + 384 * 12), "one micro-batch"


def test_vectors_of_copies_lie_on_the_first_stage() -> None:
    run, more = make_run(phd_repeat=3), make_run(phd_repeat=3, phd_copy_embedding="vector")
    assert planned(more, 1).memory.weights - planned(run, 1).memory.weights == 4 * 2 * 128
    assert planned(more, 1).flops == planned(run, 1).flops
    stages = [planned(r, 2, pipeline_model_parallel_size=2).memory.weights for r in (run, more)]
    assert stages[1] - stages[0] == 4 * 2 * 128  # the first stage, which has the activations, needs most


def test_what_cannot_fit_is_refused_with_both_sizes() -> None:
    run = make_run()
    needed = 16 * (4 * LAYER + EMBEDDING + 128)  # activations are left out
    dims = ParallelDims.from_config(run.parallel, 1)
    refuse_what_cannot_fit(run, dims, needed, "this CPU")
    with pytest.raises(UserError, match=r"836,736 parameters .*take 0\.0 GiB, and this CPU has 0\.0 GiB"):
        refuse_what_cannot_fit(run, dims, needed - 1, "this CPU")
    assert 4 * LAYER + EMBEDDING + 128 == 836_736


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("more", [{}, {"transformer": EXPERTS}], ids=["dense", "experts"])
def test_muon_keeps_one_moment_of_the_matrices_of_layers(half: bool, more: dict[str, Any]) -> None:
    adam, muon = (make_run(**more) for _ in range(2))
    adam.parallel.use_distributed_optimizer = muon.parallel.use_distributed_optimizer = False
    muon.optimizer.optimizer = "muon"
    adam.training.bf16 = muon.training.bf16 = half
    counted = count_parameters(adam.model, 384)
    matrices = sum(layer.dense + layer.experts for layer in counted.layers)
    before, after = (planned(run, 1).memory.optimizer for run in (adam, muon))
    assert before - after == 4 * matrices > 0
    assert after == (12 if half else 8) * counted.total - 4 * matrices


def test_a_start_compares_the_run_with_the_memory_that_is_known() -> None:
    run = make_run()
    for memory in (None, 2**34):
        _check_machine(run, 1, Capabilities(memory=memory))
    with pytest.raises(UserError, match=r"and this machine has 0\.0 GiB"):
        _check_machine(run, 1, Capabilities(memory=1000))


# ---------------------------------------------------------------- costs


def test_expected_operations_of_documents_that_are_kept_apart() -> None:
    """Every way in which seven tokens may be documents, weighed by its chance."""
    run = make_run(phd_repeat=3, phd_window=3, phd_chunk=4, seq_length=7, num_layers=2)
    mean, expected = 2.5, 0.0
    whole = forward_flops(run.model, 384)
    per_pair = 4 * run.model.hidden_size
    policy, last = KVPolicy(3, 3, 4), 1 if run.model.phd_last_layer_pruning else 3
    for ends in itertools.product((False, True), repeat=6):  # whether a token ends its document
        borders = [0, *(place + 1 for place, end in enumerate(ends) if end), 7]
        lengths = [stop - start for start, stop in itertools.pairwise(borders)]
        pairs = sum(policy.document_pairs(lengths)) + sum(policy.document_pairs(lengths, last))
        chance = math.prod(1 / mean if end else 1 - 1 / mean for end in ends)
        expected += chance * per_pair * pairs
    assert mean_document_flops(run.model, 384, mean) == pytest.approx(3 * (whole.linear + whole.head + expected))
    assert mean_document_flops(run.model, 384, 1e15) == pytest.approx(whole.training)
    run.data.reset_attention_mask = True
    plan = plan_run(run, 100, 1, mean)
    assert (
        plan.flops == pytest.approx(100 * mean_document_flops(run.model, 384, mean))
        and plan.flops < planned(run, 1).flops
    )


def test_costs_by_hand() -> None:
    run = make_run(phd_repeat=2)
    plan = planned(run, 1)
    assert (plan.samples, plan.tokens, plan.processed_tokens, plan.ranks) == (100, 100 * 256, 100 * 512, 1)
    assert plan.flops == 100 * forward_flops(run.model, 384).training
    assert plan.flops_per_token == forward_flops(run.model, 384).training / 256
    assert device_hours(3.6e15 * 989, 989, 0.5) == 2.0
    assert plan.device_hours(100.0, 0.4) == pytest.approx(plan.flops / 1e14 / 0.4 / 3600)
    assert plan.parameters == plan.active_parameters == 836_736
    assert plan.non_embedding_parameters == 836_736 - EMBEDDING


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        *[("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989)],
        *[("NVIDIA A100-SXM4-80GB", 312), ("cpu", None), ("NVIDIA L4", None)],
    ],
)
def test_peaks(device: str, peak: float | None) -> None:
    assert peak_tflops(None, device) == peak
    assert peak_tflops(5.0, device) == 5.0


def test_large_numbers_for_people() -> None:
    assert [short(n) for n in (12, 999.9, 1000, 1234, 99_990, 100_000, 6.92e9, 151.4e6, 1e12)] == (
        ["12", "999.9", "1.00k", "1.23k", "99.99k", "100k", "6.92B", "151M", "1.00T"]
    )
    assert [gib(2**30), gib(1.55 * 2**40), gib(2**29)] == ["1.0 GiB", "1,587.2 GiB", "0.5 GiB"]
    assert math.isclose(float(gib(80e9).split()[0]), 74.5)


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
