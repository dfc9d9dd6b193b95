"""The model on one rank: K = 1 against Megatron-Core's layers, pruning, recomputation, causality, initialisation."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import pytest
import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.runtime.context import Runtime

VOCAB = 50


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def make_run(**model) -> RunConfig:
    values = {
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 16,
        "make_vocab_size_divisible_by": 16,
    }
    run = RunConfig(model=ModelConfig(**{**values, **model}))
    run.training.train_iters = 3
    resolve(run)
    return run


def build(run: RunConfig):
    from phd_megatron.model.build import build_model

    return build_model(run, VOCAB, torch.device("cpu"))[0]


def batch(seed: int = 0, length: int = 16):
    tokens = torch.randint(0, VOCAB, (2, length + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).expand(2, -1)
    return {"input_ids": tokens[:, :-1], "position_ids": positions, "attention_mask": None, "labels": tokens[:, 1:]}


def losses_and_gradients(model, steps: int = 3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step)).mean()
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        history.append((loss.detach(), gradients))
        optimizer.step()
    return history


def stock_model(run: RunConfig, core_attention=None, norm=None):
    """Megatron-Core's GPTModel with its own local layer spec, parts of it optionally replaced."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from phd_megatron.model.transformer_config import build_transformer_config

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec = copy.deepcopy(spec)
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    if norm is not None:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    config = replace(build_transformer_config(run), use_te_activation_func=False)
    for name, value in vars(run.model).items():
        if (
            name.startswith("yarn_") and run.model.position_embedding_type == "yarn"
        ):  # GPTModel reads them there, and Megatron-Core's class has no such fields
            setattr(config, name, value)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=64,
        max_sequence_length=16,
        share_embeddings_and_output_weights=True,
        position_embedding_type=run.model.position_embedding_type,
        rotary_base=run.model.rotary_base,
        rope_scaling=run.model.use_rope_scaling,
        rope_scaling_factor=run.model.rope_scaling_factor,
    )
    if norm is not None:
        model.decoder.final_layernorm = norm(model.config, 32, eps=model.config.layernorm_epsilon)
    return model


def copy_by_name(source, target):
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(values[name])


LONGER = {
    "plain": {},
    "llama3": {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 5e5},
    "yarn": {
        **{"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0, "yarn_mscale": 0.7},
        **{"yarn_original_max_position_embeddings": 32, "yarn_beta_fast": 4.0, "rotary_base": 100.0},
    },
}


@pytest.mark.parametrize("rope", LONGER.values(), ids=LONGER)
def test_k1_is_stock_megatron_bit_for_bit_with_our_attention_and_norm(runtime, rope):
    from phd_megatron.model.attention import PHDCoreAttention
    from phd_megatron.norm.modules import RMSNorm

    run = make_run(**rope)
    # The stock model has no mask over padding of the vocabulary, so leave none.
    from phd_megatron.model.build import build_model

    ours = build_model(run, 64, torch.device("cpu"))[0]
    stock = stock_model(run, PHDCoreAttention, RMSNorm)
    copy_by_name(ours, stock)
    assert dict(ours.named_parameters()).keys() == dict(stock.named_parameters()).keys()
    for (loss, gradients), (stock_loss, stock_gradients) in zip(
        losses_and_gradients(ours), losses_and_gradients(stock), strict=True
    ):
        assert torch.equal(loss, stock_loss)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, stock_gradients[name]), name


def test_the_core_attention_takes_megatrons_softmax_scale(runtime):
    """Layers hand it over as ``softmax_scale``; half of it on twice the query gives the same."""
    from types import SimpleNamespace

    from megatron.core import parallel_state

    from phd_megatron.model.attention import PHDCoreAttention
    from phd_megatron.model.transformer_config import build_transformer_config

    config = build_transformer_config(make_run(norm_scheme="hybrid", phd_repeat=2, phd_window=3, phd_chunk=5))
    groups = SimpleNamespace(tp=parallel_state.get_tensor_model_parallel_group())
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2 * 16, 2, heads, 8, generator=generator) for heads in (4, 2, 2))
    default = PHDCoreAttention(config, 1, pg_collection=groups)(query, key, value)
    scaled = PHDCoreAttention(config, 1, softmax_scale=0.5 * 8**-0.5, pg_collection=groups)
    assert torch.allclose(scaled(2 * query, key, value), default, atol=1e-6)
    assert not torch.allclose(scaled(query, key, value), default, atol=1e-2)


