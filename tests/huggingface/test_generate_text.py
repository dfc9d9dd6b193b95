"""``generate`` refuses tokens that the model has no row for, NaN logits, and options that cannot be."""

from __future__ import annotations

import pytest
import torch

from phd_megatron.errors import UserError
from phd_megatron.huggingface.generation import Sampling, check_amount, generate_text
from phd_megatron.huggingface.loading import load_directory


class Words:
    """A tokenizer of the given ids."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def __call__(self, prompt, **options):
        from transformers import BatchEncoding

        ids = torch.tensor([self.ids], dtype=torch.long).view(1, -1)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, tokens, **options):
        return " ".join(map(str, tokens.tolist()))


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(norm_scheme="pre", phd_repeat=2, phd_window=4, eos_token_id=None, pad_token_id=0)


def test_the_vocabulary_ends_below_its_size(model):
    """61 rows: the last token is 60."""
    made = generate_text(model, Words(3, 60), "x", 4)
    expected = torch.tensor([[3, 60]])
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert made.text == " ".join(map(str, expected[0, 2:].tolist()))
    assert (made.prompt_tokens, made.new_tokens, made.trained_positions) == (2, 4, 128)
    # Keys and values of 3 layers, 2 groups of 8 numbers in float64; hidden slots beside 5 originals.
    assert (made.cache_tokens, made.vanilla_bytes) == (5, 2 * 3 * 2 * 8 * 8 * 5)
    assert made.hidden_entries == 4
    assert made.cache_bytes == 2 * 3 * 2 * 8 * 8 * (5 + 4)
    for ids in ((3, 61), (61,), (60, 62, 1)):
        with pytest.raises(UserError, match=rf"gives token {max(ids)}, and the model has a vocabulary of 61"):
            generate_text(model, Words(*ids), "x", 4)
    with pytest.raises(UserError, match="has no tokens"):
        generate_text(model, Words(), "x", 4)


def test_logits_that_are_nan_are_refused(make_model):
    model = make_model(norm_scheme="pre", eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are NaN"):
        generate_text(model, Words(3), "x", 4)


def test_the_note_about_a_longer_text_than_was_trained_on(model):
    longer = generate_text(model, Words(*range(61), *range(61), 1, 2), "x", 5)  # 124 + 5 of 128
    assert "longer than the 128 tokens" in longer.summary()
    assert "longer" not in generate_text(model, Words(*range(61), *range(61), 1, 2), "x", 4).summary()


@pytest.mark.parametrize(
    ("name", "low", "high", "below", "above"),
    [
        ("temperature", 1e-6, 1e6, 0.9e-6, 1.1e6),
        ("top_k", 1, 2**31 - 1, 0, 2**31),
        ("top_p", 1e-9, 1.0, 0.0, 1.001),
    ],
)
def test_ranges_of_sampling(name, low, high, below, above):
    for value in (low, high):
        options = Sampling(**{name: value}).options()
        assert options["do_sample"] is True and options[name] == value
        assert all(options[other] in (1.0, 0) for other in {"temperature", "top_k", "top_p"} - {name})
    for value in (below, above):
        with pytest.raises(UserError, match=f"{name}="):
            Sampling(**{name: value}).options()
    assert Sampling(seed=5).options()["do_sample"] is False


def test_amounts_and_seeds():
    check_amount(1)
    check_amount(1_000_000)
    assert Sampling(seed=2**63 - 1).options() == Sampling(seed=-(2**63)).options() == Sampling().options()
    for refused in (
        lambda: check_amount(0),
        lambda: check_amount(1_000_001),
        lambda: Sampling(seed=2**63).options(),
        lambda: Sampling(seed=-(2**63) - 1).options(),
    ):
        with pytest.raises(UserError, match="it must be at least"):
            refused()


def test_a_directory_whose_files_have_fewer_rows_is_refused(make_checkpoint, tmp_path):
    """``vocab_size`` one above the rows of the embedding."""
    import json

    from phd_megatron.huggingface.export import export_checkpoint

    export_checkpoint(make_checkpoint(), tmp_path / "hf", verify="none")
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    assert load_directory(tmp_path / "hf", "it").config.vocab_size == 257
    path.write_text(json.dumps({**content, "vocab_size": 258}))
    with pytest.raises(UserError, match="vocab_size=258"):
        load_directory(tmp_path / "hf", "it")
