"""Generation through the cache: exact across chunk borders, and as small as promised."""

from __future__ import annotations

import pytest
import torch

from phd_megatron.errors import UserError
from phd_megatron.huggingface import decoding
from phd_megatron.huggingface.decoding import decode_kernel

POLICIES = [(1, 1, None), (2, 1, None), (2, 4, 8), (2, 5, None), (3, 3, 7), (3, 4, 4), (3, 6, None)]
SMALL = [(1, 1, None), (2, 4, 8), (3, 5, None)]


def policy_fields(policy):
    return dict(zip(("phd_repeat", "phd_window", "phd_chunk"), policy, strict=True))


def bound(model):
    config = model.config
    return (config.phd_repeat - 1) * min(config.phd_window, config.phd_chunk or config.phd_window)


def recompute(model, tokens, steps):
    """Greedy tokens with the whole sequence recomputed at every step, no cache and no cone."""
    for _ in range(steps):
        logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def generate(model, tokens, steps, **options):
    return model.generate(tokens, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


CASES = [(scheme, policy) for scheme in ("pre", "post", "hybrid_star") for policy in POLICIES]
CASES += [(scheme, (2, 4, 8)) for scheme in ("post_pre", "sandwich", "olmo2", "embed_norm", "pre_qkvc_post")]
CASES = [(scheme, policy, "token") for scheme, policy in CASES]
CASES += [("hybrid_star", policy, kind) for kind in ("repeated", "fraction") for policy in ((2, 4, 8), (3, 6, None))]


def told_apart(model):
    """Copies have vectors that are not zero."""
    with torch.no_grad():
        model.model.copy_embedding.weight.normal_()
    return model


@pytest.mark.parametrize(("scheme", "policy", "positions"), CASES, ids=str)
@torch.no_grad()
def test_decoding_equals_recomputation_step_by_step(make_model, scheme, policy, positions):
    """Every step's logits, and the cache's size at every step, over several chunks."""
    vectors = {"phd_copy_embedding": "vector"} if positions != "token" else {}
    model = make_model(norm_scheme=scheme, **policy_fields(policy), phd_copy_positions=positions, **vectors)
    if vectors:
        told_apart(model)
    tokens = torch.randint(61, (2, 29))
    everything = model(tokens, use_cache=False).logits
    for prompt in (1, 7, 8):
        cache = model.make_cache()
        logits = [model(tokens[:, :prompt], past_key_values=cache, logits_to_keep=1).logits]
        for position in range(prompt, 29):
            assert cache.get_seq_length() == position
            assert cache.hidden_entries() <= bound(model)
            entries = position + cache.hidden_entries()
            assert cache.nbytes() == 2 * 3 * 2 * entries * 2 * 8 * 8  # k and v, layers, batch, heads, d, bytes
            logits.append(model(tokens[:, position : position + 1], past_key_values=cache).logits)
        found = torch.cat(logits, 1)
        assert (found - everything[:, prompt - 1 :]).abs().max() < 1e-9


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@torch.no_grad()
def test_generate_equals_recomputation(make_model, policy):
    model = make_model(norm_scheme="hybrid_star", **policy_fields(policy))
    for prompt in (1, 8):
        tokens = torch.randint(61, (2, prompt))
        expected = recompute(model, tokens, 24)
        assert generate(model, tokens, 24).tolist() == expected.tolist()
        assert generate(model, tokens, 24, use_cache=False).tolist() == expected.tolist()
        assert generate(model, tokens, 24, prefill_chunk_size=3).tolist() == expected.tolist()


@pytest.mark.parametrize("policy", SMALL, ids=str)
@torch.no_grad()
def test_the_decode_kernel_generates_the_same(make_model, policy, monkeypatch):
    """Triton's interpreter; a left-padded batch, so that positions are not slots."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    calls, genuine = 0, decoding.decode_attention

    def spy(*args):
        nonlocal calls
        calls += 1
        return genuine(*args)

    model = make_model(dtype=torch.float32, norm_scheme="hybrid_star", **policy_fields(policy))
    tokens = torch.randint(1, 61, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    expected = generate(model, tokens, 6, **options)
    monkeypatch.setattr(decoding, "decode_attention", spy)
    with decode_kernel(model):
        found = generate(model, tokens, 6, **options)
    assert generate(model, tokens, 6, **options).sequences.tolist() == expected.sequences.tolist()
    assert found.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert calls == 3 * 5  # layers, and tokens after the first, which the prompt gives
    # A prompt of one token in a batch without padding, whose positions are one number.
    first = torch.randint(61, (5, 1))
    with torch.no_grad(), decode_kernel(model):
        found = model(first, past_key_values=model.make_cache()).logits
    torch.testing.assert_close(found, model(first, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="float64"), decode_kernel(model.double()):
        pass
    assert decoding.takes_decode_kernel(model, "triton") and not decoding.takes_decode_kernel(model, "auto")  # no GPU
    with pytest.raises(UserError, match="Linear has no PHD cache"), decode_kernel(torch.nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize(
    ("policy", "positions"), [*((policy, "token") for policy in SMALL), ((3, 5, None), "repeated")], ids=str
)
@torch.no_grad()
def test_a_left_padded_batch_generates_as_one_at_a_time(make_model, policy, positions):
    model = make_model(norm_scheme="hybrid", **policy_fields(policy), phd_copy_positions=positions)
    lengths = [1, 8, 13, 6]
    rows = [torch.randint(1, 61, (1, length)) for length in lengths]
    tokens, mask = torch.zeros(4, 13, dtype=torch.long), torch.zeros(4, 13, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, 13 - lengths[i] :], mask[i, 13 - lengths[i] :] = row[0], 1
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}):
        found = generate(model, tokens, 21, attention_mask=mask, **options)[:, 13:]
        for i, row in enumerate(rows):
            assert found[i].tolist() == generate(model, row, 21)[0, lengths[i] :].tolist()


@pytest.mark.parametrize("policy", SMALL, ids=str)
@torch.no_grad()
def test_a_right_padded_prompt_can_be_continued(make_model, policy):
    """Rows then have a gap of padding between the prompt and what follows; only positions count."""
    model = make_model(norm_scheme="hybrid_star", **policy_fields(policy))
    lengths, more = [3, 12, 7], torch.randint(61, (3, 9))
    tokens, mask = torch.randint(61, (3, 12)), torch.zeros(3, 12, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, :length] = 1
    for keep in (0, 1):
        cache = model.make_cache()
        model(tokens, attention_mask=mask, past_key_values=cache, logits_to_keep=keep)
        found = [model(more[:, :4], past_key_values=cache, logits_to_keep=1).logits]
        found += [model(more[:, j : j + 1], past_key_values=cache).logits for j in range(4, 9)]
        for i, length in enumerate(lengths):
            whole = torch.cat([tokens[i : i + 1, :length], more[i : i + 1]], 1)
            expected = model(whole, use_cache=False).logits[0, -6:]
            assert (torch.cat(found, 1)[i] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("policy", SMALL, ids=str)
@torch.no_grad()
def test_chunked_prefill_is_exact(make_model, policy):
    model = make_model(norm_scheme="post", **policy_fields(policy))
    tokens = torch.randint(61, (2, 30))
    everything = model(tokens, use_cache=False).logits
    for pieces in ([10, 10, 10], [1, 2, 27], [29, 1], [8, 8, 14]):
        for keep in (0, 1):
            cache, start = model.make_cache(), 0
            for size in pieces:
                logits = model(tokens[:, start : start + size], past_key_values=cache, logits_to_keep=keep).logits
                expected = everything[:, start : start + size][:, -logits.size(1) :]
                assert (logits - expected).abs().max() < 1e-9
                start += size


@torch.no_grad()
def test_batch_operations_beams_and_a_continued_chat(make_model):
    model = make_model(norm_scheme="hybrid_star", phd_repeat=2, phd_window=4, phd_chunk=8)
    tokens, more = torch.randint(61, (2, 11)), torch.randint(61, (4, 5))
    cache = model.make_cache()
    model(tokens, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    wide = torch.cat([tokens.repeat_interleave(2, 0), more], 1)
    expected = model(wide, use_cache=False).logits[:, -5:]
    assert (model(more[:, :3], past_key_values=cache).logits - expected[:, :3]).abs().max() < 1e-9
    shared = torch.arange(14, 15).unsqueeze(0)  # one row of position ids for the whole batch
    step = model(more[:, 3:4], past_key_values=cache, position_ids=shared).logits
    assert (step - expected[:, 3:4]).abs().max() < 1e-9
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    found = model(more[[0, 3], 4:], past_key_values=cache).logits
    assert (found - expected[[0, 3], 4:]).abs().max() < 1e-9
    with pytest.raises(ValueError, match="a batch of 4 continues a cache of 2"):
        model(more, past_key_values=cache)

    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(tokens, **beams).tolist() == model.generate(tokens, use_cache=False, **beams).tolist()

    cache = model.make_cache()
    first = generate(model, tokens, 10, past_key_values=cache)
    again = torch.cat([first, torch.randint(61, (2, 6))], 1)
    expected = generate(model, again, 10)
    assert generate(model, again, 10, past_key_values=cache).tolist() == expected.tolist()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(model, again, 10, past_key_values=cache).tolist() == expected.tolist()


@torch.no_grad()
def test_crop_is_exact_or_refused(make_model):
    tokens = torch.randint(61, (1, 25))
    for policy in ((1, 1, None), (3, 1, None), (2, 4, 8), (2, 5, None)):
        model = make_model(norm_scheme="pre", **policy_fields(policy))
        everything = model(tokens, use_cache=False).logits
        refused = 0
        for length in range(1, 22):
            cache = model.make_cache()
            model(tokens[:, :22], past_key_values=cache)
            try:
                cache.crop(length - 22)
            except ValueError as error:
                assert "hidden entries" in str(error)
                assert cache.get_seq_length() == 22
                refused += 1
                continue
            assert cache.get_seq_length() == length
            found = model(tokens[:, length:], past_key_values=cache).logits
            assert (found - everything[:, length:]).abs().max() < 1e-9
        assert model.make_cache().is_croppable == (refused == 0)
        assert refused == {(1, 1, None): 0, (3, 1, None): 0, (2, 4, 8): 19, (2, 5, None): 21}[policy]
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)


@pytest.mark.parametrize(("policy", "cached"), [((2, 4, 8), 19), ((3, 4, 8), 18), ((2, 6, 4), 15), ((1, 1, None), 9)])
@torch.no_grad()
def test_other_tokens_after_a_crop(make_model, policy, cached):
    """What stood behind the new end is forgotten, hidden entries too: in a chunk that is cut, some are cached there."""
    model = make_model(norm_scheme="hybrid_star", **policy_fields(policy))
    first, others = torch.randint(61, (1, cached)), torch.randint(61, (1, 12))
    start = cached - cached % (policy[2] or cached)
    for length in range(start, cached):
        cache = model.make_cache()
        model(first, past_key_values=cache)
        cache.crop(length - cached)
        assert cache.get_seq_length() == length
        assert cache.positions.tolist() == [list(range(length))] and cache.lengths.tolist() == [length]
        held = [position for position in cache.hidden_positions[0].tolist() if position >= 0]
        span = min(policy[1], policy[2] or policy[1]) if policy[0] > 1 else 0
        assert sorted(held) == list(range(cached - span, length))
        found = [model(others[:, :1], past_key_values=cache).logits, model(others[:, 1:], past_key_values=cache).logits]
        expected = model(torch.cat([first[:, :length], others], 1), use_cache=False).logits[:, length:]
        assert (torch.cat(found, 1) - expected).abs().max() < 1e-9


@torch.no_grad()
def test_a_crop_of_rows_of_several_lengths(make_model):
    """Rows end at 3, 12 and 9 tokens of 12 slots; after a crop of 3 slots at 3, 9 and 9."""
    model = make_model(norm_scheme="pre", phd_repeat=2, phd_window=1)
    tokens, more = torch.randint(61, (3, 12)), torch.randint(61, (3, 4))
    mask = torch.tensor([[slot < length for slot in range(12)] for length in (3, 12, 9)]).long()
    cache = model.make_cache()
    model(tokens, attention_mask=mask, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 9 and cache.lengths.tolist() == [3, 9, 9]
    found = model(more, past_key_values=cache).logits
    for row, length in enumerate((3, 9, 9)):
        whole = torch.cat([tokens[row, :length], more[row]])[None]
        assert (found[row] - model(whole, use_cache=False).logits[0, length:]).abs().max() < 1e-9


@torch.no_grad()
def test_foreign_caches_are_refused(make_model):
    from transformers import DynamicCache

    model = make_model(phd_repeat=2, phd_window=4)
    tokens = torch.randint(61, (1, 5))
    with pytest.raises(ValueError, match="DynamicCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        generate(model, tokens, 3, cache_implementation="static")


@torch.no_grad()
def test_the_bound_is_enforced(make_model):
    """A step that would keep more than the promised entries stops instead of growing."""
    model = make_model(phd_repeat=3, phd_window=4)
    cache = model.make_cache()
    cache._slots = lambda tokens: tokens
    with pytest.raises(AssertionError, match="more than 8"):
        model(torch.randint(61, (1, 9)), past_key_values=cache)