def test_k1_matches_stock_megatron_with_its_own_attention_and_norm(runtime):
    from phd_megatron.model.build import build_model

    run = make_run()
    ours = build_model(run, 64, torch.device("cpu"))[0].double()
    stock = stock_model(run).double()
    copy_by_name(ours, stock)
    (loss, gradients), *_ = losses_and_gradients(ours, 1)
    (stock_loss, stock_gradients), *_ = losses_and_gradients(stock, 1)
    assert torch.allclose(loss, stock_loss, rtol=1e-6, atol=0)
    scale = torch.cat([g.flatten() for g in stock_gradients.values()]).norm()
    for name, gradient in gradients.items():
        reference = stock_gradients[name]
        assert (gradient - reference).norm() <= 1e-6 * max(reference.norm(), 1e-6 * scale), name


@pytest.mark.parametrize("scheme", ["pre", "post", "hybrid_star", "post_pre", "sandwich", "olmo2", "pre_qkvc_post"])
@pytest.mark.parametrize("repeat", [2, 3])
def test_last_layer_pruning_changes_nothing(runtime, scheme, repeat):
    model = {"norm_scheme": scheme, "phd_repeat": repeat, "phd_window": 3, "phd_chunk": 8}
    pruned, whole = (build(make_run(**model, phd_last_layer_pruning=on)) for on in (True, False))
    (loss, gradients), *_ = losses_and_gradients(pruned, 1)
    (whole_loss, whole_gradients), *_ = losses_and_gradients(whole, 1)
    assert torch.allclose(loss, whole_loss, rtol=1e-6)
    for name, gradient in gradients.items():
        reference = whole_gradients[name]
        assert (gradient - reference).norm() <= 1e-5 * reference.norm().clamp(min=1e-4), name


@pytest.mark.parametrize("pruning", [True, False])
@pytest.mark.parametrize("scheme", ["pre", "hybrid_star"])
def test_kept_copies_are_models_of_fewer_copies(runtime, scheme, pruning):
    """Plain PHD: no copy sees a later one, so copy j of K is the last one of the same model with K = j."""
    from phd_megatron.model.build import build_model

    model = {"norm_scheme": scheme, "phd_window": 1}
    run = make_run(**model, phd_repeat=3, phd_last_layer_pruning=pruning)
    (kept,) = build_model(run, VOCAB, torch.device("cpu"), keep_copies=True)
    losses = kept(**batch())
    assert losses.shape == (3, 2, 16)
    for copies, found in enumerate(losses, 1):
        expected = build(make_run(**model, phd_repeat=copies))(**batch())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, losses[copies % 3], rtol=1e-3)


