"""Which implementation is chosen for what, that the table says it, and what is refused without Transformer Engine."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.errors import UserError
from phd_megatron.kernels.qkv_norm_rope import is_chosen
from phd_megatron.runtime.capabilities import Capabilities, probe
from phd_megatron.runtime.context import install_backend
from phd_megatron.runtime.flex_dispatcher import flex_problems
from phd_megatron.runtime.implementations import (
    _layers,
    _precision,
    fused_norms,
    gradient_accumulation,
    operations,
    require_transformer_engine,
    table,
    use_transformer_engine,
)
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.runtime.requirements import require
from phd_megatron.runtime.userbuffers import overlap_problems

HOPPER = Capabilities("cuda", "NVIDIA H100", (9, 0), (12, 9), (2, 11), "")
WITHOUT = replace(HOPPER, transformer_engine=None, transformer_engine_problem="transformer-engine is not installed")
APEX = replace(WITHOUT, apex_adam=True, apex_weight_gradient=True)


def make(**values: Any) -> RunConfig:
    """A resolved run in bfloat16."""
    config = RunConfig()
    sizes = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 48, "bf16": True}
    for name, value in {**sizes, **values}.items():
        assign(config, name, value)
    resolve(config)
    return config


def rows(machine: Capabilities, **values: Any) -> dict[str, tuple[str, str]]:
    run = make(**values)
    on_cpu = replace(machine, device="cpu")  # this machine has no other attention
    return {row.name: (row.implementation, row.reason) for row in operations(run, on_cpu)}


@pytest.mark.parametrize(
    ("backend", "on_cpu", "on_gpu"),
    [
        ("auto", False, True),
        ("reference", False, False),
        ("sdpa", False, False),
        ("flex", False, False),
        ("triton", True, True),  # asked for: where it cannot run it says so itself
        ("sdpa_triton", True, True),
    ],
)
def test_norms_and_rope_come_in_one_kernel_or_not(backend: str, on_cpu: bool, on_gpu: bool) -> None:
    assert is_chosen(backend, "there is no CUDA device") == on_cpu
    assert is_chosen(backend, None) == on_gpu


def test_transformer_engine_or_not() -> None:
    assert use_transformer_engine("auto", HOPPER) == (
        True,
        "transformer_impl=auto takes it: Transformer Engine 2.11 is installed",
    )
    assert use_transformer_engine("transformer_engine", HOPPER)[0]
    assert use_transformer_engine("auto", WITHOUT) == (False, "transformer-engine is not installed")
    assert use_transformer_engine("local", HOPPER) == (False, "asked for by transformer_impl=local")
    with pytest.raises(UserError, match=r"transformer_impl=transformer_engine, but .*is not installed; use"):
        use_transformer_engine("transformer_engine", WITHOUT)
    with pytest.raises(UserError, match="there is no CUDA device"):
        use_transformer_engine("transformer_engine", probe("cpu"))


@pytest.mark.parametrize("field", ["moe_permute_fusion", "moe_router_fusion", "tp_comm_overlap"])
def test_what_only_transformer_engine_does(field: str) -> None:
    experts = {"num_moe_experts": 4, "moe_router_topk": 2} if field.startswith("moe") else {}
    model = make(**experts, **{field: True}).model
    require_transformer_engine(model, HOPPER)
    for machine in (WITHOUT, Capabilities()):
        with pytest.raises(UserError, match=f"{field}=True: only Transformer Engine does that.*leave it out"):
            require_transformer_engine(model, machine)


def test_fused_cross_entropy_of_transformer_engine() -> None:
    fused = {"cross_entropy_loss_fusion": True}
    require_transformer_engine(make(**fused).model, WITHOUT)
    with pytest.raises(UserError, match="cross_entropy_fusion_impl='te'"):
        require_transformer_engine(make(**fused, cross_entropy_fusion_impl="te").model, WITHOUT)


def test_gradient_accumulation() -> None:
    auto = make()
    off = make(gradient_accumulation_fusion=False)
    on = make(gradient_accumulation_fusion=True)
    assert [gradient_accumulation(auto, machine)[0] for machine in (HOPPER, APEX, WITHOUT)] == ["te", "all", ""]
    assert {gradient_accumulation(off, machine)[0] for machine in (HOPPER, APEX, WITHOUT)} == {""}
    assert [gradient_accumulation(on, machine)[0] for machine in (HOPPER, APEX, WITHOUT)] == ["all"] * 3
    old = {"weight_gradient_problem": "torch 2.1 has no addmm that adds to another type"}
    assert gradient_accumulation(on, replace(HOPPER, **old))[0] == "te"
    with pytest.raises(
        UserError, match=r"gradient_accumulation_fusion=True needs .*not installed.*torch 2.1.*leave it"
    ):
        gradient_accumulation(on, replace(WITHOUT, **old))
    divided = make()
    divided.parallel.deepspeed = True
    assert {gradient_accumulation(divided, machine)[0] for machine in (HOPPER, APEX, WITHOUT)} == {""}


OVERLAP = {"tp_comm_overlap": True, "tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("values", "machine", "refusal"),
    [
        (OVERLAP, HOPPER, ""),
        ({**OVERLAP, "sequence_parallel": False}, HOPPER, "sequence_parallel=False: it overlaps"),
        ({"tp_comm_overlap": True}, HOPPER, "tensor_model_parallel_size=1"),
        ({**OVERLAP, "phd_repeat": 2}, HOPPER, "the last layer computes the last copy alone"),
        ({**OVERLAP, "phd_repeat": 2, "phd_last_layer_pruning": False}, HOPPER, ""),
        ({**OVERLAP, "num_moe_experts": 4}, HOPPER, "with experts is not tested"),
        (OVERLAP, replace(HOPPER, transformer_engine=(2, 6)), "Transformer Engine is 2.6, and it needs 2.7"),
        ({**OVERLAP, "tp_comm_overlap": False, "phd_repeat": 2}, WITHOUT, ""),
    ],
)
def test_overlapped_tensor_parallelism(values: dict[str, Any], machine: Capabilities, refusal: str) -> None:
    run = make(**values)
    found = "\n".join(overlap_problems(run, ParallelDims.from_config(run.parallel, 2), machine))
    assert bool(found) == bool(refusal)
    assert refusal in found


def test_the_table_of_a_cpu() -> None:
    found = rows(Capabilities())
    assert found["linear layers"] == ("torch matmul (Megatron's local layers)", "there is no CUDA device")
    assert found["norms"][0] == "torch rms_norm / layer_norm"
    assert found["FP8"][0] == "not used"
    assert found["optimizer"][0] == "torch AdamW(fused=True)"
    assert found["gradient accumulation"][0] == "after the GEMM"
    assert all(implementation and reason for implementation, reason in found.values())


def test_the_table_of_a_gpu() -> None:
    edges = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
    found = rows(HOPPER, **edges, norm_scheme="hybrid_star")
    assert found["linear layers"][0] == found["norms"][0] == "Transformer Engine"
    assert found["norms"][1].startswith("2 of 8 sublayers of hybrid_star")
    assert found["FP8"] == (
        "hybrid, tensorwise",
        "linear layers of blocks 1 to 2 of 4; embedding, attention, router, norms and head stay in bfloat16",
    )
    assert found["optimizer"][0] == "Transformer Engine FusedAdam"
    assert found["gradient accumulation"][0] == "inside Transformer Engine's GEMMs"
    assert rows(APEX)["optimizer"][0] == "apex FusedAdam"


EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2}
STACKED, GROUPED, SINGLE = "torch grouped_mm, weights stacked", "Transformer Engine grouped GEMM", "one GEMM per expert"
OLD = replace(HOPPER, compute_capability=(7, 5))


def test_experts_beside_fp8_layers_are_named_where_they_are_not() -> None:
    for backend, named in (("auto", True), ("te", False)):
        run = make(**EXPERTS, fp8="hybrid", moe_experts_backend=backend)
        (row,) = [row for row in _precision(run, HOPPER) if row.name == "FP8"]
        assert ("experts, router" in row.reason) == named


@pytest.mark.parametrize(
    ("machine", "values", "implementation", "reason"),
    [
        (HOPPER, {}, STACKED, "auto takes it: one product for all experts"),
        (WITHOUT, {"moe_grouped_gemm": True}, STACKED, "auto takes it"),
        (HOPPER, {"moe_grouped_gemm": True}, STACKED, "auto takes it"),
        (HOPPER, {"moe_experts_backend": "grouped_mm"}, STACKED, "asked for: one product for all"),
        (HOPPER, {"moe_experts_backend": "te"}, GROUPED, "asked for by moe_experts_backend=te"),
        (HOPPER, {"moe_experts_backend": "sequential"}, f"Transformer Engine, {SINGLE}", "asked for"),
        (WITHOUT, {"moe_experts_backend": "sequential"}, f"torch, {SINGLE}", "asked for"),
        (HOPPER, {"expert_model_parallel_size": 2}, STACKED, "one product for all experts, the host reads counts"),
        (HOPPER, {"moe_expert_capacity_factor": 1.0}, STACKED, "the host reads counts"),
        (HOPPER, {"moe_token_dispatcher_type": "alltoall"}, STACKED, "nothing waits for the host"),
        (HOPPER, {"fp8": "hybrid"}, STACKED, "in bfloat16, which was the quicker"),
        (HOPPER, {"optimizer": "muon"}, f"Transformer Engine, {SINGLE}", "muon works on matrices of single experts"),
        (HOPPER, {"optimizer": "muon", "moe_grouped_gemm": True}, GROUPED, "muon works on"),
        (HOPPER, {"bf16": False}, STACKED, "one product per expert, for which the host reads how many rows each has"),
        (HOPPER, {"bf16": False, "moe_grouped_gemm": True}, GROUPED, "grouped_mm multiplies in bfloat16"),
        (OLD, {}, STACKED, "needs compute capability 8.0, and this is 7.5"),
        (OLD, {"moe_grouped_gemm": True}, GROUPED, "needs compute capability 8.0"),
        (HOPPER, {"moe_ffn_hidden_size": 100}, STACKED, "100 is not a multiple of 8"),
        (HOPPER, {"moe_ffn_hidden_size": 104, "expert_tensor_parallel_size": 2}, STACKED, "52 is not a multiple of 8"),
        (Capabilities(), {}, STACKED, "auto takes it: one product for all experts"),
        (Capabilities(), {"bf16": False}, STACKED, "multiplies in bfloat16, not in float32"),
    ],
)
def test_which_experts(machine: Capabilities, values: dict[str, Any], implementation: str, reason: str) -> None:
    if values.get("expert_tensor_parallel_size"):
        values = {**values, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    run = make(**EXPERTS, **values)
    (row,) = [row for row in _layers(run, machine) if row.name == "experts"]
    assert row.implementation == implementation and reason in row.reason, row


FLEX = {**EXPERTS, "moe_token_dispatcher_type": "flex", "moe_router_dtype": "fp32", "expert_model_parallel_size": 2}
WITH_DEEPEP = replace(HOPPER, deepep_problem=None, hybridep_problem="this deep_ep has no HybridEPBuffer")


@pytest.mark.parametrize(
    ("values", "machine", "refusal"),
    [
        (FLEX, WITH_DEEPEP, ""),
        ({**FLEX, "moe_flex_dispatcher_backend": "deepep", "moe_deepep_num_sms": 16}, WITH_DEEPEP, ""),
        (
            FLEX,
            replace(HOPPER, deepep_problem="deep_ep is not installed"),
            "deepep: deep_ep is not installed; install github.com",
        ),
        (FLEX, Capabilities(), "deepep: there is no CUDA device; use moe_token_dispatcher_type alltoall"),
        ({**FLEX, "moe_flex_dispatcher_backend": "hybridep"}, WITH_DEEPEP, "=hybridep: this deep_ep has no HybridEPB"),
        ({**FLEX, "moe_flex_dispatcher_backend": "hybridep"}, replace(WITH_DEEPEP, hybridep_problem=None), ""),
        ({**FLEX, "expert_model_parallel_size": 1}, WITH_DEEPEP, "there is nothing to send; use moe_token_dispatcher_"),
        ({**FLEX, "moe_router_dtype": "fp64"}, WITH_DEEPEP, "sends weights in float32; set moe_router_dtype fp32"),
        ({**FLEX, "moe_token_dispatcher_type": "alltoall"}, Capabilities(), ""),
    ],
)
def test_the_flex_dispatcher(values: dict[str, Any], machine: Capabilities, refusal: str) -> None:
    run = make(**values)
    dims = ParallelDims.from_config(run.parallel, 2)
    found = "\n".join(flex_problems(run, dims, machine))
    assert bool(found) == bool(refusal) and refusal in found
    if refusal:
        with pytest.raises(UserError, match="moe_token_dispatcher_type=flex"):
            require(run, dims, machine)


def test_experts_that_cannot_be_had() -> None:
    run = make(**EXPERTS, moe_experts_backend="te")
    with pytest.raises(UserError, match=r"moe_experts_backend=te needs .*transformer-engine is not installed; use"):
        table(run, WITHOUT)
    moe_act = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    for values, machine, message in (
        ({"moe_grouped_gemm": True}, WITHOUT, "moe_grouped_gemm=True: that is of grouped experts, and these are"),
        (moe_act, HOPPER, "recompute_modules with moe_act: that is of grouped experts, .*: muon works on matrices"),
    ):
        run = make(**EXPERTS, **values, optimizer="muon")
        with pytest.raises(UserError, match=message):
            require(run, ParallelDims.from_config(run.parallel, 1), machine)
    run = make(**EXPERTS, **moe_act, moe_grouped_gemm=True, optimizer="muon")
    require(run, ParallelDims.from_config(run.parallel, 1), HOPPER)
    for values, message in (
        ({"moe_experts_backend": "grouped_mm", "optimizer": "muon"}, "optimizer=muon: muon works on matrices of"),
        ({"moe_experts_backend": "sequential", "moe_grouped_gemm": True}, "says the opposite; leave one of them out"),
        ({"moe_experts_backend": "te", "transformer_impl": "local"}, "needs Transformer Engine's layers"),
        (
            {
                "moe_experts_backend": "sequential",
                "recompute_granularity": "selective",
                "recompute_modules": ["moe_act"],
            },
            "moe_act is a part of grouped experts",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make(**EXPERTS, **values)
    with pytest.raises(UserError, match="moe_experts_backend='grouped_mm': it has no effect without experts"):
        make(moe_experts_backend="grouped_mm")
    make(moe_experts_backend="auto")


def test_the_table_says_where_triton_computes() -> None:
    names = ("q/k/v norm and RoPE", "SwiGLU", "cross entropy")
    with_triton = rows(replace(HOPPER, triton_problem=None))
    assert {with_triton[name][0] for name in names} == {"phd_megatron.kernels, Triton"}
    without = rows(replace(HOPPER, triton_problem="triton is not installed"))
    assert all("triton is not installed" in without[name][1] for name in names)
    assert without["cross entropy"][0] == "Megatron's vocabulary-parallel"
    sdpa = rows(replace(HOPPER, triton_problem=None), phd_attention_backend="sdpa")
    assert sdpa["q/k/v norm and RoPE"][0] == "phd_megatron.kernels, torch operations"


def test_the_table_refuses_an_attention_that_cannot_run() -> None:
    run = make()
    assert table(run, Capabilities()).startswith("implementations on cpu:\n  PHD attention ")
    run.model.phd_attention_backend = "triton"
    with pytest.raises(UserError, match="phd_attention_backend"):
        table(run, Capabilities())


# ---------------------------------------------------------------- layers

PRE, PLAIN, TE_NORM, NONE = "norm and linear", "linear", "norm", "none"
SCHEMES = {
    # (qkv, its norm, fc1, its norm, the normed residual's norm) of the first layer and of the second
    "pre": [(PRE, NONE, PRE, NONE, NONE)] * 2,
    "post": [(PLAIN, NONE, PLAIN, NONE, NONE)] * 2,
    "hybrid_star": [(PRE, NONE, PRE, NONE, NONE), (PLAIN, NONE, PLAIN, NONE, TE_NORM)],
    "sandwich": [(PRE, NONE, PRE, NONE, NONE)] * 2,
}


def spec_of(layer: int, **values: Any) -> tuple[str, ...]:
    """What sits in a layer's slots, by name."""
    install_backend("cpu")
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.transformer.identity_op import IdentityOp

    from phd_megatron.model.layer_specs import layer_spec
    from phd_megatron.model.transformer_config import build_transformer_config

    run = make(**values)
    config = build_transformer_config(run)
    config.transformer_engine, config.fused_norms = True, fused_norms(run.model, True)
    slots = layer_spec(config, layer).submodules
    names = {
        id(te.TELayerNormColumnParallelLinear): PRE,
        **{id(te.TEColumnParallelLinear): PLAIN, id(te.TENorm): TE_NORM, id(IdentityOp): NONE},
    }
    first = getattr(slots.mlp.submodules, "linear_fc1", te.TEColumnParallelLinear)
    found = (slots.self_attention.submodules.linear_qkv, slots.input_layernorm, first, slots.pre_mlp_layernorm)
    return tuple(names[id(module)] for module in (*found, slots.pre_cross_attn_layernorm))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_norms_inside_linear_layers(scheme: str) -> None:
    """A norm goes into the linear layer that alone reads it, and stays outside where it is the residual too."""
    found = [spec_of(layer, norm_scheme=scheme) for layer in (1, 2)]
    assert found == SCHEMES[scheme]


