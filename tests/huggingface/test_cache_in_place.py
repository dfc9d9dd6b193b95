"""A step writes its own entries into the cache and copies nothing of it, and everything that could notice is right."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

POLICIES = {
    "vanilla": {"phd_repeat": 1},
    "PHD": {"phd_repeat": 3, "phd_window": 1},
    "SWA": {"phd_repeat": 2, "phd_window": 5},
    "CSWA": {"phd_repeat": 3, "phd_window": 4, "phd_chunk": 8},
    "SWA, slots that become more": {"phd_repeat": 2, "phd_window": 150},
}
PROMPT = 200  # longer than the room that a cache has at its end


class Largest(TorchDispatchMode):
    """The most numbers that an operation put into new memory, attention's and masks' aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and not function.is_view:
            given = {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
            if result.data_ptr() not in given and "attention" not in str(function):
                self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
@torch.no_grad()
def test_a_step_copies_nothing_of_the_cache(make_model, fields) -> None:
    model = make_model(**fields, max_position_embeddings=400)
    cache = model.make_cache()
    model(torch.randint(61, (1, PROMPT)), past_key_values=cache, logits_to_keep=1)
    grown, places = [], set()
    for _ in range(130):
        with Largest() as watched:
            model(torch.randint(61, (1, 1)), past_key_values=cache)
        cached = cache.layers[0].keys.numel()
        grown.append(watched.numbers >= cached)
        places.add(cache.layers[0].keys.untyped_storage().data_ptr())
        assert cache.nbytes() == 2 * 3 * 8 * (cached + cache.layers[0].hidden_keys.numel())
    assert [number for number, copied in enumerate(grown) if copied] == [64, 129]  # where the room is full
    assert len(places) <= 3


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
@torch.no_grad()
def test_memory_that_nobody_wrote_is_not_read(make_model, fields, monkeypatch) -> None:
    model = make_model(norm_scheme="hybrid_star", **fields)
    tokens = torch.randint(61, (2, 40))
    expected = model(tokens, use_cache=False).logits
    genuine = torch.Tensor.new_empty

    def of_nan(self, *args, **words):
        made = genuine(self, *args, **words)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", of_nan)
    cache, found = model.make_cache(), []
    for piece in tokens.split([1, 1, 9, 1, 11, 1, 1, 15], dim=1):
        found.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("trained", ["", "q_proj", "v_proj"])
def test_gradients_go_through_the_cache(make_model, fields, trained: str) -> None:
    """Of all parameters, and of some alone: queries may need one where keys do not."""
    model = make_model(norm_scheme="hybrid_star", **fields)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    tokens, gradients = torch.randint(61, (2, 14)), []
    for pieces in ([14], [6, 1, 1, 1, 4, 1]):
        model.zero_grad()
        cache = model.make_cache()
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in tokens.split(pieces, 1)], 1)
        logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
def test_inference_mode_and_back(make_model, fields) -> None:
    model = make_model(**fields)
    tokens, cache = torch.randint(61, (1, 20)), model.make_cache()
    with torch.inference_mode():
        model(tokens[:, :12], past_key_values=cache)
        model(tokens[:, 12:13], past_key_values=cache)
    with torch.no_grad():
        found = [model(tokens[:, place : place + 1], past_key_values=cache).logits for place in range(13, 20)]
    expected = model(tokens, use_cache=False).logits[:, 13:]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", POLICIES.values(), ids=POLICIES)