@pytest.mark.parametrize("scheme", ["pre_qk", "hybrid", "olmo2"])
def test_triton_backends_train_the_same_model(runtime, scheme):
    """Attention, and norm with RoPE, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    model = {"norm_scheme": scheme, "phd_repeat": 2, "phd_window": 3, "phd_chunk": 8, "num_layers": 2}
    backends = ("sdpa", "triton", "sdpa_triton")
    (expected, wanted), *others = (
        losses_and_gradients(build(make_run(**model, phd_attention_backend=name)), 1)[0] for name in backends
    )
    for loss, gradients in others:
        assert torch.allclose(loss, expected, rtol=1e-6)
        for name, gradient in gradients.items():
            assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm().clamp(min=1e-4), name


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
    ],
    ids=["full-uniform", "full-block", "core_attn", "layernorm-mlp"],
)
@pytest.mark.parametrize("scheme", ["pre", "post", "hybrid_star", "post_pre", "sandwich", "pre_qkvc_post"])
def test_recomputation_changes_nothing(runtime, recompute, scheme):
    base = {"norm_scheme": scheme, "phd_repeat": 2, "phd_window": 3, "phd_chunk": 8}
    (loss, gradients), *_ = losses_and_gradients(build(make_run(**base)), 1)
    (again, recomputed), *_ = losses_and_gradients(build(make_run(**base, transformer=recompute)), 1)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("scheme", ["pre", "hybrid_star"])
@pytest.mark.parametrize("window", [(1, None), (5, None), (4, 8)])
def test_a_token_changes_nothing_before_it(runtime, scheme, window):
    model = build(make_run(norm_scheme=scheme, phd_repeat=3, phd_window=window[0], phd_chunk=window[1]))
    inputs = batch()
    del inputs["labels"]
    with torch.no_grad():
        before = model(**inputs)
        changed = inputs["input_ids"].clone()
        changed[:, 9] = (changed[:, 9] + 1) % VOCAB
        after = model(**{**inputs, "input_ids": changed})
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_repetition_changes_the_model(runtime):
    """Hidden tokens differ from the originals as soon as the window leaves an earlier token out, and only then.

    While every visible token shows both its copies, each key counts twice and the softmax is unchanged; so with the
    same weights the first ``W`` tokens have the vanilla model's losses, and later ones have not.
    """
    vanilla, repeated = build(make_run()), build(make_run(phd_repeat=2, phd_window=3))
    copy_by_name(vanilla, repeated)
    with torch.no_grad():
        expected, got = vanilla(**batch()), repeated(**batch())
    assert torch.allclose(expected[:, :3], got[:, :3], rtol=1e-4)
    assert ((expected - got)[:, 3:].abs() > 1e-4).all()


@pytest.mark.parametrize("positions", ["token", "repeated", "fraction"])
@pytest.mark.parametrize("repeat", [2, 3])
def test_copies_are_told_apart_by_position_and_vector(runtime, positions, repeat):
    """The table turns every row by its position; the originals' rows are a vanilla model's, bit for bit."""
    run = make_run(phd_repeat=repeat, phd_window=3, phd_copy_positions=positions, phd_copy_embedding="vector")
    model, vanilla = build(run), build(make_run())
    names = {name for name, _ in model.named_parameters()}
    assert names - {name for name, _ in vanilla.named_parameters()} == {"copy_embedding.weight"}
    for name, parameter in vanilla.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), f"{name} starts elsewhere"
    assert model.copy_embedding.weight.shape == (repeat - 1, 32) and not model.copy_embedding.weight.any()
    model.copy_embedding.weight.data.normal_()
    n, j = torch.arange(16.0).repeat(repeat), torch.arange(1.0, repeat + 1).repeat_interleave(16)
    expected = {"token": n, "repeated": repeat * n + j - 1, "fraction": n + (j - 1) / repeat}[positions]
    cos, _ = model._rotary_table(16 * repeat, torch.device("cpu"))
    assert torch.allclose(cos[:, 0, 0, 0], expected.cos(), atol=1e-6)  # the first frequency is 1
    if positions == "repeated":
        return
    rows, plain = [], []
    model.decoder.layers[1].register_forward_hook(lambda *args: rows.append(args[2][0]))
    vanilla.decoder.layers[1].register_forward_hook(lambda *args: plain.append(args[2][0]))
    with torch.no_grad():
        model(**batch()), vanilla(**batch())
    assert torch.equal(rows[0][:16], plain[0]) and not torch.equal(rows[0][16:32], plain[0])


def test_vectors_get_the_gradient_of_their_copy(runtime):
    """By hand: the gradient of every hidden row of the decoder's input, summed over tokens and sequences."""
    run = make_run(norm_scheme="hybrid_star", phd_repeat=3, phd_window=3, phd_copy_embedding="vector")
    model = build(run)
    seen = []

    def look(module, args, kwargs):
        kwargs["hidden_states"].retain_grad()
        seen.append(kwargs["hidden_states"])

    model.decoder.register_forward_pre_hook(look, with_kwargs=True)
    model(**batch()).mean().backward()
    by_hand = seen[0].grad.unflatten(0, (3, 16))[1:].sum((1, 2))
    torch.testing.assert_close(model.copy_embedding.weight.grad, by_hand)
    assert (by_hand.norm(dim=1) > 0).all()


