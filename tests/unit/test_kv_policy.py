"""KVPolicy against brute force: the mask, and each thing that is read from it."""

from __future__ import annotations

import itertools

import pytest
import torch

from phd_megatron.phd.kv_policy import KVPolicy

VARIANTS = ((1, None), (16, None), (16, 32), (4, 8), (3, 7), (64, 32), (200, None), (2, 1), (1, 4))
POLICIES = [KVPolicy(k, w, c) for k in (1, 2, 3) for w, c in VARIANTS]


def sees(policy: KVPolicy, n: int, j: int, m: int, i: int) -> bool:
    """Eq. 2 in words: originals are seen by all later tokens; hidden keys inside window and chunk by hidden queries."""
    if i == 1:
        return m <= n
    if j == 1 or m > n or n - m >= policy.window:
        return False
    if policy.chunk is not None and n // policy.chunk != m // policy.chunk:
        return False
    return m < n or i <= j


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_mask_is_equation_2(policy: KVPolicy) -> None:
    length, copies = 19, range(1, policy.repeat + 1)
    rows = [(n, j) for j in copies for n in range(length)]  # copy-major
    expected = torch.tensor([[sees(policy, n, j, m, i) for m, i in rows] for n, j in rows])
    assert torch.equal(policy.mask(length), expected)
    assert bool(policy.mask(length).diagonal().all()), "a token sees itself"


def test_one_copy_is_the_causal_mask_whatever_the_window() -> None:
    for window, chunk in VARIANTS:
        assert torch.equal(KVPolicy(1, window, chunk).mask(9), torch.ones(9, 9).tril().bool())


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_pairs_count_the_mask(policy: KVPolicy) -> None:
    for length in (1, 7, 40):
        mask = policy.mask(length)
        for copies in range(1, policy.repeat + 1):
            rows = mask[-copies * length :]
            assert policy.pairs(length, copies) == (int(rows[:, :length].sum()), int(rows[:, length:].sum()))
        assert policy.pairs(length) == policy.pairs(length, policy.repeat)
    with pytest.raises(ValueError, match="query_copies"):
        policy.pairs(4, policy.repeat + 1)


# ------------------------------------------------------------------ decoding


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.repeat > 1], ids=repr)
def test_retained_positions_are_exactly_those_still_seen(policy: KVPolicy) -> None:
    horizon = 80
    mask = policy.mask(horizon).view(policy.repeat, horizon, policy.repeat, horizon)
    hidden = mask[1:, :, 1:, :].any(2).any(0)  # [query position, key position]
    for length in range(1, 50):
        needed = hidden[length:, :length].any(0).nonzero().flatten().tolist()
        assert needed == list(range(policy.retained_from(length), length))
        assert len(needed) * (policy.repeat - 1) <= policy.max_hidden_entries - (policy.repeat - 1)
    for n in range(horizon):
        assert policy.first_hidden_key(n) == int(hidden[n].nonzero()[0])
        assert int(mask[:, n, 1:].any(0).sum()) <= policy.max_hidden_entries


def needed_hidden(policy: KVPolicy, wanted: int, num_layers: int, length: int) -> list[set[int]]:
    """Hidden positions each layer must compute for logits at ``wanted`` and later, walked back through the mask."""
    mask = policy.mask(length).view(policy.repeat, length, policy.repeat, length)
    reach = mask[1:, :, 1:, :].any(2).any(0)
    outputs, layers = set(range(wanted, length)), []
    for _ in range(num_layers):  # from the last layer down: outputs wanted -> hidden keys the layer must make
        outputs = set(reach[sorted(outputs)].any(0).nonzero().flatten().tolist())
        layers.append(outputs)
    return layers[::-1]


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.repeat > 1], ids=repr)
def test_cone_is_exactly_what_the_layers_reach(policy: KVPolicy) -> None:
    length, num_layers = 45, 3
    for wanted in (0, 1, 6, 7, 8, 31, 32, 33, 44):
        for layer, needed in enumerate(needed_hidden(policy, wanted, num_layers, length), start=1):
            assert needed == set(range(policy.cone_start(wanted, layer, num_layers), length))
    for layer in (0, num_layers + 1):
        with pytest.raises(ValueError, match="layer_number"):
            policy.cone_start(4, layer, num_layers)


