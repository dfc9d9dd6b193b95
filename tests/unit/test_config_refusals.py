"""What is accepted as a name and not as a value: each refusal with value, reason and cure; warnings."""

from __future__ import annotations

import re
from typing import Any

import pytest

from phd_megatron.config.load import load_run_config
from phd_megatron.config.resolve import resolve, warnings
from phd_megatron.config.resume import check_resume
from phd_megatron.config.schema import OptimizerConfig, RunConfig
from phd_megatron.config.serialize import to_dict
from phd_megatron.config.unsupported import UNSUPPORTED, refusals
from phd_megatron.errors import UserError
from phd_megatron.parity.runs import ADAM_EPS, fixed_steps
from phd_megatron.runtime import requirements
from phd_megatron.runtime.capabilities import Capabilities
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.training.start import _check_machine

from .configurations import make, refusal, resolved

REFUSED_VALUES: dict[str, Any] = {
    **{
        "expert_tensor_parallel_size": 2,
        "attention_dropout": 0.1,
        "softmax_type": "learnable",
        "fp8_*": 1,
        "fp8_recipe": "custom",
    },
    **{"attention_softmax_in_fp32": False, "calculate_per_token_loss": False, "cuda_graph_impl": "local"},
    **{"cross_entropy_fusion_impl": "te", "perform_initialization": False},
    **{
        "moe_experts_backend": "te",
        "moe_flex_dispatcher_backend": "ncclep",
        "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
    },
    **{
        "use_cpu_initialization": False,
        "mlp_chunks_for_prefill": 2,
        "mlp_chunks_for_training": 2,
        "activation_offload_fraction": 0.5,
        "barrier_with_L1_time": False,
        "offload_modules": ["core_attn"],
    },
}
RECOMPUTED = {"mla_up_proj": ["mla_up_proj"], "moe,": ["moe"], "moe_act": ["moe_act"], "there": ["shared_experts"]}


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: row.field)
def test_each_refusal_tells_value_reason_and_cure(row: Any) -> None:
    name = row.field.replace("*", "x")
    value = REFUSED_VALUES.get(row.field, 2 if row.field.endswith("*") else True)
    if row.field == "recompute_modules":
        value = RECOMPUTED.get(row.reason.split()[0], value)
    if row.reason.startswith("quantile"):
        value = "quantile_balancing" if row.field.endswith("type") else 0.5
    if "without the flex dispatcher" in row.reason:
        value = "hybridep" if row.field.endswith("backend") else 16
    config = make(**{name: value})
    if "sequential" in row.reason + row.cure:
        config.model.moe_experts_backend = "sequential"
    if value is not True and row.field == "recompute_modules":
        config.model.transformer["recompute_granularity"] = "selective"
    needs_experts = row.field.startswith("moe_") and row.field != "moe_*"
    if needs_experts or row.reason.startswith(("moe_act is", "there are no")):
        config.model.transformer["num_moe_experts"] = 4
    if "Transformer Engine's" in row.reason:  # the machine that a run is planned for may have them
        assert refusals(config) == []
        config.model.transformer_impl = "local"
    message = "\n".join(refusals(config))
    assert f"{name}={value!r}: {row.reason}; {row.cure}" in message
    with pytest.raises(UserError):
        resolve(config)


