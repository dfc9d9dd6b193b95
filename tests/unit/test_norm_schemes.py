"""Every norm scheme: the Megatron-Core model against the papers' formulas in float64, the plan, the initial values."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import ALIASES, HEAD_SETS, NORM_SCHEMES, SublayerNorm, norm_plan, norm_scheme
from phd_megatron.runtime.context import Runtime

from ..norm_formulas import logits_by_formula

VOCAB, LAYERS, HEADS, GROUPS, DIM, LENGTH = 50, 4, 4, 2, 8, 11
PHD = {"phd_repeat": 2, "phd_window": 3, "phd_chunk": 5}


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def make_run(**model) -> RunConfig:
    values = {"num_layers": LAYERS, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": HEADS}
    values |= {"num_query_groups": GROUPS, "kv_channels": DIM, "seq_length": 16, "make_vocab_size_divisible_by": 16}
    run = RunConfig(model=ModelConfig(**{**values, **model}))
    run.training.train_iters = 3
    resolve(run)
    return run


def build(run: RunConfig):
    from phd_megatron.model.build import build_model

    return build_model(run, VOCAB, torch.device("cpu"))[0]


def weights_of(model) -> dict[str, torch.Tensor]:
    """Its parameters, cut by hand and renamed as in the bundled Hugging Face model."""
    found = {"model.embed_tokens.weight": model.embedding.word_embeddings.weight[:VOCAB]}
    norms = {"model.norm": model.decoder.final_layernorm, "model.embed_norm": getattr(model, "embed_norm", None)}
    if model.copy_embedding is not None:
        found["model.copy_embedding.weight"] = model.copy_embedding.weight
    for i, layer in enumerate(model.decoder.layers):
        name, attention, mlp = f"model.layers.{i}", layer.self_attention, layer.mlp
        qkv = attention.linear_qkv.weight.unflatten(0, (GROUPS, HEADS // GROUPS + 2, DIM))
        for part, rows in (("q", qkv[:, :-2]), ("k", qkv[:, -2:-1]), ("v", qkv[:, -1:])):
            found[f"{name}.self_attn.{part}_proj.weight"] = rows.flatten(0, 2)
            norms[f"{name}.self_attn.{part}_norm"] = getattr(attention, f"{part}_layernorm")
        norms[f"{name}.self_attn.c_norm"] = attention.core_attention.c_layernorm
        found[f"{name}.self_attn.o_proj.weight"] = attention.linear_proj.weight
        gate, up = mlp.linear_fc1.weight.chunk(2)
        found |= {f"{name}.mlp.gate_proj.weight": gate, f"{name}.mlp.up_proj.weight": up}
        found[f"{name}.mlp.down_proj.weight"] = mlp.linear_fc2.weight
        norms[f"{name}.input_layernorm"] = getattr(layer, "residual_layernorm", layer.input_layernorm)
        second = (layer.pre_cross_attn_layernorm, layer.pre_mlp_layernorm)
        norms[f"{name}.post_attention_layernorm"] = next((n for n in second if hasattr(n, "weight")), None)
        norms[f"{name}.attention_output_layernorm"] = layer.self_attn_bda.output_norm
        norms[f"{name}.mlp_output_layernorm"] = layer.mlp_bda.output_norm
    for name, norm in norms.items():
        found |= {f"{name}.{kind}": value for kind, value in (norm.named_parameters() if norm is not None else ())}
    return found


CASES = [(scheme, policy, "RMSNorm") for scheme in NORM_SCHEMES for policy in ({}, PHD)]
CASES += [
    (scheme, {**PHD, "phd_repeat": repeat, "phd_copy_positions": positions, "phd_copy_embedding": embedding}, "RMSNorm")
    for scheme in ("pre", "hybrid_star", "embed_norm")
    for repeat, positions, embedding in (
        *((2, "repeated", "none"), (3, "repeated", "vector"), (2, "token", "vector"), (3, "fraction", "vector")),
    )
]
CASES += [(scheme, PHD, "LayerNorm") for scheme in ("olmo2", "sandwich", "embed_norm", "pre_qkvc_post", "deepnorm")]


@pytest.mark.parametrize(("scheme", "policy", "normalization"), CASES, ids=str)
def test_logits_and_gradients_are_the_formulas(runtime, scheme, policy, normalization):
    """Relative 1e-9 in float64. The last layer is pruned; a parameter without gradient fails."""
    run = make_run(norm_scheme=scheme, normalization=normalization, **policy)
    model = build(run).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).double()
            parameter.add_(noise * (0.3 if "norm" in name else 0.1))
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=generator)
    found = model(tokens, torch.arange(LENGTH)[None], None)[0, :, :VOCAB]
    config = SimpleNamespace(
        num_hidden_layers=LAYERS, head_dim=DIM, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        tie_word_embeddings=True, norm_scheme=scheme, normalization=normalization, mlp_gated=True,
        phd_repeat=run.model.phd_repeat, phd_window=run.model.phd_window or 1, phd_chunk=run.model.phd_chunk,
        phd_copy_positions=run.model.phd_copy_positions, phd_copy_embedding=run.model.phd_copy_embedding,
        rope_parameters={"rope_theta": 10000.0},
    )  # fmt: skip
    expected = logits_by_formula(weights_of(model), config, tokens[0])
    close(found, expected)
    direction = torch.randn(expected.shape, generator=generator).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients, references = (torch.autograd.grad((x * direction).sum(), parameters) for x in (found, expected))
    total = math.hypot(*(float(g.norm()) for g in references))
    for name, gradient, reference in zip(names, gradients, references, strict=True):
        assert reference.norm() > 0, name
        close(gradient, reference, floor=1e-6 * total)


def close(found, expected, floor=1e-30, tolerance=1e-9):
    error = (found - expected).norm() / max(float(expected.norm()), floor)
    assert error < tolerance, error


def test_the_table_has_every_name():
    """Those of the HybridNorm paper, OLMo 2 and OLMoE."""
    befores, afters = ("", "pre_"), ("pre", "post")
    products = {f"{before}{heads}_{after}" for before in befores for heads in HEAD_SETS for after in afters}
    others = "pre post pre_post post_pre hybrid hybrid_star pre_qk first_qkv_pre embed_norm mix_ln sandwich outputnorm"
    names = products | {*others.split(), "olmo2", "olmoe", "deepnorm", "hybrid_star_7b"}
    assert {*NORM_SCHEMES, *ALIASES} == names and len(products) == 24
    assert norm_scheme("qkv_post") is NORM_SCHEMES["hybrid"] and norm_scheme("pre_qk_pre") is NORM_SCHEMES["pre_qk"]
    assert make_run(norm_scheme="qkv_post").model.norm_scheme == "hybrid"


def test_the_plan_counts_layers():
    post = [block.mlp.output_norm == "sum" for block in norm_plan("mix_ln", 11)]
    assert post == [True] * 2 + [False] * 9  # floor(11 / 4)
    star = norm_plan("hybrid_star_7b", 8)
    assert [block.attention.input_norm for block in star] == [True] + [False] * 7
    assert {block.attention.output_norm_init for block in star} == {1 / math.sqrt(16)}
    assert norm_plan("deepnorm", 8)[0].mlp.residual_scale == pytest.approx(16**0.25)


def test_a_normed_residual_needs_a_norm():
    with pytest.raises(ValueError, match="input_norm"):
        SublayerNorm(input_norm=False, residual="normed")


def test_the_attention_output_norm_starts_small(runtime):
    model = build(make_run(norm_scheme="hybrid_star_7b"))
    weight = model.decoder.layers[2].self_attn_bda.output_norm.weight
    assert torch.equal(weight, torch.full_like(weight, 1 / math.sqrt(2 * LAYERS)))


EXPERTS = {"num_moe_experts": 2, "moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 64}


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("scheme", "init"), [("pre", "normal"), ("pre", "depth_scaled"), ("hybrid", "megatron"), ("deepnorm", "deepnorm")]
)
def test_statistics_of_initial_weights(runtime, scheme, init, experts):
    """Standard deviations within 5 %, means within 5 standard errors, nothing beyond three deviations."""
    run = make_run(norm_scheme=scheme, init=init, hidden_size=64, ffn_hidden_size=128, transformer=dict(experts))
    model = build(run)
    std = 1 / math.sqrt(2.5 * 64)
    assert run.model.init_method_std == pytest.approx(std)
    gain = (8 * LAYERS) ** -0.25 if scheme == "deepnorm" else 1
    truncated = 0.98658  # standard deviation of a normal cut at three
    for i, layer in enumerate(model.decoder.layers, 1):
        output = {"normal": 1, "depth_scaled": (2 * i) ** -0.5, "megatron": (2 * LAYERS) ** -0.5}.get(init, gain)
        qkv = layer.self_attention.linear_qkv.weight.unflatten(0, (GROUPS, HEADS // GROUPS + 2, DIM))
        checks = [(qkv[:, :-1], 1), (qkv[:, -1], gain), (layer.self_attention.linear_proj.weight, output)]
        for name, parameter in layer.mlp.named_parameters():
            scale = {"linear_fc1.weight": gain, "linear_fc2.weight": output, "router.weight": 1}
            checks.append((parameter, next(s for end, s in scale.items() if name.endswith(end))))
        assert len(checks) == (5 if not experts else 3 + 1 + 2 + 2)
        for weight, scale in checks:
            values = weight.detach().flatten() / (std * scale)
            # a standard error of a deviation is 1 / sqrt(2 n)
            assert float(values.std()) == pytest.approx(truncated, rel=max(0.05, 4 / math.sqrt(2 * values.numel())))
            assert abs(float(values.mean())) < 5 / math.sqrt(values.numel())
            assert float(values.abs().max()) <= 3 * (1 + 1e-6)


@pytest.mark.parametrize(("scheme", "init"), [("deepnorm", "normal"), ("hybrid", "deepnorm")])
def test_deepnorm_and_its_init_go_together(scheme, init):
    with pytest.raises(UserError, match=f"init={init} does not fit norm_scheme={scheme}"):
        make_run(norm_scheme=scheme, init=init)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms_without_a_number_have_megatrons(runtime, name):
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from phd_megatron.norm.modules import norm_class

    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False)
    megatrons = inspect.signature(WrappedTorchNorm.__new__).parameters["eps"].default
    assert norm_class(name)(config, 8).eps == megatrons == 1e-5
    assert norm_class(name)(config, 8, 1e-3).eps == 1e-3


@pytest.mark.parametrize("shares_tokens", [True, False])
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_megatron_is_told_whose_gradients_to_sum(runtime, name, shares_tokens):
    """Of norms whose ranks see their share of the tokens, by an attribute of each parameter."""
    from phd_megatron.norm.modules import norm_class

    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=shares_tokens)
    parameters = [*norm_class(name)(config, 8).parameters()]
    assert len(parameters) == (1 if name == "RMSNorm" else 2)
    assert all(parameter.sequence_parallel is shares_tokens for parameter in parameters)


@pytest.mark.parametrize(
    ("heads", "ranks", "rank", "size", "place"),
    [
        (4, 1, 0, 32, (0, 32)),
        (4, 2, 1, 16, (0, 16)),
        (2, 4, 0, 16, (0, 8)),
        (2, 4, 1, 16, (0, 8)),
        (2, 4, 3, 16, (8, 16)),
    ],
)
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_over_all_heads_is_sharded_as_they_are(runtime, kind, heads, ranks, rank, size, place):
    from phd_megatron.model.full_width_norm import FullWidthNorm

    config = SimpleNamespace(layernorm_epsilon=1e-5, normalization=kind, params_dtype=torch.float32)
    norm = FullWidthNorm(config, heads, 8, SimpleNamespace(size=lambda: ranks, rank=lambda: rank))
    is_whole = heads < ranks  # several ranks share a head
    assert norm.place == slice(*place) and len([*norm.parameters()]) == (1 if kind == "RMSNorm" else 2)
    for parameter in norm.parameters():
        assert parameter.shape == (size,)
        assert getattr(parameter, "sum_gradient_over_tensor_parallel", False) is is_whole
        assert getattr(parameter, "tensor_model_parallel", False) is not is_whole
        assert is_whole or parameter.partition_dim == 0
