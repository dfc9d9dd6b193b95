"""The least work of a prompt and of a decoding step, against what torch counts in an exported model, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phd_megatron.config.architecture import Architecture
from phd_megatron.huggingface.installed import config_class, model_class
from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.planning.generation import Work, pass_work

H, F, HEADS, GROUPS, D, LAYERS, VOCABULARY = 24, 40, 4, 2, 8, 3, 61


def architecture(policy: KVPolicy, gated: bool = True) -> Architecture:
    return Architecture(
        num_layers=LAYERS,
        hidden_size=H,
        ffn_hidden_size=F,
        heads=HEADS,
        groups=GROUPS,
        head_dim=D,
        max_position_embeddings=128,
        rotary_base=1e4,
        rotary_percent=1.0,
        normalization="RMSNorm",
        epsilon=1e-5,
        gated=gated,
        qkv_bias=False,
        linear_bias=False,
        tied=True,
        init_std=0.02,
        norm_scheme="hybrid_star",
        policy=policy,
    )


POLICIES = [KVPolicy(), KVPolicy(2, 5, 16), KVPolicy(3, 4), KVPolicy(4, 16, 32), KVPolicy(2)]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("prompt", [1, 7, 40])
def test_matrix_products_are_those_that_run(policy: KVPolicy, prompt: int, gated: bool) -> None:
    config = config_class()(
        vocab_size=VOCABULARY,
        hidden_size=H,
        intermediate_size=F,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=D,
        mlp_gated=gated,
        norm_scheme="hybrid_star",
        phd_repeat=policy.repeat,
        phd_window=policy.window,
        phd_chunk=policy.chunk,
    )
    model = model_class()(config).eval()
    cache = model.make_cache()
    ids = torch.randint(VOCABULARY, (2, prompt + 1), generator=torch.Generator().manual_seed(0))
    a = architecture(policy, gated)
    for tokens, past in ((ids[:, :prompt], 0), (ids[:, prompt:], prompt)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tokens, cache=cache, use_cache=True, logits_to_keep=1)
        ran = counter.get_flop_counts()["Global"]
        work = pass_work(a, VOCABULARY, past=past, new=tokens.size(1), batch=2, element=4)
        assert work.linear == ran[torch.ops.aten.mm]
    keys, values, hidden_keys, hidden_values = (
        sum(getattr(layer, name).numel() for layer in cache.layers)
        for name in ("keys", "values", "hidden_keys", "hidden_values")
    )
    assert work.originals == 4 * (keys + values)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert work.weights == 4 * sum(p.numel() for p in matrices)
    if policy.repeat > 1 and policy.chunk is None:  # a full window: what was kept, and the new one
        kept = min(prompt, policy.window - 1)
        assert work.hidden == 2 * 4 * LAYERS * 2 * GROUPS * D * (policy.repeat - 1) * (kept + 1)
    assert hidden_keys == hidden_values


def test_pairs_by_counting_the_mask() -> None:
    """A prompt of 20 tokens, the cone of the last one; and one token behind it."""
    policy = KVPolicy(3, 4, 8)
    seen = policy.mask(20)
    copy, position = torch.arange(60) // 20, torch.arange(60) % 20
    pairs = 0
    for layer in range(1, LAYERS + 1):
        following = policy.cone_start(19, layer + 1, LAYERS) if layer < LAYERS else None
        rows = (copy == 0) | (position >= following) if following is not None else (copy == 2) & (position == 19)
        pairs += int(seen[rows].sum())
    assert pass_work(architecture(policy), VOCABULARY, past=0, new=20).attention == 4 * HEADS * D * pairs
    last = [int(seen[(position == 19) & (copy >= least)].sum()) for least in (0, 0, 2)]
    assert pass_work(architecture(policy), VOCABULARY, past=19, new=1).attention == 4 * HEADS * D * sum(last)


def test_sums() -> None:
    work = Work(1, 2, 30, 40, 50)
    assert (work.flops, work.bytes) == (3, 120)
