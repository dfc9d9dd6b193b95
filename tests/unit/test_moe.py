"""Layers with experts on one rank, against hand-written references; the router's losses against autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from phd_megatron.config.moe import DEFAULTS, MoE
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.planning.flops import forward_flops
from phd_megatron.runtime.context import Runtime
from phd_megatron.runtime.mcore_versions import installed

VOCAB, LENGTH, BATCH, LAYERS = 50, 16, 2, 3
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_token_dispatcher_type": "alltoall",
}


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def make_run(model: dict | None = None, **transformer) -> RunConfig:
    values = {
        **{"num_layers": LAYERS, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4},
        **{"num_query_groups": 2, "seq_length": LENGTH, "make_vocab_size_divisible_by": 16},
        **{"phd_repeat": 2, "phd_window": 4, "phd_chunk": 8, "norm_scheme": "hybrid_star"},
    }
    run = RunConfig(model=ModelConfig(**{**values, **(model or {})}, transformer={**EXPERTS, **transformer}))
    run.training.train_iters = 3
    resolve(run)
    return run


def build(run: RunConfig, dtype: torch.dtype = torch.float64):
    from phd_megatron.model.build import build_model

    model = build_model(run, VOCAB, torch.device("cpu"))[0]
    for router in routers(model):
        router._maintain_float32_expert_bias()
    return model.to(dtype)


def routers(model):
    from phd_megatron.model.moe import PHDRouter

    return [module for module in model.modules() if isinstance(module, PHDRouter)]


def batch(seed: int = 0):
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    return {"input_ids": tokens[:, :-1], "position_ids": positions, "attention_mask": None, "labels": tokens[:, 1:]}


def swiglu_ffn(x, fc1, fc2):
    gate, up = (x @ fc1.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ fc2.T


def expert_weights(experts):
    """[(fc1, fc2)] of single experts, however they are kept."""
    if hasattr(experts, "local_experts"):
        return [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in experts.local_experts]
    return list(zip(experts.linear_fc1.weight, experts.linear_fc2.weight, strict=True))


def experts_by_hand(mlp, x, topk, pre_softmax, score):
    """Every expert computes every row; unused ones get the weight 0."""
    logits = x @ mlp.router.weight.T
    if score == "sigmoid":
        scores = logits.sigmoid()
        chosen = (scores + mlp.router.expert_bias).topk(topk, dim=-1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True) if topk > 1 else weights
    elif pre_softmax:
        weights, chosen = logits.softmax(dim=-1).topk(topk, dim=-1)
    else:
        weights, chosen = logits.topk(topk, dim=-1)
        weights = weights.softmax(dim=-1)
    full = torch.zeros_like(logits).scatter(-1, chosen, weights)
    output = torch.zeros_like(x)
    for number, weights_of_expert in enumerate(expert_weights(mlp.experts)):
        output += full[..., number : number + 1] * swiglu_ffn(x, *weights_of_expert)
    shared = mlp.shared_experts
    if shared is not None:
        gate = (x @ shared.gate_weight.T).sigmoid() if shared.gate_weight is not None else 1
        output += gate * swiglu_ffn(x, shared.linear_fc1.weight, shared.linear_fc2.weight)
    return output


@pytest.mark.parametrize("backend", ["grouped_mm", "sequential"])
@pytest.mark.parametrize("scheme", ["pre", "hybrid", "hybrid_star", "sandwich"])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"moe_router_pre_softmax": True, "moe_router_topk": 1},
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_shared_expert_intermediate_size": 16,
            "moe_shared_expert_gate": True,
        },
        {"moe_token_dispatcher_type": "allgather", "moe_router_topk": 3},
    ],
    ids=["softmax", "pre-softmax", "sigmoid-bias-shared", "allgather"],
)
def test_layers_equal_a_hand_written_reference(runtime, scheme, routing, backend):
    """Hybrid layers: MoE(Norm(Y)) + Norm(Y); sandwich: Norm(MoE(Norm(Y))) + Y; the others: MoE(Norm(Y)) + Y.

    The last layer is pruned.
    """
    run = make_run({"norm_scheme": scheme, "moe_experts_backend": backend}, **routing)
    model = build(run)
    assert hasattr(model.decoder.layers[0].mlp.experts, "local_experts") == (backend == "sequential")
    for number, router in enumerate(routers(model)):
        if router.expert_bias is not None:
            router.expert_bias = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64).roll(number)
            router._maintain_float32_expert_bias = lambda: None
    seen: dict[int, list] = {}
    for index, layer in enumerate(model.decoder.layers):
        normed = scheme == "hybrid" or (scheme == "hybrid_star" and index > 0)
        norm = layer.pre_cross_attn_layernorm if normed else layer.pre_mlp_layernorm
        norm.register_forward_hook(lambda module, inputs, x, i=index: seen.update({i: [inputs[0], x]}))
        layer.register_forward_hook(lambda module, inputs, out, i=index: seen[i].append(out[0]))
    model(**batch())
    values = run.model.transformer
    for index, layer in enumerate(model.decoder.layers):
        y, x, out = seen[index]
        assert x.shape == (LENGTH * (1 if index == LAYERS - 1 else 2), BATCH, 32)
        moe = experts_by_hand(
            layer.mlp,
            x,
            values["moe_router_topk"],
            values.get("moe_router_pre_softmax", False),
            values.get("moe_router_score_function", "softmax"),
        )
        normed = scheme == "hybrid" or (scheme == "hybrid_star" and index > 0)
        if scheme == "sandwich":
            moe = layer.mlp_bda.output_norm(moe)
        torch.testing.assert_close(out, moe + (x if normed else y), rtol=1e-6, atol=1e-6)  # softmax in float32


COEFFICIENTS = {"aux_loss": 0.3, "seq_aux_loss": 0.5, "global_aux_loss": 0.2}


def losses_by_hand(logits, topk, kind):
    """Of ``[rows, b, experts]``: experts x sum of (share of rows) x (mean probability), as in Switch Transformer."""
    experts = logits.size(-1)
    probs = logits.softmax(dim=-1)
    chosen = torch.zeros_like(probs).scatter(-1, logits.topk(topk, dim=-1).indices, 1.0)
    if kind == "seq_aux_loss":  # per sample, then averaged over samples
        return (experts * (chosen.mean(dim=0) / topk * probs.mean(dim=0)).sum(dim=-1)).mean()
    return experts * (chosen.mean(dim=(0, 1)) / topk * probs.mean(dim=(0, 1))).sum()


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "megatron"])
def test_router_losses_weigh_as_configured(runtime, monkeypatch, repeat, stock):
    """Gradient of mean loss + sum over layers of coefficient x loss. Megatron-Core's own weights are others.

    From 0.19 on they are right as long as no token is repeated.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    from phd_megatron.model.moe import PHDRouter

    if stock:
        attach = TopKRouter.attach_and_log_load_balancing_loss
        monkeypatch.setattr(PHDRouter, "attach_and_log_load_balancing_loss", attach)
        monkeypatch.setattr(PHDRouter, "apply_z_loss", TopKRouter.apply_z_loss)
    model = {"phd_repeat": repeat}
    kinds, weights = list(COEFFICIENTS), list(COEFFICIENTS.values())
    ours = build(
        make_run(model, moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=weights, moe_z_loss_coeff=0.1)
    )
    plain = build(make_run(model, moe_router_load_balancing_type="none"))
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    ours(**batch()).sum().backward()  # as in training: gradients are divided by the tokens of the step at its end
    logits = []
    for router in routers(plain):
        gating = router.gating
        monkeypatch.setattr(router, "gating", lambda x, g=gating: logits.append(g(x)) or logits[-1])
    total = plain(**batch()).mean()
    for layer in logits:
        total = total + sum(weight * losses_by_hand(layer, 2, kind) for kind, weight in COEFFICIENTS.items())
        total = total + 0.1 * layer.logsumexp(dim=-1).square().mean()
    total.backward()
    assert len(logits) == LAYERS
    error = max(
        float((one.grad / (BATCH * LENGTH) - two.grad).norm() / two.grad.norm())
        for one, two in zip(ours.parameters(), plain.parameters(), strict=True)
    )
    others = stock and (repeat > 1 or installed() < (0, 19))
    assert error > 1e-3 if others else error < 1e-5, error