def test_vocabulary_padding_has_no_probability(runtime):
    model = build(make_run(norm_scheme="pre"))
    inputs = batch()
    loss = model(**inputs)
    loss.mean().backward()
    del inputs["labels"]
    with torch.no_grad():
        logits = model(**inputs)
    assert logits.shape[-1] == 64 and torch.isneginf(logits[..., VOCAB:]).all()
    expected = torch.nn.functional.cross_entropy(logits[..., :VOCAB].flatten(0, 1), batch()["labels"].flatten())
    assert torch.allclose(loss.mean(), expected)
    assert model.embedding.word_embeddings.weight.grad[VOCAB:].eq(0).all()


def test_hidden_dropout_is_honoured(runtime):
    model = build(make_run(hidden_dropout=0.5))
    assert not torch.equal(model(**batch()), model(**batch()))
    model.eval()
    assert torch.equal(model(**batch()), model(**batch()))


def test_initial_weights_of_a_seed_stay():
    """In every version of this package and of torch."""
    from phd_megatron.model.initialisation import draw

    first = draw("decoder.layers.0.mlp.linear_fc1.weight", (5,), 1.0, 1234)
    expected = torch.tensor([-0.953721, -0.233501, -1.341184, 0.854762, -0.667473])
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-6)
    values = draw("x", (100, 100), 1.0, 0)  # some were drawn again
    assert float(values.abs().max()) <= 3.0 and abs(float(values.double().sum()) + 55.5578) < 1e-3


def test_initialisation_depends_on_seed_and_name_alone(runtime):
    run = make_run(norm_scheme="hybrid_star", phd_repeat=2)
    first, again = build(run), build(make_run(norm_scheme="hybrid_star"))
    other = build(replace(run, training=replace(run.training, seed=1)))

    def digest(model):
        values = b"".join(p.detach().numpy().tobytes() for _, p in sorted(model.named_parameters()))
        return hashlib.sha256(values).hexdigest()

    assert digest(first) == digest(again) != digest(other)
    std = run.model.init_method_std
    assert std == pytest.approx((1 / (2.5 * 32)) ** 0.5)
    weight = first.decoder.layers[1].self_attention.linear_qkv.weight
    assert float(weight.std()) == pytest.approx(std, rel=0.1) and float(weight.abs().max()) <= 3 * std
    projection = first.decoder.layers[1].mlp.linear_fc2.weight
    assert float(projection.std()) == pytest.approx(std / 6**0.5, rel=0.1)


