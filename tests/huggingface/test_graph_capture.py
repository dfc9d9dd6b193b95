"""A prompt and the steps after it never wait for the device, nor copy from the host: both can become CUDA graphs.

A step is many small operations, so those that layers or copies can share are made once.

The meta device stands for the GPU: its numbers cannot be read, and what is copied to it is seen.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phd_megatron.phd.kv_policy import KVPolicy

POLICIES = [KVPolicy(1), KVPolicy(3, 4, 8), KVPolicy(2, 5)]


class NoCopies(TorchDispatchMode):
    """Notes operations that see tensors of the host beside those of the device; numbers are none."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor) and x.dim()]
        devices = {x.device.type for x in tensors}
        self.seen += "meta" in devices
        if len(devices) > 1:
            self.mixed.append(str(function))
        return result


STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 500.0}
LLAMA3 = {**STRETCHED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = [
    *((policy, None) for policy in POLICIES),
    (POLICIES[1], LLAMA3),
    (POLICIES[1], STRETCHED | {"rope_type": "yarn"}),
]


@pytest.mark.parametrize(("policy", "rope"), CASES, ids=str)
@torch.no_grad()
def test_nothing_crosses_between_host_and_device(
    make_model, policy: KVPolicy, rope: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(
        **{"norm_scheme": "hybrid_star", "phd_repeat": policy.repeat, "phd_window": policy.window},
        **{"phd_chunk": policy.chunk, **({} if rope is None else {"rope_parameters": rope})},
    ).to("meta")
    tokens = torch.zeros(2, 19, dtype=torch.long, device="meta")
    cache = model.make_cache()
    genuine = torch.tensor

    def of_the_host(*args, device=None, **kwargs):
        made = genuine(*args, device=device, **kwargs)
        assert made.device.type == "cpu" or not made.numel(), "numbers of the host are copied to the device"
        return made

    monkeypatch.setattr(torch, "tensor", of_the_host)  # on the meta device there is nothing to copy, so no operation
    with NoCopies() as watched:
        for piece in (tokens, tokens[:, :1], tokens[:, :1]):
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert watched.mixed == [] and watched.seen > 100
    assert cache.get_seq_length() == 21


def test_a_copy_is_seen() -> None:
    with NoCopies() as watched:
        torch.zeros(3).to("meta")
    assert len(watched.mixed) == 1


class Operations(TorchDispatchMode):
    """Counts what is launched, by name; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += not function.is_view
        return function(*args, **(kwargs or {}))


def operations(make_model, policy: KVPolicy, layers: int) -> tuple[Counter[str], Counter[str]]:
    """Of a prompt that ends inside a chunk, and of the token after it."""
    fields = {"phd_repeat": policy.repeat, "phd_window": policy.window, "phd_chunk": policy.chunk}
    model = make_model(norm_scheme="hybrid_star", num_hidden_layers=layers, **fields)
    tokens, cache = torch.zeros(1, 19, dtype=torch.long), model.make_cache()
    found = []
    for piece in (tokens, tokens[:, :1]):
        with torch.no_grad(), Operations() as watched:
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(watched.counts)
    return found[0], found[1]


@pytest.mark.parametrize("policy", POLICIES[:2], ids=lambda policy: policy.name)
def test_rope_and_masks_are_made_once_for_all_layers(make_model, policy: KVPolicy) -> None:
    """With chunks all layers but the last have the same rows."""
    for few, many in zip(operations(make_model, policy, 3), operations(make_model, policy, 6), strict=True):
        for name in ("aten.cos.default", "aten.le.Tensor", "aten.floor_divide.default", "aten.arange.default"):
            assert few[name] == many[name]
        assert 1 <= few["aten.cos.default"] <= 2


def test_launches_do_not_grow_with_copies(make_model) -> None:
    few, many = (operations(make_model, KVPolicy(repeat, 4, 8), 3) for repeat in (3, 17))
    for one, two in zip(few, many, strict=True):
        assert sum(one.values()) == sum(two.values())