def test_statistics_start_afresh_and_skip_evaluation(runtime):
    model = build(make_run(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.1))
    router = routers(model)[0]
    model.eval()
    model(**batch())
    assert not any(map(torch.count_nonzero, router.take_statistics()[1:])) and not router.losses
    model.train()
    model(**batch())
    losses, load, entropy = router.take_statistics()
    assert entropy[1] == 2 * BATCH * LENGTH and 0 < entropy[0] / entropy[1] <= math.log(4)
    assert losses.keys() == {"seq_load_balancing_loss", "z_loss"} and int(load.sum()) == 2 * BATCH * LENGTH * 2
    assert not any(map(torch.count_nonzero, [*router.losses.values(), *router.take_statistics()[1:]]))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_routing_entropy_is_that_of_the_distribution_over_all_experts(score_function):
    from phd_megatron.model.moe import routing_entropy

    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = logits.exp() if score_function == "softmax" else 1 / (1 + (-logits).exp())
    shares = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(routing_entropy(logits, score_function), -(shares * shares.log()).sum(-1))
    certain = torch.tensor([[0.0, -2000.0]])  # an expert that is never taken adds nothing
    assert routing_entropy(certain.bfloat16(), score_function).tolist() == [0.0]


def test_counters_stay_exact_in_bf16(runtime):
    """bfloat16 cannot count beyond 256, and the expert bias follows the counts."""
    run = make_run(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    model = build(run, torch.bfloat16)
    for _ in range(40):
        model(**batch())
    router = routers(model)[0]
    assert router.local_tokens_per_expert.dtype == torch.float32
    assert int(router.local_tokens_per_expert.sum()) == 40 * 2 * BATCH * LENGTH * 2


def test_experts_are_drawn_by_their_number(runtime):
    run = make_run(moe_shared_expert_intermediate_size=16, moe_layer_freq=[0, 1, 1])
    four, eight = build(run), build(make_run(num_moe_experts=8, moe_layer_freq=[0, 1, 1]))
    assert not hasattr(four.decoder.layers[0].mlp, "experts")
    experts = expert_weights(four.decoder.layers[1].mlp.experts)
    assert not torch.equal(experts[0][0], experts[1][0])
    for number, others in enumerate(expert_weights(eight.decoder.layers[1].mlp.experts)[:4]):
        assert all(map(torch.equal, experts[number], others))  # their values do not depend on how many there are
    std = run.model.init_method_std
    fc2 = torch.stack([fc2 for _, fc2 in experts])
    assert float(fc2.std()) == pytest.approx(std / (2 * LAYERS) ** 0.5, rel=0.1)
    assert float(four.decoder.layers[1].mlp.router.weight.std()) == pytest.approx(std, rel=0.2)
    assert float(four.decoder.layers[1].mlp.shared_experts.linear_fc2.weight.std()) == pytest.approx(
        std / (2 * LAYERS) ** 0.5, rel=0.15
    )


def test_experts_alone_are_reduced_over_the_ranks_that_hold_them(runtime):
    """Megatron-Core reads the mark where it sorts gradients into buffers; on one rank it marks none by itself.

    Router and shared experts see every token of every rank, so their gradients go over all of them.
    """
    run = make_run(moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True, moe_layer_freq=[0, 1, 1])
    parameters = dict(build(run).named_parameters())
    marked = {name for name, parameter in parameters.items() if getattr(parameter, "allreduce", True) is False}
    experts = {f"decoder.layers.{n}.mlp.experts.linear_{part}.weight" for n in (1, 2) for part in ("fc1", "fc2")}
    assert marked == experts
    others = {"decoder.layers.1.mlp.router.weight", "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"}
    assert others | {"decoder.layers.0.mlp.linear_fc1.weight"} <= set(parameters) - marked


def test_defaults_are_megatrons(runtime):
    from phd_megatron.model.transformer_config import PHDTransformerConfig

    theirs = {field.name: field.default for field in dataclasses.fields(PHDTransformerConfig)}
    assert {name: theirs[name] for name in DEFAULTS} == DEFAULTS


def test_flops_count_the_active_experts():
    """Against a sum written out: K = 2 over 16 tokens, the pruned last layer over one copy."""
    shared = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}
    moe = make_run({"gated_linear_unit": True}, moe_layer_freq=[0, 1, 1], **shared).model
    expert_layer = 2 * 32 * (4 + 1) + 3 * 2 * 32 * (2 * 24 + 16)
    dense_layer = 3 * 2 * 32 * 48
    attention = 2 * 32 * 8 * (4 + 2 * 2), 2 * 32 * 32
    rows = (2 * 16, 2 * 16, 16)
    expected = sum(2 * 16 * attention[0] + count * attention[1] for count in rows)
    expected += rows[0] * dense_layer + (rows[1] + rows[2]) * expert_layer
    assert forward_flops(moe, 64).linear == expected
    assert MoE.from_model(ModelConfig()) is None


def run_on_fakes(run) -> None:
    """Experts' layers forward and backward, all of whose tensors have a shape and no values, so none can be read."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, fakes = build(run, torch.bfloat16), FakeTensorMode()
    for module in model.modules():
        for kept in (module._parameters, module._buffers, vars(module)):
            for name, value in kept.items():
                if isinstance(value, torch.Tensor):
                    kept[name] = fakes.from_tensor(value)
    with fakes:
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
        x = torch.zeros(2 * LENGTH, BATCH, 32, dtype=torch.bfloat16, requires_grad=True)
        for layer in model.decoder.layers:
            layer.mlp(x)[0].sum().backward()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_nothing_waits_for_the_host_on_one_rank(runtime, dispatcher):
    """Router, its losses and statistics, permutation, products and back, forward and backward."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    options = {
        "moe_token_dispatcher_type": dispatcher,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.1, 0.1],
        "moe_z_loss_coeff": 0.1,
        "moe_shared_expert_intermediate_size": 16,
    }
    run_on_fakes(make_run(**options))
    bias = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    run_on_fakes(make_run(moe_token_dispatcher_type=dispatcher, **bias))
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_on_fakes(make_run({"moe_experts_backend": "sequential"}, **options))
