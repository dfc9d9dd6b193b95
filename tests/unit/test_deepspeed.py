"""DeepSpeed's file: what is filled in, what is passed on, and what is refused with the value, the reason and a cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phd_megatron.config.deepspeed import (
    OFFLOAD_FIELDS,
    REFUSED,
    ZERO_FIELDS,
    batch_problems,
    deepspeed_problems,
    deepspeed_settings,
)
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.errors import UserError

MODEL = {"num_layers": 2, "hidden_size": 40, "num_attention_heads": 4, "vocab_size": 64}


def run_of(tmp_path: Path, content: Any, **options: Any) -> RunConfig:
    run = RunConfig(model=ModelConfig(**MODEL))
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    given = {"deepspeed": True, "deepspeed_config": str(path), "train_iters": 3, "micro_batch_size": 2, **options}
    for name, value in given.items():
        assign(run, name, value)
    return run


def zero(**fields: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **fields}}


def found(tmp_path: Path, content: Any, **options: Any) -> str:
    return "\n".join(deepspeed_problems(run_of(tmp_path, content, **options)))


def test_without_the_switch_nothing_is_read() -> None:
    run = RunConfig(model=ModelConfig(**MODEL))
    run.parallel.deepspeed_config = "/nowhere/ds.json"
    assert not list(deepspeed_problems(run)) and not list(batch_problems(run, 2))


FULL = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    "wall_clock_breakdown": True,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": "auto",
        "sub_group_size": 1e9,
        "overlap_comm": True,
    },
}


def test_a_usual_file_is_filled_in(tmp_path: Path) -> None:
    run = run_of(tmp_path, FULL)
    resolve(run)
    assert run.parallel.use_distributed_optimizer is False
    run.training.global_batch_size = 24
    assert not list(batch_problems(run, 4))
    settings = deepspeed_settings(run, 4)
    assert settings["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "reduce_bucket_size": 1600,
        "stage3_prefetch_bucket_size": 1440,
        "stage3_param_persistence_threshold": 400,
        "sub_group_size": 1e9,
        "overlap_comm": True,
    }
    assert settings["train_micro_batch_size_per_gpu"] == 2 and settings["train_batch_size"] == 8
    assert settings["gradient_clipping"] == 1.0 and settings["bf16"] == {"enabled": False}
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32" and settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize(("full", "kind"), [(True, "fp32"), (False, "bf16")])
def test_gradients_are_summed_in_the_type_that_the_run_says(tmp_path: Path, full: bool, kind: str) -> None:
    run = run_of(tmp_path, zero(), bf16=True, accumulate_allreduce_grads_in_fp32=full)
    settings = deepspeed_settings(run, 1)
    assert settings["bf16"] == {"enabled": True}
    assert settings["data_types"]["grad_accum_dtype"] == kind == settings["communication_data_type"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "no JSON object; correct deepspeed_config"),
        ("{", "cannot be read"),
        ({}, "zero_optimization is None; name a stage"),
        (zero(stage=0), "stage is 0; use 1, 2 or 3, or leave --deepspeed out"),
        (zero(stage=True), "stage is True; use 1, 2 or 3"),
        (zero(stage="3"), "stage is '3'; use 1, 2 or 3"),
        (zero(stage3_prefetch_bucket_sise=1), "did you mean stage3_prefetch_bucket_size?"),
        (zero(reduce_bucket_size=-1), "reduce_bucket_size is -1; use a number that is not negative"),
        (zero(reduce_bucket_size="big"), "write a number, true or false, or auto"),
        (zero(zero_quantized_weights=True), "it rounds what is sent"),
        (zero(offload_optimizer="cpu"), "write {'device': 'cpu'}"),
        (zero(offload_optimizer={"device": "nvme"}), "offloading to NVMe has not been run here; use cpu"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio is not passed on"),
        (zero(offload_param={"device": "cpu"}), "offload_param needs stage 3, which alone divides"),
        ({**zero(), "train_micro_batch_size_per_gpu": 4}, "is 4, and 2 follows from micro_batch_size; write auto"),
        ({**zero(), "gradient_clipping": 0.5}, "is 0.5, and 1.0 follows from clip_grad"),
        ({**zero(), "gradient_clipping": True}, "is True, and 1.0 follows from clip_grad"),
        ({**zero(), "bf16": {"enabled": True}}, "bf16.enabled is True, and False follows from bf16"),
        ({**zero(), "bf16": True}, "bf16 is True, no JSON object"),
        ({**zero(), "fp16": {"enabled": True}}, "fp16.enabled is True"),
        ({**zero(), "data_types": {"grad_accum_dtype": "bf16"}}, "fp32 follows from accumulate_allreduce"),
        ({**zero(), "optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion', and the optimizer is AdamW"),
        ({**zero(), "optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, "lr is 1.0, and 0.0003 follows from lr"),
        ({**zero(), "optimizer": {"type": "Adam", "params": {"amsgrad": True}}}, "amsgrad is not taken"),
        ({**zero(), "optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode is False"),
        ({**zero(), "wall_clock_breakdown": 1}, "neither true nor false"),
        ({**zero(), "zero_optimisation": {}}, "is no field that is passed on (did you mean zero_optimization?)"),
    ],
)
def test_a_file_that_says_otherwise_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    text = found(tmp_path, content)
    assert message in text and str(tmp_path / "ds.json") in text


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_program_does_itself_is_refused_by_name(tmp_path: Path, name: str) -> None:
    assert f"{name} is not taken: {REFUSED[name]}; take it out" in found(tmp_path, {**zero(), name: {"any": 1}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2: the pipeline schedules"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=2: there is no pipeline"),
        ({"num_moe_experts": 4, "expert_model_parallel_size": 2}, "expert_model_parallel_size=2: experts that lie"),
        (
            {"num_moe_experts": 4, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            "expert_tensor_parallel_size=1: experts lie on",
        ),
        ({"use_distributed_optimizer": True}, "use_distributed_optimizer=True: that is of Megatron-Core's gradient"),
        ({"overlap_grad_reduce": True}, "overlap_grad_reduce=True"),
        ({"overlap_param_gather": True}, "overlap_param_gather=True"),
        ({"ddp_bucket_size": 10}, "ddp_bucket_size=10"),
        ({"fp16": True}, "fp16=True: the loss scale"),
        ({"optimizer": "muon"}, "optimizer=muon: ZeRO cuts parameters"),
        ({"grad_norm_skip_threshold": 2.0}, "grad_norm_skip_threshold=2: DeepSpeed takes every step"),
        ({"fp8": "hybrid"}, "fp8=hybrid"),
        ({"gradient_accumulation_fusion": True}, "gradient_accumulation_fusion=True"),
        ({"tp_comm_overlap": True}, "tp_comm_overlap=True"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl=local: ZeRO moves weights"),
    ],
)
def test_what_the_engine_does_not_do_is_refused_by_name(tmp_path: Path, options: dict, message: str) -> None:
    text = found(tmp_path, zero(), **options)
    assert message in text and "leave --deepspeed out" in text


def test_a_batch_that_the_file_says_otherwise_is_refused_once_the_layout_is_known(tmp_path: Path) -> None:
    run = run_of(tmp_path, {**zero(), "train_batch_size": 8, "gradient_accumulation_steps": 1})
    run.training.global_batch_size = 8
    assert not list(batch_problems(run, 4))
    (steps,) = batch_problems(run, 2)
    assert "gradient_accumulation_steps is 1, and 2 follows from global_batch_size / (micro_batch_size x" in steps
    run.training.global_batch_size = 16
    assert len(list(batch_problems(run, 4))) == 2


def test_a_switch_without_a_file_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    run = run_of(tmp_path, zero())
    run.parallel.deepspeed_config = None
    assert "nothing says which ZeRO stage; give --deepspeed_config FILE" in "".join(deepspeed_problems(run))
    run.parallel.deepspeed_config = str(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        resolve(run)


def test_deepspeed_knows_every_field_that_is_passed_on() -> None:
    config = pytest.importorskip("deepspeed.runtime.zero.config", reason="deepspeed is not installed")
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")

    def names(model: Any) -> set[str]:
        return {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}

    assert names(config.DeepSpeedZeroConfig) >= ZERO_FIELDS
    assert names(offload.DeepSpeedZeroOffloadOptimizerConfig) >= OFFLOAD_FIELDS["offload_optimizer"]
    assert names(offload.DeepSpeedZeroOffloadParamConfig) >= OFFLOAD_FIELDS["offload_param"]


def test_a_program_that_is_not_installed_is_said_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phd_megatron.runtime import deepspeed

    run = run_of(tmp_path, zero())
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed is not installed: DS_BUILD_OPS=0 pip install .*\[deepspeed\]"):
        deepspeed.require_deepspeed(run)
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(deepspeed.importlib.metadata, "version", lambda name: "0.16.2")
    with pytest.raises(UserError, match=r"needs deepspeed 0.19.0 or later, and 0.16.2 is installed"):
        deepspeed.require_deepspeed(run)


@pytest.mark.parametrize(
    ("fields", "weights", "gradients", "states"),
    [
        ({"stage": 1}, 1, 1, 0.25),
        ({"stage": 2}, 1, 0.25, 0.25),
        ({"stage": 3}, 0.25, 0.25, 0.25),
        ({"stage": 1, "offload_optimizer": {"device": "cpu"}}, 1, 1, 0),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 1, 0, 0),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 0, 0, 0),
    ],
)
def test_memory_that_each_stage_leaves_on_the_device(
    tmp_path: Path, fields: dict[str, Any], weights: float, gradients: float, states: float
) -> None:
    """Of four ranks, two of which share a sequence; float32, so 4 bytes a parameter, 4 and 12."""
    from phd_megatron.planning.memory import estimate_memory
    from phd_megatron.planning.parameters import count_parameters
    from phd_megatron.runtime.parallel_dims import ParallelDims

    run = run_of(tmp_path, {"zero_optimization": fields}, context_parallel_size=2)
    resolve(run)
    parameters = count_parameters(run.model, 128)
    found = estimate_memory(run, parameters, 128, ParallelDims.from_config(run.parallel, 4))
    total = parameters.total
    expected = (4 * total * weights, 4 * total * gradients, 12 * total * states)
    assert (found.weights, found.gradients, found.optimizer) == pytest.approx(expected, abs=1)
    assert found.activations > 0