EXPERTS = {"num_moe_experts": 8}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_moe_experts": 0}, "num_moe_experts=0 is out of range; use a value at least 1"),
        ({**EXPERTS, "moe_router_topk": 9}, "moe_router_topk=9 of num_moe_experts=8: use a value from 1 to 8"),
        ({**EXPERTS, "moe_router_topk": 1}, "set moe_router_pre_softmax"),
        ({**EXPERTS, "moe_layer_freq": [1, 0, 1]}, "num_layers=2 layers"),
        ({**EXPERTS, "moe_layer_freq": [0, 0]}, "no layer with experts"),
        ({**EXPERTS, "moe_layer_freq": 0}, "moe_layer_freq=0 is out of range"),
        ({**EXPERTS, "moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size=0 is out of range"),
        ({**EXPERTS, "moe_shared_expert_gate": True}, "set moe_shared_expert_intermediate_size"),
        (
            {**EXPERTS, "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True},
            "set moe_token_dispatcher_type to alltoall",
        ),
        ({**EXPERTS, "moe_expert_capacity_factor": -1.0}, "moe_expert_capacity_factor=-1.0 leaves no room"),
        ({**EXPERTS, "moe_pad_expert_input_to_capacity": True}, "set moe_expert_capacity_factor"),
        ({**EXPERTS, "moe_router_enable_expert_bias": True}, "set moe_router_score_function to sigmoid"),
        ({**EXPERTS, "moe_router_num_groups": 4}, "set both or neither"),
        ({**EXPERTS, "moe_router_num_groups": 3, "moe_router_group_topk": 2}, "do not fit num_moe_experts=8"),
        (
            {**EXPERTS, "moe_router_num_groups": 8, "moe_router_group_topk": 1},
            "moe_router_topk=2 is more than the 1 experts",
        ),
        ({**EXPERTS, "moe_router_load_balancing_type": "aux"}, "moe_router_load_balancing_type='aux' is not known"),
        ({**EXPERTS, "moe_router_load_balancing_type": ["aux_loss"]}, "give one coefficient for each type"),
        (
            {**EXPERTS, "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1},
            "none has no loss to weigh",
        ),
        (
            {**EXPERTS, "moe_router_load_balancing_type": ["aux_loss"] * 2, "moe_aux_loss_coeff": [0.1, 0.1]},
            "names a type twice",
        ),
        ({**EXPERTS, "moe_aux_loss_coeff": -0.1}, "rewards imbalance"),
        ({**EXPERTS, "moe_z_loss_coeff": -0.1}, "rewards large logits"),
        ({**EXPERTS, "add_bias_linear": True}, "experts have no biases here"),
        ({**EXPERTS, "moe_router_bias_update_rate": 0.1}, "set moe_router_enable_expert_bias"),
        ({"moe_router_topk": 2}, "set num_moe_experts, or leave it out"),
    ],
)
def test_expert_values_out_of_range(values: dict[str, Any], words: str) -> None:
    assert words in refusal(**values)


def test_expert_values_in_range() -> None:
    model = resolved(**EXPERTS, ffn_hidden_size=96, moe_layer_freq=[0, 1]).model
    assert model.transformer["moe_ffn_hidden_size"] == 96
    resolved(
        **EXPERTS,
        **{"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_layer_freq": 2, "moe_z_loss_coeff": 1e-3},
        **{"moe_router_load_balancing_type": ["seq_aux_loss", "none"], "moe_aux_loss_coeff": [1e-2, 0.0]},
        **{"recompute_granularity": "selective", "recompute_modules": ["moe", "shared_experts"]},
        moe_shared_expert_intermediate_size=32,
    )
    resolved(
        **EXPERTS,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_token_dispatcher_type="alltoall",
    )


OVERLAP: dict[str, Any] = {
    **EXPERTS,
    **{"moe_token_dispatcher_type": "alltoall", "expert_model_parallel_size": 2, "bf16": True},
    "overlap_moe_expert_parallel_comm": True,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_model_parallel_size": 1}, "expert_model_parallel_size=1: nothing is sent; leave it out"),
        ({"moe_token_dispatcher_type": "allgather"}, "=allgather: Megatron-Core overlaps the others' transfers; use"),
        ({"bf16": False}, "float32 parameters: Megatron-Core has it for half precision alone; set bf16"),
        (
            {"moe_shared_expert_intermediate_size": 64, "moe_shared_expert_overlap": True},
            "moe_shared_expert_overlap=True: both would fill the same gap; leave one",
        ),
        (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            "recompute_granularity=full: layers are run in pieces.*use recompute_granularity selective",
        ),
        ({"log_layer_statistics": 5, "metrics_file": "x"}, "log_layer_statistics=5: layers are run in pieces"),
    ],
)
def test_what_does_not_go_with_overlapped_transfers(values: dict[str, Any], message: str) -> None:
    resolved(**OVERLAP)
    resolved(**{**OVERLAP, "fp16": True, "bf16": False})
    with pytest.raises(UserError, match=rf"overlap_moe_expert_parallel_comm=True with .*{message}"):
        resolved(**{**OVERLAP, **values})


