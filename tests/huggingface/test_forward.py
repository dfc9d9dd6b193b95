"""The exported model's code against the papers' formulas written out in plain torch."""

from __future__ import annotations

import pytest
import torch

from phd_megatron.norm.schemes import NORM_SCHEMES

from ..norm_formulas import logits_by_formula

POLICIES = [(1, 1, None), (2, 1, None), (2, 4, 8), (2, 3, 7), (2, 5, None)]
POLICIES += [(3, 1, None), (3, 4, 6), (3, 64, 32), (3, 6, None)]


#: how copies differ beside the mask
TOLD_APART = [("repeated", "none"), ("fraction", "none"), ("token", "vector"), ("repeated", "vector")]


def reference_logits(model, tokens):
    return logits_by_formula(dict(model.named_parameters()), model.config, tokens)


def close(found, expected, tolerance=1e-9):
    error = (found - expected).norm() / expected.norm()
    assert error < tolerance, error


def policy_fields(policy):
    return dict(zip(("phd_repeat", "phd_window", "phd_chunk"), policy, strict=True))


#: the schemes that differ in what they need of the code; the others are run with one policy
MECHANISMS = ("pre", "post", "hybrid_star", "post_pre", "sandwich", "olmo2")
CASES = [(scheme, policy) for scheme in MECHANISMS for policy in POLICIES]
CASES += [(scheme, (2, 4, 8)) for scheme in NORM_SCHEMES if scheme not in MECHANISMS]