def test_a_head_of_its_own_may_have_another_std(runtime):
    untied = {"untie_embeddings_and_output_weights": True, "norm_scheme": "hybrid_star"}
    plain = dict(build(make_run(**untied)).named_parameters())
    other = dict(build(make_run(**untied, head_init_method_std=0.5)).named_parameters())
    assert [name for name in plain if not torch.equal(plain[name], other[name])] == ["output_layer.weight"]
    head = other["output_layer.weight"]
    assert float(head.std()) == pytest.approx(0.5, rel=0.05) and float(head.abs().max()) <= 3 * 0.5
    torch.testing.assert_close(head / 0.5, plain["output_layer.weight"] / (1 / (2.5 * 32)) ** 0.5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_a_marked_parameter_is_never_decayed(runtime, norms, bf16):
    from phd_megatron.training.optimizer import build_optimizer, let_go, wrap_data_parallel

    run = make_run(norm_scheme="hybrid_star")
    run.optimizer.decay_norms, run.training.bf16 = norms, bf16
    model = build(run)
    marked = [model.decoder.layers[1].mlp.linear_fc1.weight, model.decoder.final_layernorm.weight]
    for parameter in marked:
        parameter.never_decayed = True
    wrapped = wrap_data_parallel([model], run)
    (optimizer,) = build_optimizer(wrapped, run).chained_optimizers
    for name, parameter in model.named_parameters():
        group, _ = optimizer.model_param_group_index_map[parameter]
        decayed = not any(parameter is other for other in marked) and (parameter.dim() > 1 or norms)
        assert optimizer.optimizer.param_groups[group]["wd_mult"] == float(decayed), name
    let_go(wrapped)


@pytest.mark.parametrize("scheme", ["normal", "depth_scaled", "megatron"])
def test_output_projection_std(scheme):
    from phd_megatron.model.initialisation import output_projection_std

    expected = {"normal": 0.02, "depth_scaled": 0.02 / (2 * 3) ** 0.5, "megatron": 0.02 / (2 * 8) ** 0.5}[scheme]
    assert output_projection_std(0.02, scheme, layer_number=3, num_layers=8) == pytest.approx(expected)


def test_norms_follow_the_plan(runtime):
    names = {
        scheme: {name for name, _ in build(make_run(norm_scheme=scheme)).named_parameters() if "norm" in name}
        for scheme in ("pre", "pre_qk", "post", "hybrid", "hybrid_star")
    }
    layer = "decoder.layers.{}.{}.weight".format
    assert layer(0, "input_layernorm") in names["pre"] and layer(1, "pre_mlp_layernorm") in names["pre"]
    assert not any("self_attention" in name for name in names["pre"])
    assert layer(1, "self_attention.q_layernorm") in names["pre_qk"]
    assert layer(1, "self_attention.v_layernorm") not in names["pre_qk"]
    assert layer(2, "self_attn_bda.output_norm") in names["post"] and layer(2, "mlp_bda.output_norm") in names["post"]
    assert not any("input_layernorm" in name for name in names["post"] | names["hybrid"])
    assert (
        layer(0, "input_layernorm") in names["hybrid_star"] and layer(1, "input_layernorm") not in names["hybrid_star"]
    )
    assert layer(1, "self_attention.v_layernorm") in names["hybrid"]


@pytest.mark.parametrize("output_norm", [None, "branch", "sum"])
def test_dropout_on_a_branch(runtime, output_norm):
    """Of the branch alone, never of the residual, in training alone, and after a norm of the branch."""
    from phd_megatron.model.residual import SublayerResidual
    from phd_megatron.model.transformer_config import build_transformer_config
    from phd_megatron.norm.schemes import SublayerNorm

    config = build_transformer_config(make_run())
    residual = SublayerResidual(config, SublayerNorm(output_norm=output_norm), drop_copies=False)
    branch, before = torch.full((64, 2, 32), 3.0), torch.full((64, 2, 32), 10.0)
    join = residual(True, False)
    value = 1.0 if output_norm == "branch" else 3.0
    if output_norm == "sum":
        norm = residual.output_norm
        kept, dropped = join((branch, None), before, 0.0), join((branch, None), before, 0.75)
        torch.testing.assert_close(kept, norm(before + 3.0))
        assert dropped.std() > 0.1 > kept.std()
        torch.testing.assert_close(residual(False, False)((branch, None), before, 0.75), kept)
        return
    torch.testing.assert_close(join((branch, None), before, 0.0), before + value)
    found = join((branch, torch.zeros(32)), before, 0.75) - before
    assert set(found.unique().round(decimals=3).tolist()) == {0.0, 4 * value}
    assert 0.15 < (found > 0).float().mean() < 0.35
    torch.testing.assert_close(residual(False, False)((branch, None), before, 0.75), before + value)