def test_norms_that_are_recomputed_stay_outside() -> None:
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    assert spec_of(1, **recompute) == (PLAIN, TE_NORM, PLAIN, TE_NORM, NONE)


def test_checkpoint_names_of_norms_inside() -> None:
    """A checkpoint of Transformer Engine's layers has the names of any other."""
    install_backend("cpu")
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

    from phd_megatron.model.layer_specs import _CHECKPOINT_NAMES

    names = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias", "mlp.linear_fc1.weight"]
    state = {name: ShardedTensor.from_rank_offsets(name, torch.zeros(2)) for name in names}
    apply_prefix_mapping(state, _CHECKPOINT_NAMES)
    assert [part.key for part in state.values()] == [
        *("input_layernorm.weight", "pre_mlp_layernorm.bias", "mlp.linear_fc1.weight"),
    ]


# ---------------------------------------------------------------- states of Transformer Engine in checkpoints


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/phd-megatron-was-here",)


class _EvilStorage:
    """Torch pickles the memory of a tensor as a file inside the pickle; this one holds a pickle of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        stream = io.BytesIO()
        torch.save(_Evil(), stream)
        return torch.storage._load_from_bytes, (stream.getvalue(),)


class _EvilAttribute:
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (torch.nn.Module, "__init__")


def _bytes(content: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def test_extra_states_hold_values_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install_backend("cpu")
    from phd_megatron.checkpoint.extra_state import check

    variables = {"num_gemms": 1, "fp8_checkpoint": True, "fp8_max_fwd": 448.0}
    scales = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(16, 3), "extra_fp8_variables": variables}
    check({"a._extra_state": _bytes(scales), "b._extra_state": torch.empty(0, dtype=torch.uint8)}, tmp_path)
    check({"a._extra_state": None, "weight": torch.ones(1)}, tmp_path)
    for evil in (_Evil(), _EvilStorage(), _EvilAttribute(), {"recipe": [_Evil()]}):
        with pytest.raises(UserError, match=r"holds a state of Transformer Engine that is not read: x\._extra_state"):
            check({"x._extra_state": _bytes(evil)}, tmp_path)
    with pytest.raises(UserError, match=r"before 2\.0"):
        check({"x._extra_state": io.BytesIO(b"")}, tmp_path)
    assert not os.path.exists("/tmp/phd-megatron-was-here")


def test_an_extra_state_of_a_newer_megatron_is_written_again_with_this_ones_functions(tmp_path: Path) -> None:
    """0.17 pickles tensors with a function of its own, which 0.16 lacks; Transformer Engine unpickles by itself."""
    install_backend("cpu")
    from phd_megatron.checkpoint.extra_state import _Unpickler, check

    scales = {"scale_fwd": torch.tensor([2.0, 0.5, 4.0]), "amax_history_fwd": torch.ones(16, 3)}
    loader = torch.storage._load_from_bytes
    written = pickle.dumps(scales, protocol=3)
    here = f"c{loader.__module__}\n{loader.__qualname__}\n".encode()
    assert here in written
    newer = written.replace(here, b"cmegatron.core.safe_globals\nsafe_load_from_bytes\n")
    state: dict[str, Any] = {"x._extra_state": torch.frombuffer(bytearray(newer), dtype=torch.uint8)}
    check(state, tmp_path)
    content = state["x._extra_state"].numpy().tobytes()
    said = {value for _, value, _ in pickletools.genops(content) if isinstance(value, str)}
    assert {loader.__module__, loader.__qualname__} <= said
    read = _Unpickler(io.BytesIO(content)).load()
    assert read.keys() == scales.keys() and all(torch.equal(read[name], scales[name]) for name in scales)


@pytest.mark.parametrize("name", ["DelayedScaling", "os.system"])
def test_an_extra_state_imports_no_module_but_those_of_its_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phd_megatron.checkpoint.extra_state import check

    (tmp_path / "a_module_of_somebody.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = pickle.GLOBAL + f"a_module_of_somebody\n{name}\n".encode() + pickle.STOP
    state = torch.frombuffer(bytearray(asked), dtype=torch.uint8)
    with pytest.raises(UserError, match=r"asks for a_module_of_somebody\.|is not read"):
        check({"x._extra_state": state}, tmp_path)
    assert not list(tmp_path.glob("*.ran")) and "a_module_of_somebody" not in sys.modules
