"""A run may continue where another Adam is installed: the states keep their meaning."""

from __future__ import annotations

import copy
from typing import Any

import torch

from phd_megatron.checkpoint.adam_state import adapt
from phd_megatron.runtime.mcore_fixes import torch_adamw

TORCH_ONLY = ("amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay")


class FusedAdamLike(torch.optim.Optimizer):
    """Transformer Engine's and apex's defaults; their kernels take the step as an int."""

    def __init__(self, params: Any) -> None:
        defaults = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        super().__init__(params, defaults)


def trained(steps: int) -> Any:
    parameter = torch.nn.Parameter(torch.arange(6.0))
    optimizer = torch_adamw()([parameter], lr=0.1, weight_decay=0.01)
    for number in range(steps):
        step(optimizer, number)
    return optimizer


def step(optimizer: Any, number: int) -> torch.Tensor:
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.linspace(-1, 1, 6) * (number + 1)
    optimizer.step()
    return parameter.detach().clone()


def as_megatron_saves(optimizer: Any) -> dict[str, Any]:
    """Without sharding: one step for all parameters, beside their states."""
    saved = copy.deepcopy(optimizer.state_dict())
    steps = [state.pop("step") for state in saved["state"].values()]
    return {**saved, "state": {**saved["state"], "common_step": steps[0]}}


def restore(saved: dict[str, Any], optimizer: Any) -> None:
    """As megatron's optimizers load: the common step goes back to every parameter."""
    if (common := saved["state"].pop("common_step", None)) is not None:
        for state in saved["state"].values():
            state["step"] = copy.deepcopy(common)
    optimizer.load_state_dict(saved)


def test_torch_state_loads_into_fused_adam() -> None:
    saved = as_megatron_saves(trained(3))
    adapt({"chained": {0: {"optimizer": saved}}}, FusedAdamLike([torch.nn.Parameter(torch.zeros(6))]))
    assert "common_step" not in saved["state"] and set(saved["state"][0]) == {"exp_avg", "exp_avg_sq"}
    group = saved["param_groups"][0]
    assert (group["step"], type(group["step"]), group["bias_correction"]) == (3, int, True)
    assert group["lr"] == 0.1, "what was saved is kept"


def test_fused_adam_state_continues_in_torch() -> None:
    before = trained(3)
    saved = as_megatron_saves(before)
    del saved["state"]["common_step"]
    saved["param_groups"] = [
        {**{k: v for k, v in group.items() if k not in TORCH_ONLY}, "bias_correction": True, "step": 3}
        for group in saved["param_groups"]
    ]
    after = trained(0)
    after.param_groups[0]["params"][0].data.copy_(before.param_groups[0]["params"][0].data)
    adapt(saved, after)
    restore(saved, after)
    assert after.param_groups[0]["fused"] is True
    assert torch.equal(step(before, 3), step(after, 3))


def test_sharded_groups_get_the_step_alone() -> None:
    saved = {"optimizer": {"param_groups": [{"lr": 0.1}, {"lr": 0.1, "step": 5.0}]}, "param_state": {0: {"exp_avg": 1}}}
    adapt(saved, trained(0))
    assert [group["step"] for group in saved["optimizer"]["param_groups"]] == [5, 5]
    assert "state" not in saved["optimizer"] and saved["param_state"] == {0: {"exp_avg": 1}}


def test_a_rank_without_parameters_takes_the_chains_step() -> None:
    """A pipeline stage without experts writes the step 0 for them; megatron asks every optimizer for one."""
    empty = torch_adamw()([{"params": []}], lr=0.1)
    assert [float(state["step"]) for state in empty.state_dict()["state"].values()] == [0.0]
    empty.load_state_dict(empty.state_dict())
    assert len(empty.state) == 0
    saved = {0: {"optimizer": {"param_groups": [{"step": 3}]}}, 1: {"optimizer": {"param_groups": [{"step": 0}]}}}
    adapt(saved, trained(0))
    assert [part["optimizer"]["param_groups"][0]["step"] for part in saved.values()] == [3, 3]
