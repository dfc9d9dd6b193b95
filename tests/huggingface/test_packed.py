"""Several documents in a row of an exported model: each is what it is in a row of its own."""

from __future__ import annotations

import pytest
import torch

LENGTHS = [5, 1, 9, 4]
NEW = sum(LENGTHS)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
POLICIES = [(1, 1, None), (2, 1, None), (2, 4, 8), (3, 5, None), (3, 16, 3)]


def fields(policy, **others):
    return dict(zip(("phd_repeat", "phd_window", "phd_chunk"), policy, strict=True)) | others


def alone(model, tokens):
    """Logits of each document in a row of its own."""
    return torch.cat([model(part).logits for part in tokens.split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("scheme", ["pre", "hybrid_star", "olmo2"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@torch.no_grad()
def test_documents_of_a_row(make_model, policy, scheme, attention):
    """To 1e-9 in float64, by position ids that begin again and by FlashAttention's borders."""
    model = make_model(norm_scheme=scheme, **fields(policy))
    model.set_attn_implementation(attention)
    tokens = torch.randint(61, (1, NEW), generator=torch.Generator().manual_seed(1))
    expected = alone(model, tokens)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed = model(tokens, position_ids=POSITIONS)
    assert packed.past_key_values is None
    for logits in (packed.logits, model(tokens, cu_seq_lens_q=borders, cu_seq_lens_k=borders).logits):
        assert (logits - expected).norm() <= 1e-9 * expected.norm()
    kept = model(tokens, position_ids=POSITIONS, logits_to_keep=3).logits
    assert (kept - packed.logits[:, -3:]).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("kind", ["repeated", "fraction"])
@torch.no_grad()
def test_copies_told_apart_count_from_the_documents_start(make_model, kind):
    fields_of = fields((3, 4, 8), phd_copy_positions=kind, phd_copy_embedding="vector")
    model = make_model(norm_scheme="hybrid_star", **fields_of)
    model.model.copy_embedding.weight.normal_()
    tokens = torch.randint(61, (1, NEW))
    expected = alone(model, tokens)
    assert (model(tokens, position_ids=POSITIONS).logits - expected).norm() <= 1e-9 * expected.norm()


def test_gradients_and_rows_of_other_documents(make_model):
    """A batch whose rows are packed differently: the gradient is the sum over all documents."""
    model = make_model(norm_scheme="hybrid_star", **fields((2, 4, 8)))
    model.train()
    tokens = torch.randint(61, (2, NEW))
    positions = torch.cat([POSITIONS, torch.arange(NEW)[None]])
    model(tokens, position_ids=positions).logits.square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    parts = [*tokens[:1].split(LENGTHS, 1), tokens[1:]]
    sum(model(part, use_cache=False).logits.square().sum() for part in parts).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, found[name], rtol=1e-9, atol=1e-9), name


@torch.no_grad()
def test_padding_and_what_is_refused(make_model):
    model = make_model(norm_scheme="pre", **fields((2, 4, 8)))
    tokens = torch.randint(61, (1, NEW))
    expected = model(tokens, position_ids=POSITIONS).logits
    padded, mask = torch.nn.functional.pad(tokens, (0, 3)), torch.nn.functional.pad(torch.ones(1, NEW), (0, 3))
    found = model(padded, position_ids=torch.nn.functional.pad(POSITIONS, (0, 3)), attention_mask=mask).logits
    assert (found[:, :NEW] - expected).norm() <= 1e-9 * expected.norm()
    # Padding on the left, as generate and evaluation programs count it, is one document.
    left, counted = torch.nn.functional.pad(tokens, (2, 0)), torch.tensor([[1, 1, *range(NEW)]])
    one = model(left, attention_mask=mask.new_tensor([[0, 0] + [1] * NEW]), position_ids=counted, use_cache=False)
    assert (one.logits[:, 2:] - model(tokens).logits).norm() <= 1e-9 * expected.norm()
    with pytest.raises(ValueError, match="padding lies before tokens of packed documents"):
        positions = torch.cat([torch.tensor([[1, 1]]), POSITIONS], 1)
        model(left, attention_mask=mask.new_tensor([[0, 0] + [1] * NEW]), position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="begin again at 0"):
        model(tokens, position_ids=torch.where(POSITIONS == 8, 9, POSITIONS))
    with pytest.raises(ValueError, match="cannot be continued"):
        model(tokens, position_ids=POSITIONS, past_key_values=model.make_cache())
    with pytest.raises(ValueError, match="borders of a row, from 0 to n"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 4]))