@torch.no_grad()
def test_rows_that_wait(make_model, fields) -> None:
    """A row whose new token is padding keeps all that its next token sees."""
    model = make_model(norm_scheme="hybrid_star", **fields)
    first, second = torch.randint(61, (2, 24))
    cache, taken = model.make_cache(), 9
    model(torch.stack([first[:9], second[:9]]), past_key_values=cache)
    mask, found = torch.ones(2, 9, dtype=torch.long), []
    for place in range(9, 24):
        goes = place % 3 == 0
        new = torch.tensor([[1], [int(goes)]])
        mask = torch.cat([mask, new], 1)
        tokens = torch.stack([first[place], second[taken]])[:, None]
        logits = model(tokens, attention_mask=mask, past_key_values=cache).logits
        found.append(logits[0])
        if goes:
            expected = model(second[None, : taken + 1], use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[1, 0], expected, rtol=1e-9, atol=1e-9)
            taken += 1
    expected = model(first[None], use_cache=False).logits[0, 9:]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_others_tensors_are_taken(make_model) -> None:
    """Whoever sets keys and values of a layer finds them used, not what lay there before."""
    model = make_model(**POLICIES["CSWA"])
    tokens = torch.randint(61, (3, 20))
    cache = model.make_cache()
    model(tokens[:, :18], past_key_values=cache)
    for layer in cache.layers:
        for name in ("keys", "values", "hidden_keys", "hidden_values"):
            setattr(layer, name, getattr(layer, name)[[2, 0]])
    for name in ("positions", "hidden_positions", "lengths"):
        setattr(cache, name, getattr(cache, name)[[2, 0]])
    found = [model(tokens[[2, 0], place : place + 1], past_key_values=cache).logits for place in (18, 19)]
    expected = model(tokens[[2, 0]], use_cache=False).logits[:, 18:]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_slots_become_more_with_the_sequence(make_model) -> None:
    """A window of 150 has 64 slots, then 128, then 150; rows of unequal length, from any first position."""
    model = make_model(norm_scheme="hybrid_star", phd_repeat=2, phd_window=150, max_position_embeddings=400)
    tokens = torch.randint(61, (2, 200))
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    first, cache, seen, found = (
        model(tokens, attention_mask=mask, use_cache=False).logits,
        model.make_cache(),
        set(),
        [],
    )
    start = 0
    for size in (40, *[1] * 30, 50, *[1] * 80):
        piece = slice(start, start := start + size)
        words = {"attention_mask": mask[:, :start], "past_key_values": cache}
        found.append(model(tokens[:, piece], **words).logits)
        seen.add(cache.hidden_entries())
    assert seen == {64, 128, 150}
    torch.testing.assert_close(torch.cat(found, 1)[mask == 1], first[mask == 1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_with_unequal_numbers_of_slots_are_joined(make_model) -> None:
    from phd_megatron.serving import row_cache

    model = make_model(norm_scheme="hybrid_star", phd_repeat=3, phd_window=150, max_position_embeddings=400)
    tokens, lengths = torch.randint(61, (2, 190)), (30, 170)
    caches = [model.make_cache() for _ in lengths]
    for cache, row, length in zip(caches, tokens, lengths, strict=True):
        model(row[None, :length], past_key_values=cache)
    assert [cache.hidden_entries() for cache in caches] == [128, 300]
    joined = row_cache.join(caches)
    found = []
    for place in range(20):
        new = torch.stack([row[length + place] for row, length in zip(tokens, lengths, strict=True)])[:, None]
        found.append(model(new, past_key_values=joined).logits)
    for row, length, logits in zip(tokens, lengths, torch.cat(found, 1), strict=True):
        expected = model(row[None, : length + 20], use_cache=False).logits[0, length:]
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_autocast_that_comes_and_goes(make_model) -> None:
    for first in (True, False):
        model = make_model(dtype=torch.float32, **POLICIES["CSWA"])
        tokens, cache, found = torch.randint(61, (2, 13)), model.make_cache(), []
        for number, piece in enumerate(tokens.split([6, 1, 1, 4, 1], 1)):
            with torch.autocast("cpu", torch.bfloat16, enabled=first == (number % 2 == 0)):
                found.append(model(piece, past_key_values=cache).logits.float())
        error = torch.cat(found, 1) - model(tokens, use_cache=False).logits
        assert error.norm() < 0.1 * torch.cat(found, 1).norm()