# ------------------------------------------------------------------ context parallelism


def test_slices_are_zigzag_and_cover_every_token_once() -> None:
    policy = KVPolicy(2, 4, 8)
    assert policy.context_parallel_slices(48, 1, 0) == (range(48),)
    assert policy.context_parallel_slices(48, 3, 0) == (range(0, 8), range(40, 48))
    positions = [n for rank in range(3) for part in policy.context_parallel_slices(48, 3, rank) for n in part]
    assert sorted(positions) == list(range(48))


@pytest.mark.parametrize(
    "policy", [KVPolicy(2, 4, 8), KVPolicy(3, 5, None), KVPolicy(2, 1), KVPolicy(2, 5, 12)], ids=repr
)
def test_halo_is_what_a_slice_sees_before_itself(policy: KVPolicy) -> None:
    length = 48
    mask = policy.mask(length).view(policy.repeat, length, policy.repeat, length)
    reach = mask[1:, :, 1:, :].any(2).any(0)
    for rank, size in itertools.chain(((r, 2) for r in range(2)), ((r, 3) for r in range(3))):
        for part in policy.context_parallel_slices(length, size, rank):
            outside = reach[part.start : part.stop, : part.start].any(0).nonzero().flatten().tolist()
            assert outside == list(range(part.start - policy.halo(part.start), part.start))
    if policy.chunk == 8:
        assert all(policy.halo(start) == 0 for start in range(0, length, 8))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_halos_carry_what_the_mask_needs_and_no_more(policy: KVPolicy, size: int) -> None:
    length = 48
    try:
        parts = [policy.context_parallel_slices(length, size, rank) for rank in range(size)]
    except ValueError:
        assert policy.window > length // (2 * size) + 1
        return
    mask = policy.mask(length).view(policy.repeat, length, policy.repeat, length)
    reach = mask[1:, :, 1:, :].any(2).any(0) if policy.repeat > 1 else torch.zeros(length, length, dtype=torch.bool)
    halos = policy.halos(length, size)
    for rank, slices in enumerate(parts):
        for part in slices:
            number = part.start // len(part)
            outside = reach[part.start : part.stop, : part.start].any(0).nonzero().flatten().tolist()
            mine = [halo for halo in halos if halo.slice == number]
            assert [n for halo in mine for n in halo.positions] == outside
            for halo in mine:
                assert halo.receiver == rank and halo.positions
                assert any(set(halo.positions) <= set(held) for held in parts[halo.sender])
                assert (halo.sender == halo.receiver) == (number == size), "the middle one is local"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_blocks_of_originals_make_up_the_causal_mask(size: int) -> None:
    """Own slices in a row are causal, other ranks' are seen whole or not at all."""
    length, policy = 48, KVPolicy(1)
    half = length // (2 * size)
    for rank in range(size):
        queries = torch.tensor([n for part in policy.context_parallel_slices(length, size, rank) for n in part])
        for source in range(size):
            keys = torch.tensor([n for part in policy.context_parallel_slices(length, size, source) for n in part])
            needed = policy.original_visible(queries[:, None], keys)
            if source == rank:
                assert torch.equal(needed, torch.ones_like(needed).tril())
                continue
            first, stop = policy.original_block(rank, source)
            seen = torch.zeros_like(needed)
            seen[first * half :, : stop * half] = True
            assert torch.equal(seen, needed)
    with pytest.raises(ValueError, match="causally"):
        policy.original_block(1, 1)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_work_of_a_rank_counts_the_mask_and_is_balanced(policy: KVPolicy) -> None:
    length, size = 144, 3
    mask = policy.mask(length).view(policy.repeat, length, policy.repeat, length)
    works = []
    for rank in range(size):
        slices = KVPolicy(policy.repeat).context_parallel_slices(length, size, rank)  # any window can be counted
        rows = mask[:, [n for part in slices for n in part]]
        works.append(policy.pairs(length, slices=slices))
        assert works[-1] == (int(rows[:, :, 0].sum()), int(rows[:, :, 1:].sum()))
    assert len({original for original, _ in works}) == 1, "the quadratic part is equal on all ranks"
    assert tuple(map(sum, zip(*works, strict=True))) == policy.pairs(length)


