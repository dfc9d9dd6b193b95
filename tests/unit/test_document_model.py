"""Documents kept apart in the model that trains: logits of each are those of it alone; what does not go with it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from phd_megatron.errors import UserError
from phd_megatron.phd.documents import positions_in_documents, starts_of_borders, starts_of_tokens
from phd_megatron.runtime.context import Runtime

from .configurations import resolved
from .test_model import VOCAB, build, copy_by_name, make_run, stock_model

LENGTHS = [[5, 1, 7, 3], [9, 7]]
STARTS = torch.stack([starts_of_borders([0, *torch.tensor(row).cumsum(0).tolist()]) for row in LENGTHS])


@pytest.fixture(scope="module", autouse=True)
def runtime() -> Iterator[Runtime]:
    from phd_megatron.config.schema import ParallelConfig

    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def model_of(restart: bool, **fields: object) -> torch.nn.Module:
    run = make_run(**fields)
    run.data.reset_attention_mask, run.data.reset_position_ids = True, restart
    return build(run).eval()


def positions(restart: bool) -> Tensor:
    return positions_in_documents(STARTS) if restart else torch.arange(16).expand(2, -1)


CASES = [
    {"norm_scheme": scheme, "phd_repeat": repeat, "phd_window": window, "phd_chunk": chunk}
    for scheme in ("pre", "hybrid_star")
    for repeat, window, chunk in ((1, None, None), (2, 4, 4), (3, 5, None))
]
CASES += [{**CASES[-1], "phd_copy_positions": "repeated", "phd_copy_embedding": "vector"}]


@pytest.mark.parametrize("restart", [True, False], ids=["restarted", "of the sample"])
@pytest.mark.parametrize("fields", CASES, ids=lambda fields: "-".join(map(str, fields.values())))
@torch.no_grad()
def test_each_document_is_what_it_is_alone(fields: dict[str, object], restart: bool) -> None:
    model = model_of(restart, **fields)
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    packed = model(tokens, positions(restart), STARTS)
    for sample, row in enumerate(LENGTHS):
        parts = zip(tokens[sample].split(row), packed[sample].split(row), strict=True)
        for document, found in parts:
            alone = model(document[None], torch.arange(len(document))[None], None)[0]
            assert torch.allclose(found, alone, rtol=1e-4, atol=1e-5)


def test_one_document_tells_another_nothing() -> None:
    """Losses and the gradient of the embedding of tokens that only other documents have, to the last bit."""
    model = model_of(True, phd_repeat=3, phd_window=5, norm_scheme="hybrid_star")
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))
    labels = tokens.roll(-1, 1)
    changed = tokens.clone()
    changed[0, 6:13] = (tokens[0, 6:13] + 1) % VOCAB
    one, two = (model(x, positions(True), STARTS, labels=labels) for x in (tokens, changed))
    inside = torch.zeros(2, 16, dtype=torch.bool)
    inside[0, 6:13] = True
    assert torch.equal(one[~inside], two[~inside]) and not torch.equal(one[inside], two[inside])


def megatrons(tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Megatron's own mask ``[b, 1, s, s]``, True where nothing is seen, and positions, of documents that are reset."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    rows = [_get_ltor_masks_and_position_ids(row, end, True, True, False, True) for row in tokens]
    return torch.stack([mask for mask, _, _ in rows]), torch.stack([places for _, _, places in rows])


@pytest.mark.parametrize("restart", [True, False])
def test_k1_is_stock_megatron_under_its_own_mask(restart: bool) -> None:
    """Losses and every gradient in float64, within 1e-6: Megatron's layers and attention, told by a dense mask."""
    from phd_megatron.model.build import build_model

    run = make_run()
    run.data.reset_attention_mask, run.data.reset_position_ids = True, restart
    tokens = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(5))
    tokens[0, [3, 4, 11]] = tokens[1, 8] = end = 7
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    starts, (mask, places) = starts_of_tokens(inputs, end), megatrons(inputs, end)
    assert torch.equal(positions_in_documents(starts), places)
    ours = build_model(run, 64, torch.device("cpu"))[0].double()
    stock = stock_model(run).double()
    copy_by_name(ours, stock)
    losses = ours(inputs, places if restart else torch.arange(16).expand(2, -1), starts, labels=labels)
    expected = stock(inputs, places, mask, labels=labels)
    assert torch.allclose(losses, expected, rtol=1e-6, atol=0)
    together = ours(inputs, places, torch.zeros_like(starts), labels=labels)
    assert not torch.allclose(together, expected, rtol=1e-3)
    losses.mean().backward()
    expected.mean().backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    scale = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for name, parameter in ours.named_parameters():
        off = (parameter.grad - gradients[name]).norm()
        assert off <= 1e-6 * max(gradients[name].norm(), 1e-6 * scale), name


@torch.no_grad()
def test_packed_sequences_as_megatron_describes_them() -> None:
    model = model_of(True, phd_repeat=2, phd_window=4)
    tokens = torch.randint(VOCAB, (1, 16), generator=torch.Generator().manual_seed(3))
    places = positions(True)[:1]
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 5, 6, 13, 16]))
    assert torch.equal(model(tokens, places, None, packed_seq_params=packed), model(tokens, places, STARTS[:1]))
    with pytest.raises(UserError, match=r"one sample, \[1, s\], whose documents fill it"):
        model(tokens, places, None, packed_seq_params=SimpleNamespace(cu_seqlens_q=torch.tensor([0, 5])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"reset_position_ids": True},
            "reset_position_ids=True without reset_attention_mask.*set reset_attention_mask",
        ),
        (
            {
                **{"reset_attention_mask": True, "context_parallel_size": 2, "seq_length": 16},
                **{"phd_repeat": 2, "phd_window": 6},
            },
            "seen 5 positions back in a document, further than one context-parallel slice of 4 tokens; .*at most 5",
        ),
        ({"reset_attention_mask": True, "phd_attention_backend": "flex"}, "every length of a document; use auto"),
        (
            {"reset_attention_mask": True, "cuda_graph_impl": "local", "cuda_graph_scope": "full_iteration"},
            "where documents begin is read by the host",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_what_does_not_go_with_it(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(**fields)