def test_harmless_values_pass() -> None:
    assert refusals(RunConfig()) == []
    harmless = {
        **{"context_parallel_size": 1, "virtual_pipeline_model_parallel_size": 1, "num_moe_experts": None},
        **{"qk_layernorm": False, "window_size": None, "softmax_type": "vanilla", "attention_softmax_in_fp32": True},
        **{"cuda_graph_impl": "none", "tp_comm_overlap": False, "fp8": None, "fp8_param": False},
        **{"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    }
    assert refusals(make(**harmless)) == []


def test_fp8_is_planned_anywhere_but_not_with_local_layers() -> None:
    assert refusals(make(fp8="hybrid", fp8_recipe="tensorwise")) == []
    assert "transformer_impl=local" in refusals(make(fp8="hybrid", transformer_impl="local"))[0]


def test_warnings() -> None:
    assert warnings(make()) == []
    copies, layouts = warnings(make(phd_repeat=2, moe_expert_capacity_factor=1.0))
    assert "copies compete" in copies and "layouts" in layouts
    assert len(warnings(make(phd_repeat=1, moe_expert_capacity_factor=1.0))) == 1
    balanced = make(num_moe_experts=4, moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.1)
    assert "data-parallel" in warnings(balanced)[0]
    assert "phd_attention_backend" in warnings(make(attention_backend="flash"))[0]
    assert "no effect at context_parallel_size=1" in warnings(make(cp_comm_type="p2p"))[0]
    assert warnings(make(cp_comm_type="p2p", context_parallel_size=2)) == []


# ---------------------------------------------------------------- muon


def test_muon_keeps_whole_matrices_and_says_so() -> None:
    notes = resolve(config := make(optimizer="muon"))
    assert config.parallel.use_distributed_optimizer is False
    assert [note for note in notes if note.startswith("use_distributed_optimizer=False: muon works on whole matrices")]
    plain = make()
    assert not [note for note in resolve(plain) if "use_distributed_optimizer" in note]
    assert plain.parallel.use_distributed_optimizer is True
    assert resolved(use_distributed_optimizer=False).parallel.use_distributed_optimizer is False


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizer": "muon", "use_distributed_optimizer": True}, "into flat pieces; leave it out"),
        (
            {"optimizer": "muon", "overlap_grad_reduce": True, "overlap_param_gather": True},
            "^overlap_param_gather=True with optimizer=muon: .*use --no-overlap-param-gather over a preset",
        ),
        ({"optimizer": "muon", "fp16": True}, "fp16=True with optimizer=muon: .*use bf16"),
        (
            {"muon_momentum": 0.9},
            "muon_momentum=0.9 without the optimizer that has it; set optimizer to muon, or leave",
        ),
        ({"muon_tp_mode": "blockwise"}, "muon_tp_mode='blockwise' without the optimizer that has it"),
        ({"optimizer": "muon", "muon_num_ns_steps": 0}, "muon_num_ns_steps=0 is out of range"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_muon_refuses(values: dict[str, Any], said: str) -> None:
    assert re.search(said, refusal(**values))


@pytest.mark.parametrize(("before", "after"), [("adam", "muon"), ("muon", "adam")])
def test_states_of_another_optimizer_are_not_loaded(before: str, after: str) -> None:
    saved = resolved(optimizer=before)
    with pytest.raises(UserError, match=f"optimizer={after}: .*states of optimizer={before}; add --no-load-optim or"):
        check_resume(saved, resolved(optimizer=after, load="x"))
    for way in ("finetune", "no_load_optim"):
        notes = check_resume(saved, resolved(optimizer=after, load="x", **{way: True}))
        assert [note for note in notes if f"optimizer: '{before}' -> '{after}'" in note]


def test_muon_needs_a_version_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolved(optimizer="muon", vocab_size=64)
    monkeypatch.setattr(requirements, "installed", lambda: (0, 18, 2))
    with pytest.raises(UserError, match=r"needs megatron-core 0\.19 or later.* 0\.18\.2 is installed: pip install"):
        requirements.require_optimizer(run)
    dims = ParallelDims.from_config(run.parallel, 1)
    requirements.require(run, dims, Capabilities())  # its checkpoint is evaluated and exported all the same
    with pytest.raises(UserError, match="optimizer=muon needs"):
        _check_machine(run, 1, Capabilities())
    monkeypatch.setattr(requirements, "installed", lambda: (0, 19))
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs emerging-optimizers: pip install 'emerging-optimizers>=0\.3,<0\.4'"):
        requirements.require_optimizer(run)
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: object())
    requirements.require_optimizer(run)
    requirements.require_optimizer(resolved())


def test_steps_are_left_out_by_a_version_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolved(grad_norm_skip_threshold=2.5, vocab_size=64)
    monkeypatch.setattr(requirements, "installed", lambda: (0, 17, 1))
    said = r"grad_norm_skip_threshold=2\.5 needs megatron-core 0\.18 or later.* 0\.17\.1 is installed: .*or give null"
    with pytest.raises(UserError, match=said):
        requirements.require_optimizer(run)
    requirements.require_optimizer(resolved())
    monkeypatch.setattr(requirements, "installed", lambda: (0, 18))
    requirements.require_optimizer(run)


@pytest.mark.parametrize(("before", "held", "after"), [("adam", True, "muon"), ("muon", False, "adam")])
def test_another_optimizer_does_not_inherit_how_states_are_held(before: str, held: bool, after: str) -> None:
    saved = to_dict(resolved(optimizer=before, **({"muon_momentum": 0.5} if before == "muon" else {})))
    assert saved["parallel"]["use_distributed_optimizer"] is held
    argv = ["--load", "x", "--finetune", "--optimizer"]
    config = load_run_config([*argv, after], transformer_fields={}, saved=saved).config
    resolve(config)
    assert (config.optimizer.optimizer, config.parallel.use_distributed_optimizer) == (after, not held)
    assert config.optimizer.muon_momentum == 0.95
    same = load_run_config([*argv, before], transformer_fields={}, saved=saved).config
    assert same.parallel.use_distributed_optimizer is held


def test_parity_compares_the_optimizer_of_the_run() -> None:
    options = {"optimizer": "muon", "muon_momentum": 0.5, "decay_norms": True, "clip_grad": 0.5, "lr": 0.1}
    base = resolved(**options, adam_beta1=0.5, weight_decay=0.2, lr_warmup_iters=3, decoupled_lr=0.2)
    found = fixed_steps(base, []).optimizer
    expected = OptimizerConfig(**options, adam_beta1=0.5, weight_decay=0.2)  # type: ignore[arg-type]
    expected.lr_decay_style, expected.adam_eps, expected.muon_fp32_matmul_prec = "constant", ADAM_EPS, "highest"
    assert found == expected
    assert fixed_steps(resolved(adam_eps=1e-3), []).optimizer == OptimizerConfig(
        lr_decay_style="constant", adam_eps=1e-3
    )