def test_traffic_is_vanillas_and_the_halo() -> None:
    length, size = 96, 4  # slices of 12
    vanilla = KVPolicy(1).context_parallel_traffic(length, size, 0)
    assert (vanilla.originals, vanilla.forward, vanilla.backward) == (72, 72, 144)
    for policy in (KVPolicy(5, 1), KVPolicy(3, 16, 12), KVPolicy(2, 9, 6)):
        assert policy.context_parallel_traffic(length, size, 1) == vanilla
    window = KVPolicy(3, 5)
    total = [window.context_parallel_traffic(length, size, rank) for rank in range(size)]
    # Each of the 7 slices after the first sees 4 positions of 2 hidden copies; one of them is on the same rank.
    assert sum(t.halo_sent for t in total) == sum(t.halo_returned for t in total) == 6 * 4 * 2
    assert window.context_parallel_traffic(length, 1, 0).forward == 0


def test_slices_that_cannot_be_exact_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"seq_length=50.*48 or 54"):
        KVPolicy(2, 4).context_parallel_slices(50, 3, 0)
    for rank in range(3):  # every rank refuses, also one whose own slices would do
        with pytest.raises(ValueError, match=r"phd_window=10 .*8 tokens; use a window of at most 9"):
            KVPolicy(2, 10).context_parallel_slices(48, 3, rank)
    assert KVPolicy(2, 9).context_parallel_slices(48, 3, 0)
    with pytest.raises(ValueError, match=r"use 6$"):
        KVPolicy(1).context_parallel_slices(2, 3, 0)
    assert KVPolicy(1, 10).context_parallel_slices(48, 3, 0), "nothing is hidden in a vanilla model"
    with pytest.raises(ValueError, match="rank 3"):
        KVPolicy(2, 4).context_parallel_slices(48, 3, 3)


# ------------------------------------------------------------------ options, names, bad values


def test_defaults_are_said_in_words() -> None:
    policy, note = KVPolicy.from_options(2)
    assert policy == KVPolicy(2, 16, 32) and note is not None and "PHD-CSWA-2-16-32" in note
    policy, note = KVPolicy.from_options(2, chunk=8)
    assert policy == KVPolicy(2, 16, 8) and note is not None
    assert KVPolicy.from_options(3, 1) == (KVPolicy(3, 1), None)
    assert KVPolicy.from_options(2, 16) == (KVPolicy(2, 16), None), "a window alone means no chunks"
    assert KVPolicy.from_options() == (KVPolicy(), None)
    policy, note = KVPolicy.from_options(1, 16, 32)
    assert policy == KVPolicy(1, 16, 32) and note is not None and "no effect" in note


@pytest.mark.parametrize(
    ("policy", "name", "entries"),
    [
        (KVPolicy(1, 16, 32), "vanilla", 0),
        (KVPolicy(3), "PHD-3", 2),
        (KVPolicy(2, 16), "PHD-SWA-2-16-inf", 16),
        (KVPolicy(3, 64, 32), "PHD-CSWA-3-64-32", 64),
    ],
)
def test_names_and_cache_bound(policy: KVPolicy, name: str, entries: int) -> None:
    assert policy.name == name
    assert policy.max_hidden_entries == entries


@pytest.mark.parametrize("bad", [0, -1, 1.0, "2", True])
def test_values_below_one_or_of_another_kind_are_refused(bad: object) -> None:
    for field, arguments in (("repeat", (bad,)), ("window", (2, bad)), ("chunk", (2, 4, bad))):
        with pytest.raises(ValueError, match=f"phd_{field}={bad!r}"):
            KVPolicy(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="phd_window=None"):
        KVPolicy(2, None)  # type: ignore[arg-type]