@pytest.mark.parametrize(("scheme", "policy"), CASES, ids=str)
@torch.no_grad()
def test_forward_equals_the_formulas(make_model, scheme, policy):
    model = make_model(norm_scheme=scheme, num_hidden_layers=4, **policy_fields(policy))
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([reference_logits(model, row) for row in tokens])
    close(model(tokens).logits, expected)
    close(model(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize("policy", [(2, 1, None), (2, 4, 8), (3, 3, 7), (5, 6, None)], ids=str)
@pytest.mark.parametrize("scheme", ["pre", "hybrid_star", "embed_norm"])
@pytest.mark.parametrize(("positions", "embedding"), TOLD_APART)
@torch.no_grad()
def test_copies_told_apart_equal_the_formulas(make_model, positions, embedding, scheme, policy):
    fields = {"phd_copy_positions": positions, "phd_copy_embedding": embedding}
    model = make_model(norm_scheme=scheme, **policy_fields(policy), **fields)
    if embedding == "vector":
        assert not model.model.copy_embedding.weight.any()  # a new model's
        model.model.copy_embedding.weight.normal_()
    tokens = torch.randint(61, (2, 19))
    everything = model(tokens).logits
    close(everything, torch.stack([reference_logits(model, row) for row in tokens]))
    for keep in (1, 5):  # the cone
        close(model(tokens, logits_to_keep=keep).logits, everything[:, -keep:])
    assert (make_model(norm_scheme=scheme, **policy_fields(policy))(tokens).logits - everything).abs().max() > 1e-3


@torch.no_grad()
def test_one_copy_has_nothing_to_tell_apart(make_model):
    tokens = torch.randint(61, (2, 19))
    model = make_model(phd_copy_positions="repeated", phd_copy_embedding="vector")
    assert model.model.copy_embedding is None
    assert torch.equal(model(tokens).logits, make_model()(tokens).logits)


@pytest.mark.parametrize("fields", [{"phd_copy_positions": "nonsense"}, {"phd_copy_embedding": "table"}], ids=str)
def test_unknown_kinds_are_refused(make_model, fields):
    with pytest.raises(Exception, match=f"{next(iter(fields))}='{next(iter(fields.values()))}': choose"):
        make_model(phd_repeat=2, **fields)


@torch.no_grad()
def test_biases_layer_norm_gelu_partial_rotary_and_an_own_head(make_model):
    model = make_model(
        norm_scheme="hybrid_star", phd_repeat=2, phd_window=3, phd_chunk=5, normalization="LayerNorm", mlp_gated=False,
        hidden_act="gelu", attention_bias=True, attention_output_bias=True, mlp_bias=True, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    tokens = torch.randint(61, (1, 13))
    close(model(tokens).logits[0], reference_logits(model, tokens[0]))


@torch.no_grad()
def test_eager_attention_is_the_reference(make_model):
    fields = {"norm_scheme": "hybrid", "phd_repeat": 3, "phd_window": 4, "phd_chunk": 6}
    tokens = torch.randint(61, (2, 17))
    close(make_model(attn_implementation="eager", **fields)(tokens).logits, make_model(**fields)(tokens).logits)


@pytest.mark.parametrize("policy", [(1, 1, None), (2, 4, 8), (3, 3, 7), (2, 5, None), (3, 1, None)], ids=str)
@torch.no_grad()
def test_logits_to_keep_computes_the_cone_exactly(make_model, policy):
    model = make_model(norm_scheme="hybrid_star", **policy_fields(policy))
    tokens = torch.randint(61, (2, 33))
    everything = model(tokens).logits
    for keep in (1, 2, 9, 33):
        for use_cache in (False, True):
            close(model(tokens, logits_to_keep=keep, use_cache=use_cache).logits, everything[:, -keep:])
    close(model(tokens, logits_to_keep=torch.tensor([20, 32, -2])).logits, everything[:, [20, 32, 31]])
    per_row = torch.tensor([[20, 25], [18, 32]])
    close(model(tokens, logits_to_keep=per_row).logits, everything.gather(1, per_row[..., None].expand(-1, -1, 61)))
    chosen = torch.zeros(2, 33, dtype=torch.bool)
    chosen[0, 28:31] = chosen[1, 17] = True
    close(model(tokens, logits_to_keep=chosen).logits, everything[chosen])


@torch.no_grad()
def test_the_cone_is_narrow(make_model):
    """The point of the cone: with chunks, a long prompt costs hidden copies of the last chunk only."""
    model = make_model(norm_scheme="pre", phd_repeat=3, phd_window=4, phd_chunk=8)
    rows = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, arguments: rows.append(arguments[0].size(1)))
    model(torch.randint(61, (1, 61)), logits_to_keep=1)
    assert rows == [61 + 2 * 5, 61 + 2 * 5, 61 + 2 * 4]  # the chunk starts at 56; the last layer looks W - 1 = 3 back


@pytest.mark.parametrize("policy", [(1, 1, None), (2, 4, 8), (3, 5, None)], ids=str)
@torch.no_grad()
def test_padding_on_either_side(make_model, policy):
    model = make_model(norm_scheme="hybrid_star", **policy_fields(policy))
    lengths = [5, 20, 1, 13]
    rows = [torch.randint(61, (1, length)) for length in lengths]
    alone = [model(row).logits[0] for row in rows]
    for left in (True, False):
        for keep in (0, 3):
            tokens = torch.zeros(4, 20, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            spans = [slice(20 - n, 20) if left else slice(0, n) for n in lengths]
            for i, span in enumerate(spans):
                tokens[i, span], mask[i, span] = rows[i][0], 1
            logits = model(tokens, attention_mask=mask, logits_to_keep=keep).logits
            assert logits.isfinite().all()
            for i, span in enumerate(spans):
                wanted = [slot for slot in range(20)[span] if slot >= (20 - keep if keep else 0)]
                if wanted:
                    index = torch.tensor(wanted)
                    close(logits[i, index - (20 - logits.size(1))], alone[i][index - span.start])


def test_loss_hidden_states_and_gradient_checkpointing(make_model):
    model = make_model(norm_scheme="hybrid_star", phd_repeat=2, phd_window=4, phd_chunk=8)
    tokens = torch.randint(61, (2, 15))
    labels = tokens.clone()
    labels[0, :4] = -100
    out = model(tokens, labels=labels, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(out.loss.double(), expected)  # transformers takes the loss in float32
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 15, 24)] * 4
    assert torch.allclose(model.lm_head(out.hidden_states[-1]), out.logits)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    again = model(tokens, labels=labels)
    assert again.past_key_values is None
    again.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, grads[name]), name


@torch.no_grad()
def test_half_precision_and_refusals(make_model):
    model = make_model(dtype=torch.bfloat16, norm_scheme="hybrid", phd_repeat=2, phd_window=4)
    tokens = torch.randint(61, (2, 9))
    assert model(tokens).logits.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(tokens, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="count up by one"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 7, 8, 9, 10, 11]]))
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="no tokens"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match="norm_scheme='nonsense'"):
        make_model(norm_scheme="nonsense")
    with pytest.raises(ValueError, match="phd_window=0"):
        make_model(phd_window=0)
