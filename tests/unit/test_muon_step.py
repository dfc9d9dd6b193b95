"""What muon updates, and that an update is that of the formula (arXiv 2502.16982, with Megatron-Core's names)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .test_optimizer import build, make_run, runtime  # noqa: F401

PHD = {"norm_scheme": "hybrid_star", "phd_repeat": 3, "phd_window": 2, "phd_chunk": 4, "phd_copy_embedding": "vector"}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": [0, 1]}
MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight", "router.weight")
#: coefficients of five steps: Keller Jordan's first ones, and those that he took later
COEFFICIENTS = {
    "simple": [(3.4445, -4.7750, 2.0315)] * 5,
    "quintic": [
        *((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037)),
        *((2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)),
    ],
}
LR, DECAY, MOMENTUM, FACTOR = 0.02, 0.3, 0.9, 0.2
OPTIONS: dict[str, Any] = {
    **{"optimizer": "muon", "muon_momentum": MOMENTUM, "muon_extra_scale_factor": FACTOR, "clip_grad": 0.0},
    **{"muon_fp32_matmul_prec": "highest", "lr": LR, "lr_decay_style": "constant", "weight_decay": DECAY},
}


def names_of(built: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in built.models[0].module.named_parameters()}


def by_optimizer(built: Any) -> dict[str, set[str]]:
    names = names_of(built)
    found: dict[str, set[str]] = {"muon": set(), "adam": set()}
    for part in built.optimizer.chained_optimizers:
        kind = "adam" if "betas" in part.optimizer.defaults else "muon"
        found[kind] |= {names[id(each)] for group in part.optimizer.param_groups for each in group["params"]}
    return found


@pytest.mark.parametrize("more", [{}, MOE], ids=["dense", "experts"])
def test_muon_has_the_matrices_of_layers_and_adam_all_else(runtime: Any, more: dict[str, Any]) -> None:  # noqa: F811
    built = build(make_run(**PHD, **OPTIONS, **more, untie_embeddings_and_output_weights=True))
    found = by_optimizer(built)
    every = set(names_of(built).values())
    assert found["muon"] == {name for name in every if name.endswith(MATRICES)} and found["muon"]
    assert found["adam"] == every - found["muon"]
    assert {"copy_embedding.weight", "output_layer.weight"} <= {name.rpartition("module.")[2] for name in found["adam"]}


def test_a_decoupled_rate_is_that_of_embedding_and_head_alone(runtime: Any) -> None:  # noqa: F811
    built = build(make_run(**PHD, **OPTIONS, untie_embeddings_and_output_weights=True, decoupled_lr=1e-3))
    names = names_of(built)
    found = {
        names[id(each)].rpartition("module.")[2]: group["max_lr"]
        for part in built.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for each in group["params"]
    }
    rated = {name for name, rate in found.items() if rate == 1e-3}
    assert rated == {"embedding.word_embeddings.weight", "output_layer.weight"}


def orthogonal(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Newton-Schulz in float64."""
    wide = x.double() if x.size(0) <= x.size(1) else x.double().T
    wide = wide / wide.norm()
    for a, b, c in COEFFICIENTS[kind]:
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if x.size(0) <= x.size(1) else wide.T


def update(x: torch.Tensor, kind: str) -> torch.Tensor:
    return orthogonal(x, kind) * max(x.shape) ** 0.5 * FACTOR


def of_qkv(x: torch.Tensor, heads: int, groups: int, kind: str) -> torch.Tensor:
    """Query, key and value apart, of all groups together: rows are ``[group, (query heads, key, value), d]``."""
    width = x.size(0) // (heads + 2 * groups)
    rows = x.view(groups, heads // groups + 2, width, x.size(1))
    parts = [rows[:, : heads // groups], rows[:, -2:-1], rows[:, -1:]]
    done = [update(part.reshape(-1, x.size(1)), kind).view_as(part) for part in parts]
    return torch.cat(done, dim=1).reshape_as(x)


@pytest.mark.parametrize(
    ("nesterov", "split", "kind"), [(False, True, "quintic"), (True, True, "simple"), (False, False, "simple")]
)
def test_two_updates_are_those_of_the_formula(runtime: Any, nesterov: bool, split: bool, kind: str) -> None:  # noqa: F811
    options = {**OPTIONS, "muon_nesterov": nesterov, "muon_split_qkv": split, "muon_coefficient_type": kind}
    built = build(make_run(**options, num_attention_heads=4, num_query_groups=2))
    model = built.models[0].module
    before = {name: each.detach().double().clone() for name, each in model.named_parameters()}
    momenta = {name: torch.zeros_like(each) for name, each in before.items()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        gradients = {}
        for name, each in model.named_parameters():
            each.main_grad.copy_(torch.randn(each.shape, generator=generator))
            gradients[name] = each.main_grad.double().clone()
        assert built.optimizer.step()[0]
        for name in by_optimizer(built)["muon"]:
            momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradients[name]
            step = momenta[name]
            if nesterov:
                step = MOMENTUM * step + (1 - MOMENTUM) * gradients[name]
            done = of_qkv(step, 4, 2, kind) if split and "qkv" in name else update(step, kind)
            before[name] = (1 - LR * DECAY) * before[name] - LR * done
            found = dict(model.named_parameters())[name].detach().double()
            torch.testing.assert_close(found, before[name], rtol=1e-4, atol=1e-5)
