"""``torch.compile(fullgraph=True)`` and ``torch.export`` of an exported model with its default attention.

A graph may depend on no number in a tensor, and one that is exported holds any length. Float64: losses, logits and
gradients to 1e-10 of the model's own, whose sums may be taken in another order in an exported graph.
"""

from __future__ import annotations

import io
import sys

import pytest
import torch

from .test_everyday import EXPERTS

CSWA = {"phd_repeat": 3, "phd_window": 4, "phd_chunk": 8}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "vanilla": {"phd_repeat": 1},
    "PHD": {"phd_repeat": 2, "phd_window": 1},
    "SWA": {"phd_repeat": 2, "phd_window": 5},
    "CSWA, vectors and fractions": CSWA | {"phd_copy_embedding": "vector", "phd_copy_positions": "fraction"},
    "YaRN": {"phd_repeat": 2, "phd_window": 5, "rope_parameters": YARN},
    "experts": {"phd_repeat": 2, "phd_window": 4, "phd_chunk": 8, **EXPERTS},
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def graphs_are_forgotten():
    yield
    torch._dynamo.reset()


def padded(batch: int, length: int) -> torch.Tensor:
    """A mask: the first sequence is padded by three on the left, the last by one on the right."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :3], mask[-1, -1] = 0, 0
    return mask


def loss_and_gradients(model, call, tokens, **words):
    model.zero_grad()
    out = call(input_ids=tokens, labels=tokens, use_cache=False, **words)
    out.loss.backward()
    return out.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_compiled_training(make_model, fields) -> None:
    """The operator was tried outside of the graph, which has it."""
    model = make_model(norm_scheme="hybrid_star", **fields)
    causal = sys.modules[type(model).__module__.replace("modeling_phd", "causal")]
    causal._causal_kernel.cache_clear()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = loss_and_gradients(model, call, tokens := torch.randint(61, (2, 19)))
    assert causal._causal_kernel.cache_info().misses == 1
    expected = loss_and_gradients(model, model, tokens)
    torch.testing.assert_close(found, expected, **EXACT)
    assert len(found[1]) == sum(p.requires_grad for p in model.parameters())


def test_compiled_with_padding(make_model) -> None:
    model = make_model(norm_scheme="hybrid_star", **CSWA)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens, mask = torch.randint(61, (3, 19)), padded(3, 19)
    labels = tokens.masked_fill(mask == 0, -100)
    words = {"input_ids": tokens, "attention_mask": mask, "labels": labels, "use_cache": False}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for more in ({}, {"position_ids": positions}):
        torch.testing.assert_close(call(**words, **more).loss, model(**words, **more).loss, **EXACT)


def test_compiled_for_any_length(make_model) -> None:
    model = make_model(norm_scheme="pre", num_hidden_layers=1, **CSWA)
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (19, 7, 64):
        tokens = torch.randint(61, (2, length))
        found, expected = (loss_and_gradients(model, way, tokens) for way in (call, model))
        torch.testing.assert_close(found, expected, **EXACT)


@torch.no_grad()
def test_compiled_prompt(make_model) -> None:
    """The last logits of a prompt, for which a part of the hidden copies is computed, and a cache that goes on."""
    model = make_model(norm_scheme="hybrid_star", **CSWA)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.randint(61, (2, 21))
    mine, other = (way(tokens[:, :19], logits_to_keep=1) for way in (call, model))
    torch.testing.assert_close(mine.logits, other.logits, **EXACT)
    caches = [getattr(out, "cache", None) or out.past_key_values for out in (mine, other)]
    after, expected = (model(tokens[:, 19:], past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(after, expected, **EXACT)


def test_compiled_with_documents_side_by_side(make_model) -> None:
    """What the model refuses is refused by the graph too."""
    model = make_model(**CSWA)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with pytest.raises(RuntimeError, match="do not count up by one"):
        call(torch.randint(61, (1, 11)), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_exported_for_any_length(make_model, fields, keep: int) -> None:
    model = make_model(norm_scheme="hybrid_star", **fields)
    words = {"use_cache": False, "logits_to_keep": keep}
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, **dict.fromkeys(words)}
    program = torch.export.export(model, (torch.randint(61, (2, 19)),), words, dynamic_shapes=dynamic)
    written = io.BytesIO()
    torch.export.save(program, written)
    written.seek(0)
    graph = torch.export.load(written).module()
    for shape in ((2, 19), (3, 7), (1, 40), (2, 2)):
        tokens = torch.randint(61, shape)
        torch.testing.assert_close(graph(tokens, **words).logits, model(tokens, **words).logits, **EXACT)


def test_exported_with_padding(make_model) -> None:
    model = make_model(norm_scheme="hybrid_star", **CSWA)
    either = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    words = {"attention_mask": padded(2, 19), "use_cache": False}
    dynamic = {"input_ids": either, "attention_mask": either, "use_cache": None}
    program = torch.export.export(model, (torch.randint(61, (2, 19)),), words, dynamic_shapes=dynamic)
    for shape in ((2, 19), (3, 33)):
        tokens, mask = torch.randint(61, shape), padded(*shape)
        found, expected = (
            way(tokens, attention_mask=mask, use_cache=False).logits[mask == 1] for way in (program.module(), model)
        )
        torch.testing.assert_close(found, expected, **EXACT)


@torch.no_grad()
def test_an_expert_that_overflows_on_rows_of_others(make_model) -> None:
    """In a graph it computes them too."""
    model = make_model(dtype=torch.float16, **MODELS["experts"])
    experts = next(layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts"))
    rows = torch.randn(6, 24, dtype=torch.float16)
    weights, chosen = torch.full((6, 2), 0.5, dtype=torch.float16), torch.tensor([[0, 1]] * 6)
    for parameter in experts.experts[3].parameters():
        parameter.fill_(3e4)
    assert not experts.experts[3](rows).isfinite().all()
    expected = experts._chosen(rows, weights, chosen)
    torch.testing.assert_close(experts._all(rows, weights, chosen), expected, rtol=1e-2, atol=1e-2)
