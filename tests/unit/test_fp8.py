"""FP8 is refused, before a GPU is used, wherever machine, layout or a dimension does not allow it; both sides of each
limit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from phd_megatron.config.precision import drop_fp8, for_cpu, fp8_layers, precision_problems
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.errors import UserError
from phd_megatron.runtime.capabilities import Capabilities, parse_version
from phd_megatron.runtime.context import install_backend
from phd_megatron.runtime.fp8 import RECIPES, machine_problems, size_problems
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.requirements import require

HOPPER = Capabilities("cuda", "NVIDIA H100", (9, 0), (12, 9), (2, 11), "")
FITTING = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "kv_channels": 16}
FITTING |= {"num_query_groups": 2, "seq_length": 48, "bf16": True, "fp8": "hybrid"}


def make(**values: Any) -> RunConfig:
    """A resolved run."""
    config = RunConfig()
    for name, value in {**FITTING, **values}.items():
        assign(config, name, value)
    resolve(config)
    return config


def sizes(config: RunConfig, world_size: int = 1) -> str:
    return "\n".join(size_problems(config, ParallelDims.from_config(config.parallel, world_size)))


# ---------------------------------------------------------------- the machine

H100_CUDA_12_8 = replace(HOPPER, cuda=(12, 8))
ADA, AMPERE, BLACKWELL, RTX = (
    replace(HOPPER, compute_capability=gpu, device_name=name)
    for gpu, name in (((8, 9), "L40"), ((8, 0), "A100"), ((10, 0), "B200"), ((12, 0), "RTX 5090"))
)
MACHINES = [
    *[(recipe, HOPPER, "") for recipe in ("delayed", "tensorwise", "blockwise")],
    *[(recipe, ADA, "") for recipe in ("delayed", "tensorwise")],
    ("mxfp8", BLACKWELL, ""),
    ("mxfp8", HOPPER, "NVIDIA H100 has compute capability 9.0, and it needs 10.0 (Blackwell) or newer and below 12.0"),
    ("mxfp8", RTX, "compute capability 12.0, and it needs 10.0"),
    ("delayed", AMPERE, "A100 has compute capability 8.0, and it needs 8.9 (Ada) or newer; leave fp8 out"),
    ("blockwise", ADA, "8.9, and it needs 9.0 (Hopper) or newer; use fp8_recipe delayed, tensorwise, or leave"),
    ("blockwise", H100_CUDA_12_8, "built with CUDA 12.8, and the product needs 12.9 or newer"),
    ("blockwise", replace(HOPPER, cuda=(13, 0)), ""),
    ("tensorwise", H100_CUDA_12_8, ""),
    ("tensorwise", replace(ADA, cuda=(12, 0)), "built with CUDA 12.0, and the product needs 12.1 or newer"),
    ("tensorwise", replace(ADA, cuda=(12, 1)), ""),
    ("tensorwise", replace(HOPPER, cuda=(12, 0)), ""),
    (
        "blockwise",
        replace(HOPPER, transformer_engine=(2, 2)),
        "Transformer Engine is 2.2, and this recipe came with 2.3",
    ),
    ("blockwise", replace(HOPPER, transformer_engine=(2, 3)), ""),
    ("delayed", replace(HOPPER, transformer_engine=None, transformer_engine_problem="it is broken"), "it is broken"),
    ("delayed", Capabilities(), "the device is the CPU"),
]


@pytest.mark.parametrize(("recipe", "machine", "refusal"), MACHINES)
def test_machines(recipe: str, machine: Capabilities, refusal: str) -> None:
    found = "\n".join(machine_problems(make(fp8_recipe=recipe).model, machine))
    assert found.startswith(f"fp8=hybrid with fp8_recipe={recipe}") if refusal else not found
    assert refusal in found


def test_local_layers_have_no_fp8() -> None:
    config = make()
    config.model.transformer_impl = "local"
    assert "would silently compute in bfloat16" in "\n".join(machine_problems(config.model, HOPPER))


def test_every_problem_is_told_at_once() -> None:
    config = make(fp8_recipe="blockwise", hidden_size=72)
    dims = ParallelDims.from_config(config.parallel, 1)
    with pytest.raises(UserError, match=r"(?s)2 problems:.*CUDA 12\.8.*hidden_size = 72"):
        require(config, dims, H100_CUDA_12_8)
    drop_fp8(config.model)
    require(config, dims, Capabilities())


def test_versions() -> None:
    assert parse_version("12.9") == (12, 9)
    assert parse_version("2.11.0+c188b53") == (2, 11)
    assert parse_version("2.12.0rc1") == (2, 12)
    assert parse_version("13") == (13, 0)
    assert parse_version("12.10") > (12, 9)


# ---------------------------------------------------------------- dimensions of products

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_experts_backend": "te"}
SIZES = [
    ({}, ""),
    (
        {"hidden_size": 72},
        "hidden_size = 72 is not a multiple of 16, which the widths of FP8 products are; use hidden_si",
    ),
    (
        {"ffn_hidden_size": 100},
        "ffn_hidden_size = 100 is not a multiple of 16, which the widths of FP8 products are; use ",
    ),
    ({"ffn_hidden_size": 100}, "use ffn_hidden_size=112, or leave fp8 out"),
    ({"kv_channels": 6}, "num_attention_heads 4 x kv_channels 6 = 24 is not a multiple of 16"),
    ({"kv_channels": 6}, "use kv_channels=8, or leave"),
    ({"fp8_recipe": "mxfp8", "ffn_hidden_size": 112}, "ffn_hidden_size = 112 is not a multiple of 32"),
    ({**EXPERTS}, ""),
    ({**EXPERTS, "moe_ffn_hidden_size": 40}, "moe_ffn_hidden_size = 40 is not a multiple of 16"),
    ({**EXPERTS, "moe_ffn_hidden_size": 40, "moe_experts_backend": "sequential"}, "moe_ffn_hidden_size = 40"),
    ({**EXPERTS, "moe_ffn_hidden_size": 40, "moe_experts_backend": "auto"}, ""),  # they are in bfloat16
    ({**EXPERTS, "moe_ffn_hidden_size": 40, "moe_experts_backend": "grouped_mm"}, ""),
    ({**EXPERTS, "moe_ffn_hidden_size": 40, "moe_experts_backend": "auto", "optimizer": "muon"}, "size = 40"),
    ({**EXPERTS, "moe_shared_expert_intermediate_size": 24}, "moe_shared_expert_intermediate_size = 24 is not a"),
    ({**EXPERTS, "ffn_hidden_size": 100}, ""),  # no layer has a dense FFN
    ({**EXPERTS, "ffn_hidden_size": 100, "moe_layer_freq": 2}, "ffn_hidden_size = 100"),
    ({**EXPERTS, "moe_ffn_hidden_size": 40, "moe_layer_freq": [0, 0, 0, 1]}, "moe_ffn_hidden_size = 40"),
    # the only layer with experts is in bfloat16
    (
        {
            **EXPERTS,
            **{"moe_ffn_hidden_size": 40, "moe_layer_freq": [0, 0, 0, 1]},
            **{"first_last_layers_bf16": True, "fp8_recipe": "tensorwise"},
        },
        "",
    ),
    # rows: 40 of all copies do, and 40 do not; the last copy's in the pruned last layer
    ({"seq_length": 40}, "seq_length 40 x micro_batch_size 1 rows = 40 is not a multiple of 16"),
    ({"seq_length": 40}, "use seq_length=48, another micro_batch_size"),
    ({"seq_length": 40, "micro_batch_size": 2}, ""),
    (
        {"seq_length": 40, "phd_repeat": 2},
        "seq_length 40 x micro_batch_size 1 rows of the last copy, alone in the last ",
    ),
    ({"seq_length": 40, "phd_repeat": 2, "phd_last_layer_pruning": False}, ""),
    (
        {"seq_length": 40, "phd_repeat": 3, "phd_last_layer_pruning": False},
        "x phd_repeat 3 x micro_batch_size 1 rows = 12",
    ),
    (
        {"seq_length": 40, "phd_repeat": 2, "first_last_layers_bf16": True, "fp8_recipe": "tensorwise"},
        "",  # the last layer is in bfloat16
    ),
]


@pytest.mark.parametrize(("values", "refusal"), SIZES)
def test_sizes_on_one_rank(values: dict[str, Any], refusal: str) -> None:
    found = sizes(make(**values))
    assert bool(found) == bool(refusal)
    assert refusal in found


TP2 = {"tensor_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
LAYOUTS = [
    (TP2, 2, ""),
    (
        {**TP2, "ffn_hidden_size": 112},
        2,
        "ffn_hidden_size 112 / tensor_model_parallel_size 2 = 56 is not a multiple of 16",
    ),
    ({**TP2, "ffn_hidden_size": 112}, 2, "use ffn_hidden_size=128"),
    ({**TP2, "kv_channels": 4}, 2, "num_attention_heads 4 x kv_channels 4 / tensor_model_parallel_size 2 = 8"),
    ({**TP2, "kv_channels": 4}, 2, "use kv_channels=8"),
    (SP, 2, ""),
    # The product sees the gathered rows; each rank quantises its own.
    ({**SP, "seq_length": 56}, 2, "seq_length 56 x micro_batch_size 1 rows = 56 is not a multiple of 16"),
    ({**SP, "seq_length": 56}, 2, "/ tensor_model_parallel_size 2 rows = 28 is not a multiple of 8"),
    ({**SP, "seq_length": 56}, 2, "use seq_length=64"),
    ({**SP, "seq_length": 64, "tensor_model_parallel_size": 4, "num_query_groups": 4, "ffn_hidden_size": 128}, 4, ""),
    ({**SP, "fp8_recipe": "blockwise", "seq_length": 256, "hidden_size": 128}, 2, ""),
    (
        {**SP, "fp8_recipe": "blockwise", "seq_length": 256, "hidden_size": 192},
        2,
        "hidden_size = 192 is not a multiple of 128",
    ),
    ({**SP, "fp8_recipe": "blockwise", "seq_length": 192, "hidden_size": 128}, 2, "rows = 96 is not a multiple of 128"),
    ({**SP, "fp8_recipe": "blockwise", "seq_length": 192, "hidden_size": 128}, 2, "use seq_length=256"),
    ({"fp8_recipe": "blockwise", "seq_length": 48, "hidden_size": 48}, 1, ""),  # nothing quantised is gathered
    ({"context_parallel_size": 2, "seq_length": 64}, 2, ""),
    ({"context_parallel_size": 2, "seq_length": 48}, 2, "context_parallel_size 2 rows = 24 is not a multiple of 16"),
    ({"context_parallel_size": 2, "seq_length": 48}, 2, "use seq_length=64"),
    (
        {**EXPERTS, **SP, "expert_tensor_parallel_size": 2},
        2,
        "moe_ffn_hidden_size 48 / expert_tensor_parallel_size 2 = 24",
    ),
    ({**EXPERTS, **SP, "expert_tensor_parallel_size": 1}, 2, ""),
    # A head on a stage of its own: its last layer computes all copies.
    (
        {
            **{"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Etttt|L"},
            **{"seq_length": 40, "phd_repeat": 2},
        },
        2,
        "",
    ),
]


@pytest.mark.parametrize(("values", "world_size", "refusal"), LAYOUTS)
def test_sizes_in_a_layout(values: dict[str, Any], world_size: int, refusal: str) -> None:
    found = sizes(make(**values), world_size)
    assert bool(found) == bool(refusal)
    assert refusal in found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("values", [{"seq_length": 40, "phd_repeat": 3}, {**SP, "seq_length": 44}, {"seq_length": 50}])
def test_what_is_advised_fits(values: dict[str, Any], recipe: str) -> None:
    wide = {"hidden_size": 128, "ffn_hidden_size": 256, "kv_channels": 64, "fp8_recipe": recipe}
    config = make(**wide, **values)
    found = sizes(config, 2)
    advised = int(found.split("use seq_length=")[1].split(",")[0])
    assert advised > config.model.seq_length
    config.model.seq_length = advised
    assert not sizes(config, 2)


# ---------------------------------------------------------------- configurations

REFUSED = [
    ({"bf16": False}, "float32 parameters"),
    ({"bf16": False, "fp16": True}, "loss scaling"),
    ({"first_last_layers_bf16": True}, "fp8_recipe=delayed"),
    ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "recompute_modules=['layernorm']"),
    ({"fp8_recipe": "tensorwise", "fp8_amax_history_len": 16}, "fp8_amax_history_len=16: fp8_recipe=tensorwise does"),
    ({"fp8_recipe": "blockwise", "fp8_wgrad": False}, "fp8_wgrad=False"),
    ({"fp8_interval": 2}, "fp8_interval=2"),
    ({"fp8_recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 5}, "from 0 to 4"),
    ({"fp8_recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3}, "leaves none of"),
    ({"fp8_recipe": "custom"}, "names Python code"),
    ({"num_layers_at_start_in_bf16": 2}, "without first_last_layers_bf16"),
    ({"activation_func_fp8_input_store": True}, "SwiGLU"),
    ({"fp8_param": True, "use_distributed_optimizer": False}, "fp8_param=True without use_distributed_optimizer"),
    ({"fp8_param": True, "fp8_recipe": "mxfp8"}, "fp8_param=True with fp8_recipe=mxfp8"),
    ({"fp8_param": True, "dump_gradients_dir": "x"}, "dump_gradients_dir=x with fp8_param=True"),
]
ACCEPTED = [
    {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max", "fp8_wgrad": False},
    {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2},
    {"fp8_recipe": "tensorwise", "recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    {"fp8_param": True},
    {**EXPERTS, "moe_router_padding_for_quantization": True, "moe_token_dispatcher_type": "alltoall"},
]


@pytest.mark.parametrize(("values", "refusal"), REFUSED)
def test_refused_combinations(values: dict[str, Any], refusal: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**values)
    assert refusal in str(caught.value)


@pytest.mark.parametrize("values", ACCEPTED)
def test_accepted_combinations(values: dict[str, Any]) -> None:
    assert not list(precision_problems(make(**values)))


def test_layers() -> None:
    assert fp8_layers(make().model) == range(4)
    assert fp8_layers(make(fp8=None).model) == range(0)
    edges = {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    assert fp8_layers(make(**edges).model) == range(1, 3)
    assert fp8_layers(make(**edges, num_layers_at_end_in_bf16=0).model) == range(1, 4)


def test_the_same_model_without_fp8() -> None:
    """Evaluation and export on a machine without a GPU build the same model, whatever computed it."""
    config = make(
        **EXPERTS,
        **{"fp8_recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2},
        **{"moe_router_padding_for_quantization": True, "moe_token_dispatcher_type": "alltoall"},
        **{"moe_grouped_gemm": True, "gradient_accumulation_fusion": True, "tp_comm_overlap": True},
    )
    plain = copy.deepcopy(config)
    assert for_cpu(plain.model) and not for_cpu(plain.model)
    assert (plain.model.transformer_impl, plain.model.moe_experts_backend) == ("local", "auto")
    left = {name for name in config.model.transformer if name not in plain.model.transformer}
    resolve(plain)
    assert left == {
        *("fp8", "fp8_recipe", "first_last_layers_bf16", "num_layers_at_start_in_bf16"),
        *("moe_router_padding_for_quantization", "moe_grouped_gemm", "gradient_accumulation_fusion", "tp_comm_overlap"),
    }


@pytest.mark.parametrize("backend", ["auto", "grouped_mm", "te", "sequential"])
def test_padding_is_left_out_where_experts_are_not_fp8(backend: str) -> None:
    """A run from before there were others has it, and goes on, evaluates and exports without being told to."""
    config = RunConfig()
    values = {**EXPERTS, "moe_experts_backend": backend, "moe_router_padding_for_quantization": True, "fp8": "hybrid"}
    for name, value in {**FITTING, **values}.items():
        assign(config, name, value)
    notes = resolve(config)
    left = backend in ("auto", "grouped_mm")
    assert (
        any("padding_for_quantization=True left out: experts in bfloat16 need none" in note for note in notes) == left
    )
    assert ("moe_router_padding_for_quantization" in config.model.transformer) != left


def test_fp8_is_switched_off_with_all_that_belongs_to_it() -> None:
    config = make(fp8_recipe="tensorwise", first_last_layers_bf16=True)
    config.model.transformer["fp8"] = None  # what --fp8-format null does to the configuration of a checkpoint
    notes = resolve(config)
    assert "fp8=null: fp8_recipe=tensorwise, first_last_layers_bf16=True left out with it" in notes
    assert not {"fp8_recipe", "first_last_layers_bf16"} & set(config.model.transformer)
    assert not any("fp8" in note for note in resolve(config))


def test_quantised_weights_are_set_as_plain_ones() -> None:
    install_backend("cpu")
    from phd_megatron.model.quantised import plain_weights

    layer = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
    weight, bias = layer.weight, layer.bias
    weight._high_precision_init_val = torch.zeros(3, 4)  # as Transformer Engine keeps it, for the optimizer
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with plain_weights(layer, torch.float32, quantised=lambda parameter: parameter is weight):
        assert layer.weight is not weight and layer.weight.dtype == torch.float32 and layer.bias is bias
        with torch.no_grad():
            layer.weight.copy_(values)
    assert layer.weight is weight and layer.bias is bias
    assert torch.equal(weight, values.bfloat16())
    assert torch.equal(weight._high_precision_init_val, values), "the optimizer starts from unrounded values"
    with plain_weights(layer, torch.float32):
        assert layer.weight is weight, "nothing is quantised"
